"""What a session's hot rows are held against, on the same look-ups: fixed rows, caches, and the oracle."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from benchmarks import caches
from benchmarks.replan_run import Bools, Run
from benchmarks.traces import Trace

Floats = npt.NDArray[np.float64]


class Comparison:
    """Hit rates by interval, from interval ``first`` on, of a finished run and of what it is compared with."""

    def __init__(self, trace: Trace, run: Run, first: int) -> None:
        self.trace, self.run, self.first = trace, run, first
        self.bounds = np.arange(first, len(run.hot) + 1) * run.every
        self.counts = [trace.count_lookups(begin, end) for begin, end in itertools.pairwise(self.bounds.tolist())]
        self.lookups = np.array([int(counts.sum()) for counts in self.counts])

    def rates(self) -> dict[str, Floats]:
        before = self.trace.count_lookups(0, int(self.bounds[0]))
        return {
            "static": self.of_rows([self.run.mask(self.first - 1, self.trace.starts)] * len(self.counts)),
            "ours": self.run.hits[self.first :],
            "lru": self.of_cache("lru"),
            "lfu": self.of_cache("lfu"),
            "oracle": self.of_rows([best_rows(counts, self.run.slots) for counts in self.counts]),
            "plan": self.of_rows([best_rows(before, self.run.slots)] * len(self.counts)),
        }

    def total(self, rates: Floats) -> float:
        """Of all intervals together."""
        return float((rates * self.lookups).sum() / self.lookups.sum())

    def of_rows(self, hot: list[Bools]) -> Floats:
        """By interval, with its hot rows, bool ``[total rows]`` each."""
        hits = [int(counts[rows].sum()) for counts, rows in zip(self.counts, hot, strict=True)]
        return np.array(hits) / self.lookups

    def of_cache(self, kind: str) -> Floats:
        """FBGEMM's cache of as many sets as the slots take, which begins empty with the trace."""
        trace = self.trace
        sets = -(-self.run.slots // caches.WAYS)
        sets_of = caches.cache_set(np.arange(trace.total_rows), sets)
        if kind == "lru":
            hit = caches.simulate_lru(trace.rows, trace.batches, sets_of, sets)
        else:
            hit = caches.simulate_lfu(trace.rows, trace.lookups, trace.batches, sets_of, sets)
        hits = np.concatenate([[0], np.cumsum(trace.lookups * hit)])
        return np.diff(hits[trace.batches[self.bounds]]) / self.lookups


def best_rows(counts: npt.NDArray[np.int64], slots: int) -> Bools:
    """bool ``[rows]``: the ``slots`` rows of most look-ups, of equals the lower ones."""
    hot = np.zeros(len(counts), dtype=bool)
    hot[np.argsort(-counts, kind="stable")[:slots]] = True
    return hot
