"""Importance sampling of stale look-ups: which of them a backward keeps, and what each kept one stands for.

A look-up's part in its row's update is proportional to the gradient that reaches it, and in a batch most gradients
are small (of a click model's samples, nearly all are negatives that it already predicts). So a stale look-up is kept
with probability ``q = clamp(scale * magnitude, least, 1)``, and a kept one counts ``1 / q``-fold: the expected
update is the full one, and for the number of look-ups kept its variance is nearly as small as it can be.

Magnitudes are relative to the batch's mean, so that ``scale`` does not depend on the loss's scale.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_slipstream.tbe.compaction import are_single

# A sample's gradient is told by a few columns of it: the factor that differs between samples, the loss's derivative,
# is common to all features. Reading all of it would cost as much as the backward saves.
_PROBED_FEATURES = 4
_PROBED_COLUMNS = 16


@dataclass(frozen=True)
class Layout:
    """How a TBE's output, and so its gradient, is laid out.

    ``dims`` are the columns of each feature, ``batch_sizes`` the samples by feature and rank of a variable batch and
    ``output_offsets`` where their blocks begin if not back to back.
    """

    pooling: PoolingMode
    dims: list[int]
    batch_sizes: list[list[int]] | None = None
    output_offsets: Tensor | None = None


def magnitudes(gradient: Tensor, layout: Layout) -> Tensor:
    """Size of the gradient over its mean: float32 ``[samples]``, ``[bags]`` of a variable batch, ``[look-ups]`` of a
    sequence. All NaN if the gradient is not finite somewhere."""
    if layout.pooling == PoolingMode.NONE:
        size = gradient.float().norm(dim=1)
    elif layout.batch_sizes is None:
        columns = [gradient.narrow(1, begin, width) for begin, width in _probed(tuple(layout.dims))]
        size = _norms(columns)
    else:
        size = _variable_norms(gradient, layout)
    if size.device.type == "cpu":  # where the host need not wait for a number, and fewer operations are quicker
        mean = float(size.mean())
        return size.mul_(1.0 / max(mean, 1e-30)) if math.isfinite(mean) else torch.full_like(size, torch.nan)
    mean = size.mean()
    return torch.where(mean.isfinite(), size / mean.clamp(min=1e-30), torch.nan)


def _norms(columns: list[Tensor]) -> Tensor:
    """float32 ``[samples]``, the norms of the rows of ``[samples, columns]`` matrices side by side."""
    if columns[0].device.type == "cpu" and columns[0].dtype == torch.float32:
        arrays = [one.detach().numpy() for one in columns]
        return torch.from_numpy(np.sqrt(sum(np.einsum("ij,ij->i", one, one) for one in arrays)))
    return torch.cat(columns, dim=1).float().square_().sum(dim=1).sqrt_()


@cache
def _probed(dims: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where the columns that are looked at begin, and how many they are."""
    begins = [0, *accumulate(dims)]
    features = sorted({len(dims) * i // _PROBED_FEATURES for i in range(_PROBED_FEATURES)})
    return [(begins[f], min(dims[f], _PROBED_COLUMNS)) for f in features]


def variable_blocks(gradient: Tensor, layout: Layout) -> list[tuple[Tensor, int]]:
    """The gradient of a variable batch (1-D, rank-major) as views ``[samples, dim]``, each with the position of its
    first bag (bags are feature-major)."""
    assert layout.batch_sizes is not None
    ranks = len(layout.batch_sizes[0])
    sizes = [size for by_rank in layout.batch_sizes for size in by_rank]
    first_bag = [0]
    for size in sizes:
        first_bag.append(first_bag[-1] + size)
    starts = layout.output_offsets.tolist() if layout.output_offsets is not None else None
    blocks, at = [], 0
    for rank in range(ranks):
        for feature, width in enumerate(layout.dims):
            size = layout.batch_sizes[feature][rank]
            begin = at if starts is None else starts[rank][feature]
            blocks.append((gradient[begin : begin + size * width].view(-1, width), first_bag[feature * ranks + rank]))
            at += size * width
    return blocks


def _variable_norms(gradient: Tensor, layout: Layout) -> Tensor:
    assert layout.batch_sizes is not None
    norms = torch.empty(sum(sum(by_rank) for by_rank in layout.batch_sizes), device=gradient.device)
    for block, first in variable_blocks(gradient.float(), layout):
        norms[first : first + block.shape[0]] = block.norm(dim=1)
    return norms


def kept_probability(magnitude: Tensor, scale: float, least: float) -> Tensor:
    """``clamp(scale * magnitude, least, 1)``; 1 where the magnitude is not finite (such a step is kept whole)."""
    # A magnitude is a finite number or NaN, which fmin takes for the other, 1.
    return torch.fmin((magnitude * scale).clamp_(min=least), magnitude.new_ones(()))


def stands_for(probability: Tensor, generator: torch.Generator) -> Tensor:
    """Draw: 0 of what is dropped, and of what is kept, with that probability, its inverse. float32."""
    kept = torch.rand(probability.shape, generator=generator, device=probability.device) < probability
    return kept / probability


def factors(stands_for: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """bool and float32 ``[look-ups]``: which are kept, and what each counts for. Live ones are, and count once."""
    if live.device.type == "cpu":
        # In numpy, whose calls cost a CPU half of torch's; and not np.where, which a random mask makes slow.
        mask = live.numpy()
        factor = stands_for.numpy() * ~mask + mask
        return torch.from_numpy(factor > 0), torch.from_numpy(factor)
    factor = stands_for * live.logical_not() + live
    return factor > 0, factor


def of_lookups(values: Tensor, offsets: Tensor, layout: Layout, lookups: int) -> Tensor:
    """The values of samples or bags (as :func:`magnitudes` gives them) for each look-up: ``[look-ups]``."""
    if layout.pooling == PoolingMode.NONE:
        return values
    if layout.batch_sizes is None:
        values = values.repeat(len(layout.dims))
    if are_single(offsets, lookups):
        return values  # nothing to expand
    if offsets.device.type == "cpu":  # where numpy's takes a third of torch's
        return torch.from_numpy(values.numpy().repeat(offsets.diff().numpy()))
    # With the size given, a GPU does not stall to add the lengths up.
    return torch.repeat_interleave(values, offsets.diff(), output_size=lookups)


def generator_for(name: str, step: int, draw: int, device: torch.device) -> torch.Generator:
    """A generator that depends on (name, step, draw) alone, so that a resumed run draws what it would have drawn."""
    seed = zlib.crc32(f"{name}/{step}/{draw}".encode())
    return torch.Generator(device=device).manual_seed(seed)
