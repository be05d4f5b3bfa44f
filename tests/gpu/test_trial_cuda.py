"""Trials on CUDA: times are the device's, by events, and nothing waits for them before a trial's end."""

from __future__ import annotations

import pytest
import torch

from tests.staleness.test_tracker import config
from tests.tables import Lookups, filtered, make_lookups, make_tbe
from torchrec_slipstream import Slipstream
from torchrec_slipstream.staleness.trial import TRIAL_STEPS
from torchrec_slipstream.tbe.stopwatch import Stopwatch

pytestmark = pytest.mark.gpu

ROWS, BAGS = (50, 30), (40, 40)


def test_a_step_is_timed_by_the_device() -> None:
    tbe = make_tbe(ROWS, (8, 8), device="cuda")
    one = filtered(tbe, torch.arange(sum(ROWS)) % 3 == 0)
    lookups = make_lookups(ROWS, BAGS, device="cuda")
    lookups.run(tbe).sum().backward()
    one.stopwatch = watch = Stopwatch(one.device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    output = lookups.run(tbe)
    assert watch.seconds() is None, "no backward yet"
    output.backward(torch.ones_like(output))
    end.record()
    found = watch.seconds()
    assert found is not None
    end.synchronize()
    assert 0.0 < found <= 1e-3 * begin.elapsed_time(end)


def test_a_watched_forward_does_not_wait_for_the_device() -> None:
    torch.use_deterministic_algorithms(False)  # users' kernels: the deterministic ones may wait
    tbe = make_tbe(ROWS, (8, 8), device="cuda")
    one = filtered(tbe, torch.arange(sum(ROWS)) % 3 == 0)
    lookups = make_lookups(ROWS, BAGS, device="cuda")
    lookups.run(tbe).sum().backward()  # what is set up once may wait
    one.stopwatch = Stopwatch(one.device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = lookups.run(tbe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    output.sum().backward()


def test_a_session_tries_and_reports() -> None:
    """Whatever a device finds, it finds something, and does what it found."""
    rows, dim, bags, length = 20_000, 128, 1000, 20
    tbe = make_tbe((rows,), (dim,), device="cuda")
    session = Slipstream(tbe, config(where="faster", target_share=0.8, warmup_steps=10, min_touches=1))

    def train(begin: int, end: int) -> None:
        for step in range(begin, end):
            generator = torch.Generator().manual_seed(step)
            indices = torch.randint(0, rows, (bags * length,), generator=generator).cuda()
            output = Lookups(indices, torch.arange(0, bags * length + 1, length).cuda()).run(tbe)
            output.backward(torch.randn(output.shape, generator=generator).cuda() / bags)
            session.step()

    train(0, 10 + TRIAL_STEPS)
    (found,) = session.report().payoffs
    assert 0.0 < found.stock_ms < 1e3
    assert 0.0 < found.skipping_ms < 1e3
    before = session.report().total.skipped
    train(10 + TRIAL_STEPS, 79)  # the next trial begins at step 80
    assert (session.report().total.skipped > before) == found.pays
