"""Batches cut and joined by samples.

A batch is TorchRec's ``Batch``, or any dataclass whose fields are tensors ``[B, ...]``, KJTs of B bags a key, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_slipstream.errors import InputError


@dataclass
class WeightedBatch(Batch):
    """TorchRec's ``Batch``, with what each sample's loss counts for.

    Multiply the loss of sample i by ``weights[i]`` and take the mean over the batch:
    ``F.binary_cross_entropy_with_logits(logits, batch.labels, weight=batch.weights)``.

    Attributes:
        weights: float32 [B].
    """

    weights: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> WeightedBatch:
        """A copy on ``device``."""
        stock = super().to(device, non_blocking)
        return WeightedBatch(**_fields(stock), weights=self.weights.to(device=device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.Stream) -> None:
        """Tell the allocator that ``stream`` uses the tensors."""
        super().record_stream(stream)
        self.weights.record_stream(stream)

    def pin_memory(self) -> WeightedBatch:
        """A copy in pinned host memory."""
        return WeightedBatch(**_fields(super().pin_memory()), weights=self.weights.pin_memory())


def size_of(batch: Any) -> int:
    """Samples in the batch.

    Raises:
        InputError: it is no dataclass, or a field is neither a tensor with a batch dimension, nor a KJT of uniform
            stride, nor None; or two fields have different sizes.
    """
    sizes: dict[str, int] = {}
    for name, value in _fields(batch).items():
        if isinstance(value, KeyedJaggedTensor):
            if value.variable_stride_per_key():
                raise InputError(
                    f"the batch's {name!r} has another number of bags for each key; samples can be dropped from KJTs "
                    "of one stride only. Deduplicate after the inputs were chosen, or use method='off'"
                )
            sizes[name] = value.stride()
        elif isinstance(value, Tensor) and value.dim() > 0:
            sizes[name] = value.shape[0]
        elif value is not None:
            what = "a tensor without dimensions" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"the batch's {name!r} is {what}; give tensors [B, ...], KeyedJaggedTensors or None, so that samples "
                "can be told apart"
            )
    if not sizes:
        raise InputError(f"the batch's {type(batch).__name__} has no field that is not None; give it its samples")
    if len(set(sizes.values())) > 1:
        raise InputError(f"the batch's fields have different numbers of samples: {sizes}; give all of them the same")
    return next(iter(sizes.values()))


def kjts_of(batch: Any) -> list[KeyedJaggedTensor]:
    """All fields that are KJTs."""
    return [value for value in _fields(batch).values() if isinstance(value, KeyedJaggedTensor)]


def labels_of(batch: Any) -> Tensor | None:
    """The field ``labels`` [B] or [B, tasks], None where there is none."""
    labels = _fields(batch).get("labels")
    return labels if isinstance(labels, Tensor) else None


def select(batch: Any, samples: Tensor) -> Any:
    """The batch's ``samples`` (int64 [n] on the CPU; in this order, repeats allowed), as a batch of the same type."""
    return _each(batch, lambda value: _select(value, samples.to(_device(value))))


@dataclass(frozen=True)
class Piece:
    """Samples ``begin`` to ``end - 1`` of a batch."""

    batch: Any
    begin: int
    end: int

    @property
    def samples(self) -> int:
        """How many."""
        return self.end - self.begin


def concat(batches: Sequence[Any]) -> Any:
    """The samples of all batches (at least one, all of one type), in order, on the last one's device. One batch alone
    is handed back itself.

    Raises:
        InputError: their keys or fields differ.
    """
    if len(batches) == 1:
        return batches[0]
    return joined([Piece(batch, 0, size_of(batch)) for batch in batches])


def joined(pieces: Sequence[Piece]) -> Any:
    """The samples of all pieces as :func:`concat` does it, in one copy."""
    values: dict[str, Any] = {}
    columns = [_fields(piece.batch) for piece in pieces]
    for name in columns[0]:
        parts: list[Any] = [column.get(name) for column in columns]
        if len({type(part) for part in parts}) > 1:
            raise InputError(
                f"the batches' {name!r} is of different types: {[type(part).__name__ for part in parts]}; give the "
                "same in every batch"
            )
        if parts[0] is None:
            values[name] = None
            continue
        device = _device(parts[-1])
        parts = [part if _device(part) == device else part.to(device) for part in parts]
        ranges = [slice(piece.begin, piece.end) for piece in pieces]
        if isinstance(parts[0], Tensor):
            values[name] = torch.cat([part[of] for part, of in zip(parts, ranges, strict=True)])
        else:
            values[name] = _joined(name, parts, ranges)
    return replace(pieces[0].batch, **values)


def with_weights(batch: Any, weights: Tensor) -> Any:
    """The batch with ``weights`` (float32 [B]): a :class:`WeightedBatch`, or its own dataclass's ``weights`` field. A
    batch whose ``weights`` [B, ...] are not None has weights of its own, which are multiplied by these.

    Raises:
        InputError: it is neither a ``Batch`` nor has a field ``weights`` of a tensor or None.
    """
    values = _fields(batch)
    own = values.get("weights")
    if isinstance(own, Tensor):
        return replace(batch, weights=own * weights.view(-1, *[1] * (own.dim() - 1)))
    if "weights" in values and own is None:
        return replace(batch, weights=weights)
    if type(batch) is Batch:
        return WeightedBatch(**values, weights=weights)
    raise InputError(
        f"this inputs method weighs samples, and {type(batch).__name__} has no place for it; give the dataclass a "
        "field 'weights: Tensor | None = None', or set InputsConfig(weigh=False, positive_weight=1)"
    )


def device_of(batch: Any) -> torch.device:
    """Where the batch lies."""
    return next(_device(value) for value in _fields(batch).values() if value is not None)


def is_pinned(batch: Any) -> bool:
    """Whether the batch lies in pinned host memory, judged by its first field."""
    value = next(value for value in _fields(batch).values() if value is not None)
    tensor: Tensor = value.values() if isinstance(value, KeyedJaggedTensor) else value
    return torch.cuda.is_available() and not tensor.is_cuda and tensor.is_pinned()


def _fields(batch: Any) -> dict[str, Any]:
    if not is_dataclass(batch) or isinstance(batch, type):
        raise InputError(
            f"the loader gave a {type(batch).__name__}; give torchrec's Batch, or a dataclass of tensors and KJTs"
        )
    return {field.name: getattr(batch, field.name) for field in fields(batch)}


def _each(batch: Any, change: Callable[[Any], Any]) -> Any:
    return replace(batch, **{name: change(value) for name, value in _fields(batch).items() if value is not None})


def _device(value: Tensor | KeyedJaggedTensor | None) -> torch.device:
    return value.device() if isinstance(value, KeyedJaggedTensor) else value.device if value is not None else _CPU


_CPU = torch.device("cpu")


def _select(value: Tensor | KeyedJaggedTensor, samples: Tensor) -> Tensor | KeyedJaggedTensor:
    if not isinstance(value, KeyedJaggedTensor):
        return value.index_select(0, samples)
    keys, stride, count = value.keys(), value.stride(), samples.numel()
    weights = value.weights_or_none()
    if _has_single_lookups(value):
        columns = value.values().view(len(keys), stride).index_select(1, samples).view(-1)
        if weights is not None:
            weights = weights.view(len(keys), stride).index_select(1, samples).view(-1)
        return _single_lookups(value, columns, weights, count)
    first_bags = torch.arange(len(keys), device=samples.device).unsqueeze(1) * stride
    return _permuted(keys, value.values(), value.lengths(), weights, first_bags + samples, count)


def _joined(name: str, parts: list[KeyedJaggedTensor], ranges: list[slice]) -> KeyedJaggedTensor:
    keys, all_weights = parts[0].keys(), [part.weights_or_none() for part in parts]
    if any(part.keys() != keys for part in parts) or len({weights is None for weights in all_weights}) > 1:
        raise InputError(
            f"the batches' {name!r} differ in their keys or in having weights; give the same in every batch"
        )
    weights: list[Tensor] = [one for one in all_weights if one is not None]
    total = sum(of.stop - of.start for of in ranges)
    if all(map(_has_single_lookups, parts)):

        def put_together(tensors: list[Tensor]) -> Tensor:
            rectangles = [tensor.view(len(keys), -1)[:, of] for tensor, of in zip(tensors, ranges, strict=True)]
            return torch.cat(rectangles, dim=1).view(-1)

        values = put_together([part.values() for part in parts])
        return _single_lookups(parts[0], values, put_together(weights) if weights else None, total)
    # End to end the bags are in the order (part, key, sample); wanted is (key, part, sample).
    begin, bags = 0, []
    for part, of in zip(parts, ranges, strict=True):
        count = len(keys) * part.stride()
        bags.append(torch.arange(begin, begin + count, device=part.device()).view(len(keys), -1)[:, of])
        begin += count
    return _permuted(
        keys,
        torch.cat([part.values() for part in parts]),
        torch.cat([part.lengths() for part in parts]),
        torch.cat(weights) if weights else None,
        torch.cat(bags, dim=1),
        total,
    )


def _has_single_lookups(features: KeyedJaggedTensor) -> bool:
    bags = len(features.keys()) * features.stride()
    if features.values().numel() != bags:
        return False
    # On a GPU the answer would have to be waited for.
    return features.device().type == "cpu" and bags > 0 and int(features.lengths().max()) == 1


def _single_lookups(like: KeyedJaggedTensor, values: Tensor, weights: Tensor | None, stride: int) -> KeyedJaggedTensor:
    """One look-up a bag. Every cached number is known, and given, which saves TorchRec finding it on the device."""
    keys = like.keys()
    return KeyedJaggedTensor(
        keys=keys,
        values=values,
        weights=weights,
        lengths=like.lengths().new_ones(len(keys) * stride),
        stride=stride,
        length_per_key=[stride] * len(keys),
        offset_per_key=[key * stride for key in range(len(keys) + 1)],
    )


def _permuted(
    keys: list[str], values: Tensor, lengths: Tensor, weights: Tensor | None, bags: Tensor, stride: int
) -> KeyedJaggedTensor:
    """The ``bags`` (int64 [keys, stride]) of end-to-end bags; each may be named any number of times."""
    if not bags.numel():  # the GPU's kernel would hand everything back
        lengths, values, weights = lengths[:0], values[:0], weights[:0] if weights is not None else None
        return KeyedJaggedTensor(keys=keys, values=values, weights=weights, lengths=lengths, stride=stride)
    permute = torch.ops.fbgemm.permute_1D_sparse_data  # what KeyedJaggedTensor.permute calls, on CPU and GPU
    lengths, values, weights = permute(bags.reshape(-1).int(), lengths.reshape(-1), values, weights, None)
    return KeyedJaggedTensor(keys=keys, values=values, weights=weights, lengths=lengths, stride=stride)
