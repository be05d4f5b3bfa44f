"""Benchmarks, one file a question; all append to data/all_benchmark_data.csv."""

import os

# Before torch is imported: OpenMP reads it once. Threads that share a busy core wait for each other at every barrier.
os.environ.setdefault("OMP_NUM_THREADS", "1")
