"""Devices and process groups: one process by itself, or the ranks that torchrun started."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


def quiet() -> None:
    """Hide what TorchRec tells its own developers: deprecations inside it, hints about its planner's defaults."""
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("torchrec", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as this rank's device; ValueError for CUDA where torch sees none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no CUDA device; give --device cpu, or mend the driver")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def world_size() -> int:
    """Ranks that will take part, known before they meet."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: torch.device) -> Iterator[tuple[int, int]]:
    """The default process group for the time of a `with`, as (rank, world size): nccl on CUDA, gloo on a CPU.

    Under torchrun, the group of its ranks. Otherwise a group of one, meeting in a temporary file: no port that could
    be taken. Can be entered again after it was left.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    with tempfile.TemporaryDirectory(prefix="slipstream-") as folder:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield dist.get_rank(), dist.get_world_size()
        finally:
            dist.destroy_process_group()
