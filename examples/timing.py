"""Where a training step's time goes, seen from outside of a TorchRec train pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import nn
from torchrec.datasets.utils import Batch
from torchrec.optim.keyed import KeyedOptimizer

PARTS = ("read", "forward", "backward", "optimizer", "session", "other")


class StepClock:
    """Times whole steps and their parts, in host seconds (on a GPU: launching, not running).

    `read` is making the next batch, `forward` the model's, `backward` all from there to the dense optimizer, hence
    with the tables' fused update, `session` Slipstream's own work after the step, `other` the rest: the pipeline's
    copies, the sparse input's redistribution, clearing gradients.
    """

    def __init__(self, model: nn.Module, optimizer: KeyedOptimizer) -> None:
        self.steps: list[float] = []
        self._parts: dict[str, list[float]] = {part: [] for part in PARTS}
        self._now = dict.fromkeys(PARTS, 0.0)
        self._forward_ended = 0.0
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)
        self._optimizer_step = optimizer.step
        optimizer.step = self._timed_optimizer_step

    def reading(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, timed."""
        while True:
            with self.part("read"):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of its body to a part of the current step."""
        began = time.perf_counter()
        yield
        self._now[name] += time.perf_counter() - began

    @contextmanager
    def step(self) -> Iterator[None]:
        """Its body is one training step."""
        self._now = dict.fromkeys(PARTS, 0.0)
        began = time.perf_counter()
        yield
        whole = time.perf_counter() - began
        self._now["other"] = whole - sum(self._now.values())
        self.steps.append(whole)
        for name, seconds in self._now.items():
            self._parts[name].append(seconds)

    def milliseconds(self) -> dict[str, float]:
        """Medians of the parts, and p20, median and p80 of whole steps, without the first tenth (warm-up)."""
        skip = len(self.steps) // 10
        settled = sorted(self.steps[skip:])
        return {
            "p20": 1e3 * settled[len(settled) // 5],
            "median": 1e3 * median(settled),
            "p80": 1e3 * settled[len(settled) * 4 // 5],
            **{name: 1e3 * median(times[skip:]) for name, times in self._parts.items()},
        }

    def _before_forward(self, model: nn.Module, _: Any) -> None:
        if model.training:
            self._forward_began = time.perf_counter()

    def _after_forward(self, model: nn.Module, *_: Any) -> None:
        if model.training:
            self._forward_ended = time.perf_counter()
            self._now["forward"] += self._forward_ended - self._forward_began

    def _timed_optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        self._now["backward"] += began - self._forward_ended
        with self.part("optimizer"):
            return self._optimizer_step(*args, **kwargs)
