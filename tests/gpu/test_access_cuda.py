"""Counting on a GPU: the same counts as on a CPU, decayed alike, and sketches that read the look-ups on the host."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.tables import make_lookups, make_tbe
from torchrec_slipstream import AccessConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.access import AccessProfile

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "access",
    [
        {"counter": "exact"},
        {"counter": "exact", "half_life": 4, "sketch_tables": ("table_1",)},
        {"counter": "sampled", "every": 3, "half_life": 5},
        {"counter": "sketch", "every": 2, "half_life": 7},
    ],
)
def test_a_gpu_counts_as_a_cpu(access: dict[str, Any]) -> None:
    if "sketch_tables" in access or access["counter"] == "sketch":
        pytest.importorskip("datasketches")

    def profile(device: str) -> AccessProfile:
        tbe = make_tbe((50, 30), (8, 16), features=(0, 1, 1), device=device)
        config = SlipstreamConfig(staleness=StalenessConfig(target_share=0.0), access=AccessConfig(**access))
        session = Slipstream(nn.ModuleList([tbe]), config)
        for seed in range(20):
            if seed == 11:
                session.load_state_dict(session.state_dict())
            make_lookups((50, 30, 30), (9, 9, 9), seed=seed, device=device).run(tbe).sum().backward()
            session.step()
        return session.access_profile()

    on_cpu = profile("cpu")
    assert profile("cuda") == on_cpu
    assert on_cpu.lookups > 0
