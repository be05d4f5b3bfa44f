"""Timing a TBE's forwards and backwards, which changes nothing of what they do."""

from __future__ import annotations

import time

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode

from tests.tables import filtered, make_lookups, make_tbe, overlaid, set_live, table_states
from torchrec_slipstream.tbe.stopwatch import Span, Stopwatch
from torchrec_slipstream.tbe.update_filter import Sampling

CPU = torch.device("cpu")
ROWS, BAGS = (50, 30), (40, 40)


def test_a_span_lasts_from_its_start_to_its_last_stop() -> None:
    span = Span(CPU)
    assert (span.is_over, span.seconds()) == (False, 0.0)
    span.stop()
    assert (span.is_over, span.seconds()) == (False, 0.0), "it was never started"
    span.start()
    time.sleep(0.01)
    span.stop()
    first = span.seconds()
    time.sleep(0.01)
    span.stop()
    assert 0.01 <= first <= span.seconds() - 0.01


@pytest.mark.parametrize("pooling", [PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE])
@pytest.mark.parametrize("kind", ["live", "stale", "sampled", "inactive", "overlay"])
def test_a_step_is_timed_and_comes_out_the_same(kind: str, pooling: PoolingMode) -> None:
    """Two equal TBEs with equal filters, one of them timed."""
    dims = (8, 8)
    states, seconds = [], []
    for timed in (False, True):
        tbe = make_tbe(ROWS, dims, pooling=pooling)
        live = torch.arange(sum(ROWS)) % 3 == 0
        one = overlaid(tbe, {8: 20}) if kind == "overlay" else filtered(tbe, live | (kind == "live"))
        if kind == "overlay":
            assert one.overlay is not None
            rows = torch.arange(10)
            one.overlay.promote(one.overlay.pool_of[0], rows, rows)
            set_live(one, live)
        one.active = kind != "inactive"
        one.sampling = Sampling(0.7, 0.1) if kind == "sampled" else None
        one.stopwatch = watch = Stopwatch(CPU) if timed else None
        began = time.perf_counter()
        lookups = make_lookups(ROWS, BAGS, seed=3)
        output = lookups.run(tbe)
        generator = torch.Generator().manual_seed(5)
        output.backward(torch.rand(output.shape, generator=generator))
        whole = time.perf_counter() - began
        states.append(table_states(tbe))
        expected = {"live": 0, "inactive": 0}.get(kind)
        assert (int(one.skipped.sum()) == 0) == (expected == 0)
        assert int(one.offered.sum()) == (0 if kind == "inactive" else lookups.indices.numel())
        if watch is not None:
            found = watch.seconds()
            assert found is not None
            seconds.append(found)
            assert 0.0 < found < whole
    for stock, ours in zip(*states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(stock, ours, strict=True))


def test_only_steps_with_a_backward_have_a_time_and_all_calls_of_a_step_count() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    one = filtered(tbe, torch.arange(sum(ROWS)) % 2 == 0)
    one.stopwatch = watch = Stopwatch(CPU)
    lookups = make_lookups(ROWS, BAGS)
    with torch.no_grad():
        lookups.run(tbe)
    assert watch.seconds() is None, "evaluation is no training step"
    outputs = [lookups.run(tbe), lookups.run(tbe)]
    assert watch.seconds() is None, "no backward yet"
    outputs[0].sum().backward()
    first = watch.seconds()
    outputs[1].sum().backward()
    second = watch.seconds()
    assert first is not None
    assert second is not None
    assert 0.0 < first < second


def test_a_tbes_work_outside_of_the_watched_step_is_not_timed() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    one = filtered(tbe, torch.arange(sum(ROWS)) % 2 == 0)
    lookups = make_lookups(ROWS, BAGS)
    early = lookups.run(tbe)
    one.stopwatch = watch = Stopwatch(CPU)
    early.sum().backward()
    assert watch.seconds() is None
    watched = lookups.run(tbe)
    one.stopwatch = None
    lookups.run(tbe).sum().backward()
    assert watch.seconds() is None
    watched.sum().backward()
    assert watch.seconds() is not None, "the backward of a watched forward, whenever it comes"
