"""FAE's classifier against its definition, and where its hot rows come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from tests.inputs.test_rows import KEYS, SEEDS, TABLES, bags_of, is_in, random_features, random_sets
from torchrec_slipstream import AccessProfile, TableAccess
from torchrec_slipstream.access import calibrate
from torchrec_slipstream.errors import InputError, ProfileError, StateError
from torchrec_slipstream.inputs.fae import COLD, HOT, FaeSelector
from torchrec_slipstream.inputs.hot import hot_of_calibration, hot_of_placement, hot_of_profile
from torchrec_slipstream.inputs.rows import RowSets
from torchrec_slipstream.placement import Placement, ShardPlacement, TablePlacement
from torchrec_slipstream.tbe.features import ModelTable


@dataclass
class TwoFeatures:
    """A batch with two KJTs."""

    one: KeyedJaggedTensor
    two: KeyedJaggedTensor


@given(seed=SEEDS)
def test_an_input_is_hot_if_all_its_lookups_are(seed: int) -> None:
    sets, lists = random_sets(seed)
    one, two = random_features(seed, 6), random_features(seed + 1, 6)
    hot = []
    for sample in range(6):
        all_hot = True
        for features in (one, two):
            for key, of_key in zip(KEYS, bags_of(features), strict=True):
                all_hot &= key == "unknown" or all(is_in(lists, key, row) for row in of_key[sample])
        hot.append(HOT if all_hot else COLD)
    choice = FaeSelector(sets).choose(TwoFeatures(one, two))
    assert choice.lane is not None
    assert choice.lane.dtype == torch.uint8
    assert choice.lane.tolist() == hot
    assert choice.keep.tolist() == [True] * 6
    assert choice.weight is None


def test_an_input_without_lookups_is_hot() -> None:
    features = KeyedJaggedTensor(["f"], torch.tensor([1]), lengths=torch.tensor([0, 1]))
    batch = Batch(torch.zeros(2, 1), features, torch.zeros(2))
    choice = FaeSelector(RowSets(TABLES, {})).choose(batch)
    assert choice.lane is not None
    assert choice.lane.tolist() == [HOT, COLD]


def test_refuses_a_batch_without_lookups() -> None:
    with pytest.raises(InputError, match="no KeyedJaggedTensor"):
        FaeSelector(RowSets(TABLES, {})).choose(Batch(torch.zeros(2, 1), None, torch.zeros(2)))


def test_state_is_of_the_same_hot_rows() -> None:
    one, other = FaeSelector(random_sets(0)[0]), FaeSelector(random_sets(1)[0])
    one.load_state_dict(FaeSelector(random_sets(0)[0]).state_dict())
    with pytest.raises(StateError, match="other hot rows"):
        one.load_state_dict(other.state_dict())
    with pytest.raises(StateError, match="'random'"):
        one.load_state_dict({"selector": "random"})


# ---------------------------------------------------------------------------------------------- hot rows from where

MODEL = (
    ModelTable("bags.big", "big", ("a",), 5000, 16),
    ModelTable("bags.same", "same", ("b",), 40, 8),
    ModelTable("other.same", "same", ("c",), 40, 8),
    ModelTable("bags.small", "small", ("d",), 30, 8, replicated=True),
)


def a_profile(seed: int = 0, *, rows: int = 5000) -> AccessProfile:
    random = np.random.default_rng(seed)
    return AccessProfile(
        [
            TableAccess("big", rows, 16, random.zipf(1.5, rows).clip(max=10**6).astype(np.int64), optimizer_bytes=4),
            TableAccess("bags.same", 40, 8, random.integers(0, 9, 40)),
            TableAccess("other.same", 40, 8, random.integers(0, 9, 40)),
        ],
        samples=1000,
    )


def test_hot_of_a_profile_is_the_best_that_fits() -> None:
    """No cold row has more look-ups a byte than a hot one, and the budget has no room for one more."""
    profile = a_profile()
    hot = hot_of_profile(MODEL, profile, 20_000)
    worth: dict[bool, list[float]] = {True: [], False: []}
    used = 0
    for fqn, name in (("bags.big", "big"), ("bags.same", "bags.same"), ("other.same", "other.same")):
        table = profile[name]
        for is_hot, count in zip(hot.of(fqn).tolist(), table.counts.tolist(), strict=True):
            worth[is_hot].append(count / table.row_bytes)
            used += is_hot * table.row_bytes
    assert min(worth[True]) >= max(worth[False])
    assert 20_000 - 68 <= used <= 20_000
    assert hot.of("bags.small").all()  # every rank has it


def test_hot_of_a_profile_refuses() -> None:
    ambiguous = AccessProfile([a_profile()["big"], TableAccess("same", 40, 8, np.ones(40, dtype=np.int64))], 10)
    with pytest.raises(ProfileError, match=r"bags\.same: the access profile has no counts"):
        hot_of_profile(MODEL, ambiguous, 1000)
    with pytest.raises(ProfileError, match=r"bags\.big: it has 5000 rows, in the access profile 4999"):
        hot_of_profile(MODEL, a_profile(rows=4999), 1000)
    with pytest.raises(ProfileError, match="no look-ups"):
        hot_of_profile(MODEL, AccessProfile([], 0), 1000)


def test_hot_of_a_calibration_are_those_that_it_counted() -> None:
    profile = a_profile()
    calibration = calibrate(profile, "20KB", small_table=2000, chunk_rows=64)
    hot = hot_of_calibration(MODEL, calibration, profile)
    found = calibration.tables
    assert not found["big"].whole
    assert found["bags.same"].whole
    assert 0 < found["big"].exact_rows < 5000
    # `exact_rows` was counted by the histogram; the rows are told by their counts.
    assert hot.sizes() == {
        "bags.big": found["big"].exact_rows, "bags.same": 40, "other.same": 40, "bags.small": 30,
    }  # fmt: skip
    chosen = hot.of("bags.big").numpy()
    assert profile["big"].counts[chosen].min() > profile["big"].counts[~chosen].max()
    with pytest.raises(ProfileError, match="the calibration does not know it"):
        hot_of_calibration(MODEL[:1], calibrate(AccessProfile([], 1)), profile)


def test_hot_of_a_placement() -> None:
    """Row shards, one of them whole; column shards, of which a row needs both."""
    none = {"lookups": 0, "hot_lookups": 0, "hbm_bytes": 0, "host_bytes": 0, "placed_bytes": 0, "misses": 0.0}
    shards = [("bags.big", 0, 0, 3000, 16, False, [1, 2999]), ("bags.big", 3000, 0, 2000, 16, True, [])]
    shards += [("bags.same", 0, 0, 40, 4, False, [3, 5, 7]), ("bags.same", 0, 4, 40, 4, False, [5, 7, 9])]
    placement = Placement(
        tables=dict[str, TablePlacement](), hbm_budget=0, hbm_bytes=(0,), host_bytes=(0,), hbm_capacity=(0,),
        host_capacity=(0,), expected_ms=0.0,
        shards=tuple(
            ShardPlacement(
                table=fqn, rank=0, row_offset=row, col_offset=column, rows=rows, columns=columns, whole=whole,
                hot_rows=np.array(hot, dtype=np.int64), **none,
            )
            for fqn, row, column, rows, columns, whole, hot in shards
        ),
    )  # fmt: skip
    hot = hot_of_placement(MODEL, placement)
    assert hot.of("bags.big").nonzero().squeeze(1).tolist() == [1, 2999, *range(3000, 5000)]
    assert hot.of("bags.same").nonzero().squeeze(1).tolist() == [5, 7]
    assert hot.sizes()["other.same"] == 0
    assert hot.sizes()["bags.small"] == 30
    with pytest.raises(ProfileError, match=r"bags\.big"):
        hot_of_placement(MODEL[1:], placement)
