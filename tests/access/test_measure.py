"""Profiles measured from batches: against counting in plain Python, for every kind of batch that TorchRec makes."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.types import DataType

from torchrec_slipstream.access import AccessProfile, tally
from torchrec_slipstream.access.tally import Tally
from torchrec_slipstream.errors import ProfileError


def bag_config(name: str, rows: int, features: list[str], dim: int = 8, **more: object) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=features, **more)


def make_batch(bags: dict[str, list[list[int]]], dtype: torch.dtype = torch.int64, **more: object) -> KeyedJaggedTensor:
    """A batch from each feature's bags; all features have as many."""
    values = [row for one in bags.values() for bag in one for row in bag]
    lengths = [len(bag) for one in bags.values() for bag in one]
    return KeyedJaggedTensor(
        keys=list(bags), values=torch.tensor(values, dtype=dtype), lengths=torch.tensor(lengths, dtype=dtype), **more
    )


BAGS: dict[str, list[list[int]]] = {"f": [[1, 1, 3], [], [0]], "g": [[2], [2], [2, 2]], "h": [[], [], []]}
TABLES = [bag_config("a", 5, ["f"]), bag_config("b", 4, ["g", "h"], dim=16)]


@dataclass
class Batch:
    sparse_features: KeyedJaggedTensor


@given(
    data=st.data(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    every=st.integers(1, 3),
    steps=st.none() | st.integers(0, 6),
    size=st.integers(1, 3),
)
def test_against_plain_counting(
    data: st.DataObject, dtype: torch.dtype, every: int, steps: int | None, size: int
) -> None:
    """Two features share a table; a third has its own."""
    bag = st.lists(st.integers(0, 5), max_size=4)
    bags = st.fixed_dictionaries(dict.fromkeys("fgh", st.lists(bag, min_size=size, max_size=size)))
    made = data.draw(st.lists(bags, max_size=5))
    configs = [bag_config("shared", 6, ["f", "g"]), bag_config("own", 6, ["h"])]
    counted = made[:steps:every]
    batches = (make_batch(one, dtype) for one in made)
    if not any(bag for one in counted for feature in one.values() for bag in feature):
        with pytest.raises(ProfileError, match="gave no look-up of 'shared', 'own'"):
            AccessProfile.measure(batches, configs, every=every, steps=steps)
        return
    profile = AccessProfile.measure(batches, configs, every=every, steps=steps)
    for name, features in (("shared", "fg"), ("own", "h")):
        expected = Counter(row for one in counted for feature in features for bag in one[feature] for row in bag)
        assert profile[name].counts.tolist() == [every * expected[row] for row in range(6)]
        assert profile[name].lookups == every * expected.total()
    assert profile.samples == every * size * len(counted)
    assert profile.sampled_every == every


def test_sizes_come_from_the_tables() -> None:
    configs = [
        bag_config("a", 5, ["f"], data_type=DataType.FP16),
        EmbeddingConfig(name="b", num_embeddings=4, embedding_dim=16, feature_names=["g", "h"]),
    ]
    profile = AccessProfile.measure([make_batch(BAGS)], configs, optimizer="adam")
    assert (profile["a"].element_size, profile["a"].optimizer_bytes, profile["a"].row_bytes) == (2, 64, 80)
    assert (profile["b"].element_size, profile["b"].optimizer_bytes, profile["b"].row_bytes) == (4, 128, 192)
    assert profile.pooling_factor("b") == pytest.approx(4 / 3)


class Model(nn.Module):
    """Bags and sequences, below one another, on the meta device."""

    def __init__(self, second: str = "b") -> None:
        super().__init__()
        meta = torch.device("meta")
        self.bags = EmbeddingBagCollection(tables=[bag_config("a", 5, ["f"])], device=meta)
        sequence = EmbeddingConfig(name=second, num_embeddings=4, embedding_dim=16, feature_names=["g", "h"])
        self.inner = nn.ModuleDict({"deep": EmbeddingCollection(tables=[sequence], device=meta)})
        self.again = self.bags


def test_a_model_tells_its_tables() -> None:
    profile = AccessProfile.measure([make_batch(BAGS)], Model())
    assert profile == AccessProfile.measure([make_batch(BAGS)], TABLES)
    assert profile["a"].counts.tolist() == [1, 2, 0, 1, 0]
    assert profile["b"].counts.tolist() == [0, 0, 4, 0]


def test_weights_empty_batches_and_other_batches() -> None:
    plain = AccessProfile.measure([make_batch(BAGS)], TABLES)
    weighted = make_batch(BAGS, weights=torch.zeros(8))
    assert AccessProfile.measure([weighted], TABLES) == plain
    assert AccessProfile.measure([Batch(weighted)], TABLES) == plain
    took = AccessProfile.measure([(1, weighted)], TABLES, sparse_features=lambda batch: batch[1])
    assert took == plain
    empty = make_batch({key: [[], []] for key in BAGS})
    with_empty = AccessProfile.measure(iter([empty, weighted]), TABLES)
    assert (with_empty.samples, with_empty.lookups) == (5, plain.lookups)


def test_no_look_up_at_all_is_refused() -> None:
    empty = make_batch({key: [[], []] for key in BAGS})
    with pytest.raises(ProfileError, match=r"the list gave no look-up of 'a', 'b' \(in 4 samples\); give batches that"):
        AccessProfile.measure([empty, empty], TABLES)
    with pytest.raises(ProfileError, match=r"the list gave no look-up of 'a', 'b' \(in 0 samples\)"):
        AccessProfile.measure([], TABLES)
    read = iter([make_batch(BAGS)])
    assert AccessProfile.measure(read, TABLES).lookups
    with pytest.raises(
        ProfileError, match=r"the list_iterator gave no look-up .* no iterator that was read to its end$"
    ):
        AccessProfile.measure(read, TABLES)
    one_empty = AccessProfile.measure([make_batch(BAGS | {"f": [[], [], []]})], TABLES)
    assert (one_empty["a"].lookups, one_empty["b"].lookups) == (0, 4)


def test_variable_batch_sizes() -> None:
    """Feature f has 2 distinct bags for 4 samples, g has 3: what is looked up is what is counted."""
    batch = KeyedJaggedTensor(
        keys=["f", "g"],
        values=torch.tensor([1, 1, 3, 0, 2, 2]),
        lengths=torch.tensor([2, 1, 1, 0, 2]),
        stride_per_key_per_rank=[[2], [3]],
        inverse_indices=(["f", "g"], torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])),
    )
    profile = AccessProfile.measure([batch], [bag_config("a", 5, ["f"]), bag_config("b", 4, ["g"])])
    assert profile["a"].counts.tolist() == [0, 2, 0, 1, 0]
    assert profile["b"].counts.tolist() == [1, 0, 2, 0]
    assert profile.samples == 4
    by_hand = KeyedJaggedTensor(
        keys=["f", "g"],
        values=torch.tensor([1, 1, 3, 0, 2, 2]),
        lengths=torch.tensor([2, 1, 1, 0, 2]),
        stride_per_key_per_rank=[[2], [3]],
    )
    assert AccessProfile.measure([by_hand], TABLES[:1]).samples == 3


def test_batches_are_read_as_far_as_needed_and_not_kept() -> None:
    alive: list[weakref.ref] = []

    def batches() -> Iterator[KeyedJaggedTensor]:
        for number in range(100):
            gc.collect()
            assert sum(one() is not None for one in alive) <= 1
            batch = make_batch(BAGS)
            alive.append(weakref.ref(batch))
            yield batch
            assert number < 7, "read on after the last step"

    stream = batches()
    assert AccessProfile.measure(stream, TABLES, steps=7, progress=True).samples == 21
    assert len(alive) == 7


@pytest.mark.parametrize(
    ("batches", "tables", "more", "said"),
    [
        ([{"f": [[1]]}], TABLES, {}, "batch 0 lacks feature 'g' of table 'b'; it has 'f'"),
        (
            [BAGS, BAGS | {"g": [[4], [], []]}],
            TABLES,
            {},
            "batch 1, feature 'g': id 4 is not a row of table 'b', .* 4 rows",
        ),
        (
            [BAGS | {"f": [[-1], [], []]}],
            TABLES,
            {},
            "batch 0, feature 'f': id -1 is not a row of table 'a', .* 5 rows",
        ),
        ([], [TABLES[0], bag_config("a", 9, ["x"])], {}, "two tables are called 'a'; .* rename one"),
        ([], [], {}, "there are no tables to count"),
        ([], ["a"], {}, "a table is a str; give EmbeddingBagConfigs"),
        ([], nn.Linear(1, 1), {}, "Linear contains no EmbeddingBagCollection .* before it is sharded"),
        ([], Model(second="a"), {}, "two tables are called 'a'"),
        ([], TABLES, {"every": 0}, "every=0; give an integer of at least 1"),
        ([], TABLES, {"steps": -1}, "steps=-1; give an integer of at least 0"),
        ([], TABLES, {"optimizer": "adamw"}, "optimizer 'adamw' is not known; give one of sgd"),
    ],
)
def test_bad_values(batches: list[dict], tables: list, more: dict, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        AccessProfile.measure([make_batch(one) for one in batches], tables, **more)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[KeyedJaggedTensor]:
        return iter([make_batch(BAGS)] * 4)


def test_a_data_loader_of_a_stream_has_no_length() -> None:
    loader = DataLoader(Stream(), batch_size=None)
    assert AccessProfile.measure(loader, TABLES) == AccessProfile.measure(iter([make_batch(BAGS)] * 4), TABLES)
    assert AccessProfile.measure(loader, TABLES, steps=2) == AccessProfile.measure([make_batch(BAGS)] * 2, TABLES)


def test_batches_that_are_none() -> None:
    with pytest.raises(ProfileError, match=r"batch 0 is a Tensor; give KeyedJaggedTensors, .*sparse_features=\.\.\."):
        AccessProfile.measure([torch.zeros(3)], TABLES)
    floats = KeyedJaggedTensor(keys=["f"], values=torch.tensor([1.0]), lengths=torch.tensor([1]))
    with pytest.raises(ProfileError, match=r"batch 0: the ids are torch.float32; give int32 or int64"):
        AccessProfile.measure([floats], TABLES[:1])


# --- the tally --------------------------------------------------------------------------------------------------------


@given(
    parts=st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=8),
    rows=st.sampled_from([None, 41, 300]),
    dense_rows=st.sampled_from([0, 1 << 24]),
    pending=st.sampled_from([1, 10, 1000]),
    scale=st.integers(1, 3),
)
def test_tally(parts: list[list[int]], rows: int | None, dense_rows: int, pending: int, scale: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally, "_DENSE_ROWS", dense_rows)
        patch.setattr(tally, "_PENDING", pending)
        one = Tally(rows)
        for part in parts:
            one.add(np.array(part, dtype=np.int64))
        number, counts, ids = one.finish(scale)
    expected = Counter(row for part in parts for row in part)
    assert number == (rows if rows is not None else max(expected, default=0) + 1)
    found = dict(zip((range(number) if ids is None else ids.tolist()), counts.tolist(), strict=True))
    assert {row: count for row, count in found.items() if count} == {row: scale * n for row, n in expected.items()}
    assert counts.dtype == np.int32


def test_tally_grows_beyond_int32() -> None:
    one = Tally(3)
    assert one._dense is not None
    one._dense[1] = 2**31 - 3
    one._bound = 2**31 - 3
    one.add(np.array([1, 1]))
    assert one.finish()[1].dtype == np.int32
    one.add(np.array([1, 0]))
    assert one.finish()[1].tolist() == [1, 2**31, 0]
    assert Tally(3).finish(scale=5)[1].dtype == np.int32
    small = Tally(1)
    small.add(np.zeros(3, np.int32))
    assert small.finish(scale=2**30)[1].tolist() == [3 * 2**30]


def test_a_profile_learns_from_its_halves_where_it_knows_them() -> None:
    made = [[[0, 1], [2]], [[0], [0]], [[0, 2], [1]], [[0], []]]
    config = [EmbeddingBagConfig(name="t", num_embeddings=4, embedding_dim=4, feature_names=["f"])]
    batches = [
        KeyedJaggedTensor.from_lengths_sync(
            ["f"], torch.tensor([i for bag in one for i in bag]), torch.tensor([len(bag) for bag in one])
        )
        for one in made
    ]
    halves = [AccessProfile.measure(iter(batches[:2]), config), AccessProfile.measure(iter(batches[2:]), config)]
    learnt = halves[0].followed_by(halves[1])
    assert learnt["t"].recurrence is not None
    assert AccessProfile.measure(batches, config) == learnt, "a list has a length"
    assert AccessProfile.measure(iter(batches), config, steps=4) == learnt
    assert AccessProfile.measure(iter(batches), config) == halves[0].merge(halves[1]), "a stream of unknown length"
    assert AccessProfile.measure(iter(batches), config, steps=8)["t"].recurrence is None, "a stream that ended early"
    # 3 batches and 1: the halves may differ, and what followed is taken per sample.
    uneven = AccessProfile.measure(iter(batches), config, steps=6)["t"].recurrence
    assert uneven is not None
    assert (uneven.earlier_samples, uneven.later_samples) == (6, 2)
    assert AccessProfile.measure(iter([*batches, *batches[:2]]), config, steps=10)["t"].recurrence is None, "5 and 1"
