"""Set-up of the whole test run: one thread, and property tests without a deadline."""

import logging
import os

# Before torch is imported, here and in the processes that tests start: OpenMP reads it once.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# TorchRec logs the arguments of every call it makes through these; pytest would print pages of it with a failure.
for _name in ("MethodLogger-NullHandler", "Cap01Logger-NullHandler"):
    logging.getLogger(_name).propagate = False

# No deadline: the first example pays torch's lazy initialisation, and a busy machine is no defect. `derandomize` so
# that a failure in CI fails at a desk too.
settings.register_profile("slipstream", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("slipstream")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
