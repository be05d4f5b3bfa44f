"""What one rank cannot attach to, no rank attaches to, and none waits for it."""

from __future__ import annotations

import pytest
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn

from tests.distributed.ranks import run_ranks
from tests.distributed.test_overlay import only_hot
from tests.tables import TBE, make_tbe
from torchrec_slipstream import (
    AccessConfig,
    AttachError,
    PlacementConfig,
    Slipstream,
    SlipstreamConfig,
    StalenessConfig,
)

pytestmark = pytest.mark.slow  # every test starts processes

HOT = PlacementConfig(hbm_budget="64KiB", replan_every=5)
CASES = {
    "found": "attached already",
    "signal": "signal='gain' reads",
    "writer": "writer must have add_scalar",
    "placement": "placement must be a Placement",
    "counts": "needs a sketch",
}


def _refused(rank: int, case: str) -> str:
    """The message; only rank 1 has anything to refuse."""
    bad = rank == 1
    optimizer = EmbOptimType.EXACT_SGD if bad and case == "signal" else EmbOptimType.EXACT_ROWWISE_ADAGRAD
    model = nn.ModuleDict({"t": make_tbe(optimizer=optimizer)})
    staleness = StalenessConfig(selection="duty", signal="gain" if case == "signal" else "auto")
    config = SlipstreamConfig(staleness=staleness, placement=HOT)
    more = {}
    if bad and case in ("writer", "placement"):
        more[case] = "x"
    first = Slipstream(model) if bad and case == "found" else None
    with pytest.MonkeyPatch.context() as patch:
        if bad and case == "counts":
            patch.setattr("torchrec_slipstream.session.LiveCounts", _refuse)
        with pytest.raises(AttachError) as caught:
            Slipstream(model, config, **more)
    if first is not None:
        first.detach()
    assert type(model["t"]) is TBE
    assert not model["t"]._state_dict_pre_hooks
    if case != "signal":  # and all ranks can be attached to
        Slipstream(model, only_hot(hbm_budget="64KiB", replan_every=5)).detach()
    return str(caught.value)


def _refuse(filters: object, config: AccessConfig) -> None:
    raise AttachError("a table needs a sketch, and datasketches is not installed")


@pytest.mark.parametrize("case", list(CASES))
def test_what_one_rank_refuses_all_do(case: str) -> None:
    first, second = run_ranks(2, _refused, case)
    assert first.startswith("1 other rank(s) cannot have the hot rows")
    assert "No rank is attached" in first
    assert CASES[case] in second
