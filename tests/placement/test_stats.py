"""What a plan prints."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from tests.placement.planning import SHARDERS, model_of, planner_of, profile_of, topology_of
from torchrec_slipstream.placement.stats import boxed


def test_the_plan_is_logged_below_torchrecs(caplog: pytest.LogCaptureFixture) -> None:
    counts = [np.full(10, 100), np.repeat([50, 0], [20, 980])]
    planner = planner_of(profile_of(counts, [16, 64]), topology_of(1), hbm_budget=10 * 68 + 10 * 272, batch_size=64)
    # The examples, which other tests run, silence TorchRec's logger.
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, logger="torchrec"):
        planner.plan(model_of([10, 1000], [16, 64]), SHARDERS)
    text = caplog.text
    assert text.index("Planner Statistics") < text.index("--- Row Placement ---")
    assert planner.placement is not None
    lines = boxed(planner.placement)
    assert all(line in text for line in lines)
    assert len({len(line) for line in lines[1:]}) == 1, "the box is straight"
    (row,) = [line for line in lines if "bags.t1" in line]
    assert row.split()[1:] == (
        ["bags.t1", "fused_uvm_caching", "table_wise", "1,000", "10", "1.0%", "50.0%", "15.4", "KiB", "250", "KiB", "#"]
    )
    assert any("75.00% of look-ups" in line for line in lines)


def test_a_cpu_plan_says_that_nothing_is_hot() -> None:
    planner = planner_of(profile_of([np.ones(10)], [16]), topology_of(2, device="cpu"), batch_size=64)
    planner.plan(model_of([10], [16]), SHARDERS)
    assert planner.placement is not None
    text = "\n".join(boxed(planner.placement))
    assert "2 device(s) without HBM: nothing is hot" in text
