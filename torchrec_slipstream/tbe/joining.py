"""The look-ups of several micro-batches put together, in the order that they have in the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from torchrec_slipstream.tbe.compaction import are_single
from torchrec_slipstream.tbe.part import Call


@dataclass(frozen=True)
class Joined:
    """A batch made of parts.

    Attributes:
        call: its look-ups.
        samples: int64 ``[B]``, for each of its samples, which it is of the parts' samples end to end.
        lookups: int64 ``[N]``, the same of its look-ups.
    """

    call: Call
    samples: Tensor
    lookups: Tensor


def join(calls: Sequence[Call], features: int, positions: Sequence[Tensor]) -> Joined:
    """Put the calls of a TBE with so many features together, on their device and without waiting for it.

    Args:
        positions: int64 ``[n]`` for each call, where its samples belong; if they are not as many as its bags say, the
            calls' samples follow each other.
    """
    calls = [_trimmed(call) for call in calls]
    device = calls[0].indices.device
    sizes = [(call.offsets.numel() - 1) // features for call in calls]
    samples = torch.arange(sum(sizes), device=device)
    if sizes == [len(of_call) for of_call in positions]:
        samples = torch.argsort(torch.cat(list(positions)).to(device))
    bags = _bags(sizes, features, samples)
    if all(are_single(call.offsets, call.indices.numel()) for call in calls):
        lookups, offsets = bags, torch.arange(bags.numel() + 1, dtype=calls[0].offsets.dtype)
    else:
        lookups, offsets = _lookups(calls, bags)
    weights = [call.weights for call in calls if call.weights is not None]
    call = replace(
        calls[0],
        indices=torch.cat([call.indices for call in calls])[lookups],
        offsets=offsets,
        weights=torch.cat(weights)[lookups] if weights else None,
        feature_requires_grad=None,
    )
    return Joined(call, samples, lookups)


def put_together(parts: Sequence[Tensor], source: Tensor) -> Tensor:
    """The rows of ``parts`` (``[n, dim]`` each) in one tensor, whose row ``i`` is number ``source[i]`` of theirs."""
    places = torch.empty_like(source)
    places[source] = torch.arange(source.numel(), device=source.device)
    joint = parts[0].new_empty(source.numel(), parts[0].shape[1])
    for part, at in zip(parts, places.split([len(part) for part in parts]), strict=True):
        joint.index_copy_(0, at, part)  # each row is copied once, which a CPU does much faster than cat and a gather
    return joint


def _trimmed(call: Call) -> Call:
    """Without indices behind the last bag, which FBGEMM does not read. On a GPU there must be none."""
    if call.indices.device.type != "cpu":
        return call
    count = int(call.offsets[-1])
    weights = call.weights[:count] if call.weights is not None else None
    return replace(call, indices=call.indices[:count], weights=weights)


def _bags(sizes: Sequence[int], features: int, samples: Tensor) -> Tensor:
    """int64 ``[features * B]``: for each bag of the whole, which it is of the parts' bags end to end.

    ``sizes`` are the samples of each part.
    """
    device = samples.device
    # A part's bags are feature-major: sample j of a part has bag begin + j, and one each `size` on.
    begins = accumulate((size * features for size in sizes), initial=0)
    first = torch.cat([torch.arange(b, b + size, device=device) for b, size in zip(begins, sizes, strict=False)])
    stride = torch.cat([torch.full((size,), size, device=device) for size in sizes])
    return (torch.arange(features, device=device)[:, None] * stride[samples] + first[samples]).view(-1)


def _lookups(calls: Sequence[Call], bags: Tensor) -> tuple[Tensor, Tensor]:
    """int64 ``[N]``: for each look-up of the whole, which it is of the parts' look-ups end to end; and its offsets."""
    counts = [call.indices.numel() for call in calls]
    lengths = torch.cat([call.offsets.diff() for call in calls])[bags]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=lengths.dtype)])
    befores = accumulate(counts, initial=0)
    begins = torch.cat([call.offsets[:-1].long() + before for call, before in zip(calls, befores, strict=False)])
    moved = torch.repeat_interleave(begins[bags] - offsets[:-1], lengths, output_size=sum(counts))
    return moved + torch.arange(sum(counts), device=bags.device), offsets
