"""Routing: a batch split between the backing TBE (cold look-ups) and the overlay (hot ones), and their outputs merged.

One gather of the slot words and one compaction a side. On a GPU nothing waits for how many look-ups are hot: both
sides get tensors as long as the batch, padded with row -1, and offsets that end where theirs do
(``tbe/compaction.py``). What FBGEMM 1.6.0 and 1.8.0 make of the padding, as read in their source:

* The forward kernels of pooled TBEs, fixed and variable batches, version 2 among them, and those of sequences read and
  write by the offsets (``embedding_forward_split_kernel*_template.cu``); a sequence's output has a row for every index,
  those of the padding with whatever stood there. So do the CPU's.
* FBGEMM's cache takes row -1 for a pruned one (``preparing.py`` says where); a location of padding is -1, a miss.
* The backward sorts all the indices that it is given (``transpose_embedding_input.cu`` numbers only those within the
  offsets, and leaves garbage for the rest), so there the padding is cut off, when the count has long been on the host
  (``Beginning`` in ``backward.py``). Under ``prefetch_pipeline`` FBGEMM has by then overwritten the cache locations
  with those of the batch's distinct rows in their order (``use_uniq_cache_locations``); the padding counts as one more
  row, the last, and there are no more rows than look-ups: their beginning is right as well.
* The gradient of per-sample weights is written by the offsets, into memory that was not cleared
  (``embedding_backward_split_indice_weights_template.cu``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_slipstream.tbe.backward import clipped, scale_bags
from torchrec_slipstream.tbe.compaction import Compaction
from torchrec_slipstream.tbe.counting import CheckedBatch
from torchrec_slipstream.tbe.finding import TBE
from torchrec_slipstream.tbe.sampling import Layout


@dataclass(frozen=True)
class Side:
    """The look-ups of a batch that one of the two TBEs serves.

    Attributes:
        chosen: which of the batch's look-ups they are.
        indices: rows of the backing TBE, or slots of the overlay; on a GPU as long as the batch, -1 behind the last.
        offsets: ``[bags + 1]``.
        bounds: ``[features + 1]``, where each feature's look-ups begin among them.
    """

    chosen: Compaction
    indices: Tensor
    offsets: Tensor
    bounds: Tensor

    @property
    def is_empty(self) -> bool:
        """Whether it surely has no look-up; on a GPU never sure."""
        return self.indices.numel() == 0

    def of_batch(self, values: Tensor) -> Tensor:
        """The side's entries of ``values`` (``[N]``, one a look-up of the batch), padded like ``indices``."""
        return values.index_select(0, self.chosen.padded_positions)


def route(batch: CheckedBatch, words: Tensor) -> tuple[Side, Side]:
    """The cold and the hot side of a batch.

    Args:
        words: int32 ``[N]``, the slot words of the look-ups' rows.
    """
    hot = words >= 0
    return _side(batch, ~hot, batch.indices), _side(batch, hot, words.to(batch.indices.dtype))


def _side(batch: CheckedBatch, mine: Tensor, indices: Tensor) -> Side:
    chosen = Compaction.of(mine, batch.offsets)
    indices = indices.index_select(0, chosen.padded_positions)
    if (valid := chosen.valid) is not None:
        indices.masked_fill_(~valid, -1)
    return Side(chosen, indices, chosen.offsets(), chosen.live_before(batch.bounds).to(batch.bounds.dtype))


def merge(cold_output: Tensor, hot_output: Tensor, cold: Side, hot: Side, layout: Layout) -> Tensor:
    """The batch's output from those of its two sides."""
    if layout.pooling == PoolingMode.NONE:
        return MergeRows.apply(cold_output, hot_output, cold.chosen, hot.chosen)
    # Not in place: either may be a view (WeightGradient), or the ``vbe_output`` that several TBEs share.
    return cold_output + hot_output


class ScaleBags(torch.autograd.Function):
    """Multiplies a mean-pooled output by its bags' parts of the whole bags: ``[bags]`` factors.

    FBGEMM divides by the length of the part that it was given. Its CPU backward does not where look-ups have weights;
    then the gradient needs no factor either.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, factor: Tensor, layout: Layout, tbe: TBE, backward: bool) -> Tensor:
        ctx.factor, ctx.layout, ctx.tbe = (factor if backward else None), layout, tbe
        return scale_bags(output, factor, layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.factor is not None:
            gradient = scale_bags(clipped(ctx.tbe, gradient), ctx.factor, ctx.layout)
        return gradient, None, None, None, None


class MergeRows(torch.autograd.Function):
    """The outputs of a sequence TBE's two sides, a row a look-up, in the batch's order.

    On a GPU both have as many rows as the batch has look-ups; those behind the last are never read.
    """

    @staticmethod
    def forward(ctx: Any, cold_rows: Tensor, hot_rows: Tensor, cold: Compaction, hot: Compaction) -> Tensor:
        ctx.sides = (cold, hot)
        valid = hot.valid
        if valid is None:
            merged = torch.empty((cold.lookups, cold_rows.shape[1]), dtype=cold_rows.dtype)
            merged.index_copy_(0, cold.positions, cold_rows)
            return merged.index_copy_(0, hot.positions, hot_rows)
        is_hot = hot.mask[:, None]
        return torch.where(is_hot, hot_rows.index_select(0, hot.ranks), cold_rows.index_select(0, cold.ranks))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cold, hot = (gradient.index_select(0, side.padded_positions) for side in ctx.sides)
        return cold, hot, None, None
