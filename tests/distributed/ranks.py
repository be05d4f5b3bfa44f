"""Runs a function on several real gloo ranks and brings back what they return or raise.

The ranks of a size are started once and serve every test that asks for it: starting costs more (torch, FBGEMM and
TorchRec are imported in each) than most tests do.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

_SECONDS = 240.0
_started: dict[int, _Ranks] = {}


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``function(rank, *arguments)`` on every rank of a gloo group; their results by rank.

    Raises AssertionError with the rank's traceback if one fails; the next call then gets new ranks.
    """
    if world_size not in _started:
        _started[world_size] = _Ranks(world_size)
    outcomes = _started[world_size].run(function, arguments)
    failed = {rank: value for rank, (kind, value) in enumerate(outcomes) if kind != "result"}
    if failed:
        _started.pop(world_size).kill()
    # A rank that raised says more than one that waited for it.
    for kind in ("died", "error", "lost"):
        for rank, value in failed.items():
            assert outcomes[rank][0] != kind, f"rank {rank} failed:\n{value}"
    return [value for _, value in outcomes]


class _Ranks:
    """Processes of one group, waiting for functions to run. Daemons: they end with the test run."""

    def __init__(self, world_size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self._processes = []
        self._pipes: list[Connection] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()  # so that ours says so when the process has ended
            self._processes.append(process)
            self._pipes.append(ours)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[tuple[str, Any]]:
        for pipe in self._pipes:
            pipe.send((function, arguments))
        outcomes: dict[int, tuple[str, Any]] = {}
        deadline = time.monotonic() + _SECONDS
        while len(outcomes) < len(self._pipes):
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in outcomes}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                outcomes |= dict.fromkeys(waiting.values(), ("lost", "it gave no result in time"))
            for pipe in ready:
                rank = waiting[pipe]
                outcomes[rank] = self._outcome(rank)
                if outcomes[rank][0] != "result":  # which may leave the others in a collective for ever
                    deadline = min(deadline, time.monotonic() + 5.0)
        return [outcomes[rank] for rank in range(len(self._pipes))]

    def _outcome(self, rank: int) -> tuple[str, Any]:
        try:
            kind, value = self._pipes[rank].recv()
        except (EOFError, ConnectionError):
            self._processes[rank].join(timeout=5)
            return "died", f"it ended with code {self._processes[rank].exitcode} and no result"
        return kind, value

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # TorchRec's advice to its own developers, many lines from every rank, would bury a failure.
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return  # the test run is over
        try:
            outcome = ("result", function(rank, *arguments))
        except BaseException:
            outcome = ("error", traceback.format_exc())
        pipe.send(outcome)
