"""Two gloo ranks count what one process counts, however the tables are sharded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torchrec import KeyedJaggedTensor

from tests.distributed.ranks import run_ranks
from tests.models import ROWS, TwoCollections, batches_for, sharded
from torchrec_slipstream import AccessConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.access import AccessProfile

pytestmark = pytest.mark.slow  # every test starts processes

SHARDINGS = ["table_wise", "row_wise", "column_wise"]
STEPS, SIZE = 30, 8


def attach(sharding: str, **access: Any) -> tuple[torch.nn.Module, Slipstream]:
    model = sharded(TwoCollections(), sharding)
    config = SlipstreamConfig(staleness=StalenessConfig(target_share=0.0), access=AccessConfig(**access))
    return model, Slipstream(model, config)


def _count(rank: int, sharding: str, ranks: list[list[int]], access: dict[str, Any], dst: int | None) -> Any:
    """The profile of training on the batches of the ranks ``ranks[rank]``, all within one step."""
    model, session = attach(sharding, **access)
    for batches in zip(
        *(batches_for(TwoCollections(), steps=STEPS, size=SIZE, rank=r) for r in ranks[rank]), strict=True
    ):
        for batch in batches:
            model(*batch).square().sum().backward()
        session.step()
    return session.access_profile(dst=dst)


def true_counts(ranks: int) -> dict[str, torch.Tensor]:
    counts = {f"{kind}{table}": torch.zeros(rows).long() for kind in "bs" for table, rows in enumerate(ROWS)}
    for rank in range(ranks):
        for batch in batches_for(TwoCollections(), steps=STEPS, size=SIZE, rank=rank):
            for jagged in batch:
                _add(counts, jagged)
    return counts


def _add(counts: dict[str, torch.Tensor], jagged: KeyedJaggedTensor) -> None:
    for key in jagged.keys():  # noqa: SIM118  # not a dict
        values = jagged[key].values()
        counts[key[1:]] += torch.bincount(values, minlength=counts[key[1:]].numel())


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("counter", ["exact", "sketch"])
def test_two_ranks_count_exactly(sharding: str, counter: str) -> None:
    """Column shards see the same look-ups, which count once; both ranks get all tables, whole."""
    first, second = run_ranks(2, _count, sharding, [[0], [1]], {"counter": counter, "every": 1}, None)
    assert first == second
    true = true_counts(2)
    assert set(first) == set(true)
    for name, counts in true.items():
        table = first[name]
        assert table.counts_of(0, table.rows).tolist() == counts.tolist()
        assert (table.rows, table.embedding_dim, table.row_bytes) == (len(counts), 8, 4 * 8 + 4)
        assert table.lookups == int(counts.sum())
        assert (table.ids is None) == (counter == "exact")
    assert first.samples == 2 * STEPS * SIZE


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(
    "access",
    [
        {"counter": "sampled", "every": 4, "half_life": 7},
        {"counter": "sketch", "every": 2, "half_life": 11},
        {"counter": "exact", "half_life": 4, "sketch_tables": ("b0", "s1")},
    ],
)
def test_two_ranks_equal_one_process_with_decay(sharding: str, access: dict[str, Any]) -> None:
    """The same steps are drawn, and the same rows' odd counts rounded up."""
    first, nothing = run_ranks(2, _count, sharding, [[0], [1]], access, 0)
    assert nothing is None
    (alone,) = run_ranks(1, _count, "table_wise", [[0, 1]], access, None)
    assert isinstance(alone, AccessProfile)
    assert first == alone
    assert alone.lookups > 0


def _resume(rank: int, sharding: str, access: dict[str, Any]) -> list[AccessProfile]:
    """The profiles of an uninterrupted run and of one resumed from its state in the middle."""

    def run(model: torch.nn.Module, session: Slipstream, of: range) -> None:
        for step, batch in enumerate(batches_for(TwoCollections(), steps=STEPS, rank=rank)):
            if step in of:
                model(*batch).square().sum().backward()
                session.step()

    whole, uninterrupted = attach(sharding, **access)
    run(whole, uninterrupted, range(STEPS))
    model, session = attach(sharding, **access)
    run(model, session, range(13))
    state = copy.deepcopy(session.state_dict())
    other, resumed = attach(sharding, **access)
    resumed.load_state_dict(state)
    run(other, resumed, range(13, STEPS))
    return [uninterrupted.access_profile(), resumed.access_profile()]


@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_resumed_counts_on_two_ranks(sharding: str) -> None:
    access = {"counter": "sampled", "every": 3, "half_life": 5, "sketch_tables": ("b0", "s1")}
    for profiles in run_ranks(2, _resume, sharding, access):
        assert profiles[0] == profiles[1]
        assert profiles[0].lookups > 0
