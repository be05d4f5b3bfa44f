"""Looking at a batch before FBGEMM does: its bounds check first, then what it prefetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor

from torchrec_slipstream.tbe.counting import CheckedBatch, LookupCounter
from torchrec_slipstream.tbe.finding import TBE
from torchrec_slipstream.tbe.part import Call
from torchrec_slipstream.tbe.routing import Side

if TYPE_CHECKING:
    from torchrec_slipstream.tbe.overlay import Overlay


def checked_call(counter: LookupCounter, call: Call, *, prefetches: bool = False) -> tuple[Call, CheckedBatch]:
    """The call with FBGEMM's casts and bounds check done, and its look-ups."""
    indices, offsets, weights, variable = counter.tbe.prepare_inputs(
        call.indices,
        call.offsets,
        call.weights,
        call.batch_sizes,
        force_cast_input_types=not prefetches,
        prefetch_pipeline=prefetches and counter.tbe.prefetch_pipeline,
        vbe_output=call.more.get("vbe_output"),
        vbe_output_offsets=call.more.get("vbe_output_offsets"),
    )
    batch = counter.batch_of(indices, offsets, variable.B_offsets)
    if weights is not None:
        weights = weights[: batch.indices.numel()]
    return replace(call, indices=batch.indices, offsets=offsets, weights=weights), batch


@contextmanager
def bounds_unchecked(tbe: TBE) -> Iterator[None]:
    """No bounds check inside: it was done, and would take the padding behind a side's look-ups for a mistake."""
    mode = tbe.bounds_check_mode_int
    tbe.bounds_check_mode_int = BoundsCheckMode.NONE.value
    try:
        yield
    finally:
        tbe.bounds_check_mode_int = mode


def without_hot(counter: LookupCounter, overlay: Overlay, call: Call) -> Tensor:
    """The call's indices for FBGEMM's prefetch, hot rows as -1, which it takes for pruned ones and leaves alone.

    They stay where they are in the batch, so that :func:`take_prefetched` finds each look-up's place in the cache even
    if rows have moved between the prefetch and the forward.
    """
    overlay.hold()
    call, batch = checked_call(counter, call, prefetches=True)
    numbers = overlay.space.of_lookups(batch.indices, batch.bounds.diff())
    return batch.indices.masked_fill(overlay.words.index_select(0, numbers) >= 0, -1)


def take_prefetched(tbe: TBE, cold: Side) -> None:
    """Let the forward find what a prefetch found of the whole batch, for the cold look-ups alone.

    A row that has become cold since was not prefetched: its location is -1, a miss, and it is read from where it is.
    """
    if not tbe.lxu_cache_locations_list:
        return
    locations = cold.of_batch(tbe.lxu_cache_locations_list[0])
    if (valid := cold.chosen.valid) is not None:
        locations = torch.where(valid, locations, -1)
    tbe.lxu_cache_locations_list[0] = locations
