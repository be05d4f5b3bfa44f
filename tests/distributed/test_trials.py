"""Two gloo ranks try out by themselves whether leaving updates out saves time, and go on in step."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from tests.distributed.ranks import run_ranks
from tests.staleness.test_tracker import config
from tests.staleness.test_trial import WIDE, step_of, wide_step
from tests.tables import make_tbe
from torchrec_slipstream import Slipstream
from torchrec_slipstream.staleness.trial import TRIAL_STEPS

pytestmark = pytest.mark.slow  # every test starts processes


def _train(rank: int) -> dict[str, Any]:
    """Rank 0 has a table that gains, rank 1 one that is too small to."""
    name = f"of_rank_{rank}"
    rows, dim = WIDE if rank == 0 else (60, 8)
    tbe = make_tbe((rows,), (dim,), table_names=[name])
    changes: dict[str, Any] = {"target_share": 0.8, "warmup_steps": 10, "min_touches": 1, "where": "faster"}
    session = Slipstream(nn.ModuleList([tbe]), config(**changes), process_group=dist.group.WORLD)
    skipped = []
    for step in range(160):
        if rank == 0:
            wide_step(tbe, step)
        else:
            step_of(tbe, step, rows=60, bags=30, length=1)
        session.step()
        skipped.append(int(session._filters[0].skipped.sum()))
    return {"report": session.report().to_dict(), "skipped": skipped}


def test_ranks_may_find_different_things() -> None:
    first, second = run_ranks(2, _train)
    for found in (first, second):
        payoffs = found["report"]["payoffs"]
        assert [(one["rank"], one["tables"], one["pays"]) for one in payoffs] == [
            (0, ["0.of_rank_0"], True),
            (1, ["0.of_rank_1"], False),
        ]
    assert first["report"]["payoffs"] == second["report"]["payoffs"]
    assert first["report"]["tables"] == second["report"]["tables"]
    # Intervals of ten steps: the 1st, from step 10 on, begins a trial, in which the 2nd and 4th lie; the 8th the next.
    between = [(10 + TRIAL_STEPS, 80), (80 + TRIAL_STEPS, 160)]
    for begin, end in between:
        assert first["skipped"][end - 1] - first["skipped"][begin - 1] > 0.7 * 40_000 * (end - begin)
        assert second["skipped"][end - 1] == second["skipped"][begin - 1]
    assert second["skipped"][80 + TRIAL_STEPS - 1] > second["skipped"][79], "it was tried again"
