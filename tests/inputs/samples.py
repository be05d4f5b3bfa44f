"""Batches whose samples can be told apart, and a plain-Python view of any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def numbered(ids: Sequence[int], *, keys: int = 2, longest: int = 2) -> Batch:
    """A batch of samples: number i is its dense feature; bag k has the look-ups i * keys + k, (i + k) % (longest + 1)
    times; the label is i % 2. With ``longest`` 0 there is one look-up a bag."""
    lengths = [(i + k) % (longest + 1) if longest else 1 for k in range(keys) for i in ids]
    bags = [i * keys + k for k in range(keys) for i in ids]
    values = torch.tensor(bags, dtype=torch.int64).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    return Batch(
        dense_features=torch.tensor(ids, dtype=torch.float32).view(-1, 1),
        sparse_features=KeyedJaggedTensor(
            keys=[f"f{k}" for k in range(keys)],
            values=values,
            lengths=torch.tensor(lengths, dtype=torch.int32),
            stride=len(ids),
        ),
        labels=torch.tensor([i % 2 for i in ids], dtype=torch.float32),
    )


def ids_of(batch: Any) -> list[int]:
    """The numbers of the samples, each checked to be whole: all its parts are its own."""
    ids = [int(i) for i in batch.dense_features.view(-1).tolist()]
    keys = len(batch.sparse_features.keys())
    bags = as_python(batch)["sparse_features"]
    for place, i in enumerate(ids):
        assert float(batch.labels[place]) == i % 2
        for k, key in enumerate(batch.sparse_features.keys()):
            assert set(bags[key][place][0]) <= {i * keys + k}
    return ids


def as_python(batch: Any) -> dict[str, Any]:
    """Every field by sample, KJTs by key and sample as (ids, weights), by a loop over bags."""
    return {one.name: _as_python(getattr(batch, one.name)) for one in fields(batch)}


def _as_python(value: Tensor | KeyedJaggedTensor | None) -> Any:
    if not isinstance(value, KeyedJaggedTensor):
        return value.tolist() if value is not None else None
    lengths, values = value.lengths().tolist(), value.values().tolist()
    weights = value.weights_or_none()
    plain = weights.tolist() if weights is not None else None
    found: dict[str, list[tuple[list[int], list[float] | None]]] = {key: [] for key in list(value.keys())}
    begin = 0
    for bag, length in enumerate(lengths):
        of = slice(begin, begin + length)
        found[value.keys()[bag // value.stride()]].append((values[of], plain[of] if plain is not None else None))
        begin += length
    assert begin == len(values)
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two batches are of one type and equal bit for bit, dtypes and keys included."""
    return type(one) is type(other) and all(
        _same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
    )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, KeyedJaggedTensor):
        parts = [(k.values(), k.lengths(), k.weights_or_none()) for k in (one, other)]
        return one.keys() == other.keys() and one.stride() == other.stride() and all(map(_same, *parts))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one is None and other is None
