"""Selecting and joining samples, against loops in plain Python."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.inputs.samples import as_python, numbered, same
from torchrec_slipstream import InputError, StateError, WeightedBatch
from torchrec_slipstream.inputs.batches import concat, labels_of, select, size_of, with_weights
from torchrec_slipstream.inputs.packing import from_bytes, pack, to_bytes, unpack
from torchrec_slipstream.inputs.queues import Lane


@dataclass
class Sequences:
    """A batch of a user's own: two KJTs, labels of two tasks, and a field that is not always there."""

    sparse_features: KeyedJaggedTensor
    history: KeyedJaggedTensor
    labels: Tensor
    dense: Tensor | None = None


@dataclass
class TwoKjts:
    one: KeyedJaggedTensor
    other: KeyedJaggedTensor


@dataclass
class OneTensor:
    x: Tensor


@st.composite
def kjts(draw: st.DrawFn, size: int, keys: int, values: torch.dtype, lengths: torch.dtype, weight: Any) -> Any:
    single = draw(st.booleans())
    bag = st.just(1) if single else st.integers(0, 3)
    long = torch.tensor(draw(st.lists(bag, min_size=keys * size, max_size=keys * size)), dtype=lengths)
    count = int(long.sum())
    ids = torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(count + size)).to(values)
    weights = (torch.arange(count) / 8).to(weight) if weight is not None else None
    names = [f"k{i}" for i in range(keys)]
    return KeyedJaggedTensor(keys=names, values=ids, weights=weights, lengths=long, stride=size)


@st.composite
def some_batches(draw: st.DrawFn, *, most: int = 3, least_size: int = 0) -> list[Sequences]:
    """Batches of one make: keys, dtypes and weights are the same in all."""
    integers = st.sampled_from([torch.int32, torch.int64])
    makes = [
        {
            "keys": draw(st.integers(1, 3)),
            "values": draw(integers),
            "lengths": draw(integers),
            "weight": draw(st.sampled_from([None, torch.float32, torch.float64])),
        }
        for _ in range(2)
    ]
    dense = draw(st.sampled_from([None, torch.float32, torch.float16]))
    found = []
    for number in range(draw(st.integers(1, most))):
        size = draw(st.integers(least_size, 6))
        features, history = (draw(kjts(size, **make)) for make in makes)
        labels = torch.arange(2 * size).view(size, 2) + 100 * number
        found.append(Sequences(features, history, labels, labels[:, :1].to(dense) if dense is not None else None))
    return found


def picked(plain: dict[str, Any], samples: list[int]) -> dict[str, Any]:
    def pick(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pick(bags) for key, bags in value.items()}
        return [value[i] for i in samples] if value is not None else None

    return {name: pick(value) for name, value in plain.items()}


def end_to_end(plains: list[dict[str, Any]]) -> dict[str, Any]:
    def join(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: join([value[key] for value in values]) for key in values[0]}
        return [one for value in values for one in value] if values[0] is not None else None

    return {name: join([plain[name] for plain in plains]) for name in plains[0]}


def consistent(batch: Sequences) -> bool:
    """What a KJT has cached is what one made anew from its lengths finds."""
    for kjt in (batch.sparse_features, batch.history):
        fresh = KeyedJaggedTensor(
            keys=kjt.keys(), values=kjt.values(), lengths=kjt.lengths().clone(), stride=kjt.stride()
        )
        assert kjt.length_per_key() == fresh.length_per_key()
        assert kjt.offset_per_key() == fresh.offset_per_key()
        assert torch.equal(kjt.offsets(), fresh.offsets())
    return True


@given(some_batches(most=1), st.data())
def test_select_takes_these_samples_in_this_order(batches: list[Sequences], data: st.DataObject) -> None:
    (batch,) = batches
    size = size_of(batch)
    samples = data.draw(st.lists(st.integers(0, size - 1), max_size=8)) if size else []
    chosen = select(batch, torch.tensor(samples, dtype=torch.int64))
    assert type(chosen) is Sequences
    assert size_of(chosen) == len(samples)
    assert as_python(chosen) == picked(as_python(batch), samples)
    assert dtypes(chosen) == dtypes(batch)
    assert consistent(chosen)
    assert same(select(batch, torch.arange(size)), batch)


@given(some_batches())
def test_concat_puts_samples_end_to_end(batches: list[Sequences]) -> None:
    whole = concat(batches)
    assert as_python(whole) == end_to_end([as_python(batch) for batch in batches])
    assert dtypes(whole) == dtypes(batches[0])
    assert consistent(whole)


@given(some_batches(least_size=1), st.data())
def test_a_lane_gives_every_sample_back_once_in_order(batches: list[Sequences], data: st.DataObject) -> None:
    lane = Lane()
    for batch in batches:
        lane.add(batch)
    want = end_to_end([as_python(batch) for batch in batches])
    assert as_python(lane.all()) == want
    first, last = [], []
    while lane.samples:
        samples = data.draw(st.integers(1, lane.samples))
        if data.draw(st.booleans()):
            first.append(lane.take(samples))
            assert size_of(first[-1]) == samples
        else:
            last.append(lane.take_last(samples))
            assert size_of(last[-1]) == samples
    assert lane.all() is None
    assert as_python(concat(first + last[::-1])) == want


@given(some_batches(most=1))
def test_a_batch_survives_a_file_and_the_wire(batches: list[Sequences]) -> None:
    (batch,) = batches
    file = io.BytesIO()
    torch.save(pack(batch), file)
    file.seek(0)
    assert same(unpack(torch.load(file, weights_only=True)), batch)
    assert same(from_bytes(to_bytes(batch)), batch)


def dtypes(batch: Sequences) -> list[torch.dtype | None]:
    kjts = [(kjt.values(), kjt.lengths(), kjt.weights_or_none()) for kjt in (batch.sparse_features, batch.history)]
    return [one.dtype if one is not None else None for one in (*kjts[0], *kjts[1], batch.labels, batch.dense)]


def test_a_packed_view_is_as_small_as_its_samples() -> None:
    content = to_bytes(OneTensor(torch.zeros(100_000)[:2]))
    assert content.numel() < 10_000


def test_single_lookups_need_not_be_counted_again() -> None:
    batch = numbered(range(5), longest=0)
    for one in (select(batch, torch.tensor([3, 1])), concat([batch, batch])):
        kjt, n = one.sparse_features, size_of(one)
        assert (kjt._length_per_key, kjt._offset_per_key) == ([n, n], [0, n, 2 * n])  # what else would be waited for
        assert kjt.lengths().dtype == torch.int32


def test_weighted_batches_move_as_one() -> None:
    batch = numbered(range(4))
    weighted = with_weights(batch, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert type(weighted) is WeightedBatch
    assert weighted.sparse_features is batch.sparse_features
    moved = weighted.to(torch.device("cpu"), non_blocking=True)
    assert same(moved, weighted)
    assert weighted.to(torch.device("meta")).weights.is_meta
    chosen = select(weighted, torch.tensor([2, 0]))
    assert type(chosen) is WeightedBatch
    assert chosen.weights.tolist() == [3.0, 1.0]
    assert concat([chosen, weighted]).weights.tolist() == [3.0, 1.0, 1.0, 2.0, 3.0, 4.0]


def test_a_dataclass_with_its_own_weights_gets_them_there() -> None:
    @dataclass
    class Mine:
        x: Tensor
        weights: Tensor | None = None

    assert with_weights(Mine(torch.zeros(2)), torch.ones(2)).weights.tolist() == [1.0, 1.0]
    own = Mine(torch.zeros(2), torch.tensor([3.0, 5.0]))
    assert with_weights(own, torch.tensor([2.0, 0.5])).weights.tolist() == [6.0, 2.5]
    of_tasks = Mine(torch.zeros(2), torch.tensor([[3.0, 1.0], [5.0, 0.0]]))
    assert with_weights(of_tasks, torch.tensor([2.0, 0.5])).weights.tolist() == [[6.0, 2.0], [2.5, 0.0]]
    twice = with_weights(with_weights(numbered([0, 1]), torch.tensor([3.0, 5.0])), torch.tensor([2.0, 0.5]))
    assert type(twice) is WeightedBatch
    assert twice.weights.tolist() == [6.0, 2.5]
    with pytest.raises(InputError, match="OneTensor has no place for it"):
        with_weights(OneTensor(torch.zeros(2)), torch.ones(2))
    with pytest.raises(StateError, match="cannot be saved; define its class at the top level"):
        pack(Mine(torch.zeros(2)))
    with pytest.raises(StateError, match="no_such_module:Batch, which this program has not imported"):
        unpack({"class": "no_such_module:Batch", "fields": {}})


def test_what_cannot_be_cut_is_named() -> None:
    kjt = numbered([1, 2]).sparse_features
    variable = KeyedJaggedTensor(
        keys=["a", "b"], values=torch.arange(3), lengths=torch.ones(3, dtype=torch.int64),
        stride_per_key_per_rank=[[1], [2]],
    )  # fmt: skip
    for batch, message in (
        ([torch.zeros(2)], "the loader gave a list"),
        (OneTensor(torch.tensor(1.0)), "'x' is a tensor without dimensions"),
        (OneTensor("two"), "'x' is str"),
        (OneTensor(None), "OneTensor has no field that is not None"),
        (TwoKjts(kjt, variable), "'other' has another number of bags for each key"),
        (Batch(torch.zeros(3, 1), kjt, torch.zeros(2)), "different numbers of samples: {'dense_features': 3, "),
    ):
        with pytest.raises(InputError, match=message):
            size_of(batch)
    with pytest.raises(InputError, match="'sparse_features' differ in their keys"):
        concat([numbered([1]), numbered([2], keys=3)])
    with pytest.raises(InputError, match="'x' is of different types"):
        concat([OneTensor(torch.zeros(1)), OneTensor(numbered([1]).sparse_features)])


def test_labels_are_found() -> None:
    batch = numbered([1, 2])
    assert labels_of(batch) is batch.labels
    assert labels_of(OneTensor(torch.zeros(1))) is None
