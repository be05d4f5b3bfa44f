"""Runs a function on several real gloo ranks and brings back what they return or raise."""

from __future__ import annotations

import logging
import os
import pickle
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` on every rank of a new gloo group; their results by rank.

    Raises AssertionError with the rank's traceback if one fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, folder, function, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout=240)
        results = []
        for rank, process in enumerate(ranks):
            file = Path(folder) / f"{rank}.pickle"
            if process.is_alive():
                process.kill()
            assert file.exists(), f"rank {rank} ended with code {process.exitcode} and no result"
            kind, value = pickle.loads(file.read_bytes())
            assert kind == "result", f"rank {rank} failed:\n{value}"
            results.append(value)
        return results


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # TorchRec's advice to its own developers, many lines from every rank, would bury a failure.
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        outcome = ("result", function(rank, *arguments))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    partial = Path(folder) / f"{rank}.partial"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(Path(folder) / f"{rank}.pickle")
    if outcome[0] == "result":
        dist.barrier()
        dist.destroy_process_group()
