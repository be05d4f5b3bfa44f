"""How long one TBE takes in a training step: forwards, and backwards with all that the update filter does in them.

On a CPU by the clock. On a GPU by events on the stream, which nothing waits for until somebody asks: they see the
kernels, and also the gaps where the device has to wait for a host that is not ahead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Span:
    """From its start to its last stop, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began: float | torch.cuda.Event | None = None
        self._ended: float | torch.cuda.Event | None = None

    def start(self) -> None:
        self._began = _now(self._device)

    def stop(self) -> None:
        self._ended = _now(self._device)

    @property
    def is_over(self) -> bool:
        """Whether it was started and stopped."""
        return self._began is not None and self._ended is not None

    def seconds(self) -> float:
        """Waits for the device; 0 unless it is over."""
        if isinstance(self._began, torch.cuda.Event) and isinstance(self._ended, torch.cuda.Event):
            self._ended.synchronize()
            return self._began.elapsed_time(self._ended) / 1e3
        if isinstance(self._began, float) and isinstance(self._ended, float):
            return self._ended - self._began
        return 0.0


class Stopwatch:
    """Times the forwards and backwards that one TBE runs while it is the filter's ``stopwatch``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._forwards: list[Span] = []
        self._backwards: list[Span] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Its body is a forward."""
        span = Span(self._device)
        self._forwards.append(span)
        span.start()
        yield
        span.stop()

    def backward(self) -> Span:
        """The span of the backward of the forward just run, for the caller to start and stop."""
        self._backwards.append(Span(self._device))
        return self._backwards[-1]

    def seconds(self) -> float | None:
        """All forwards and backwards together; None where no backward ran. Waits for the device."""
        if not any(span.is_over for span in self._backwards):
            return None
        return sum(span.seconds() for span in [*self._forwards, *self._backwards])


def _now(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
