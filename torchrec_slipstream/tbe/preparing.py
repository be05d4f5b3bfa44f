"""Looking at a batch before FBGEMM does: its bounds check first, then what it prefetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode

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
    if counter.device.type == "cpu":
        _check_range(counter.tbe, batch)
    if weights is not None:
        weights = weights[: batch.indices.numel()]
    return replace(call, indices=batch.indices, offsets=offsets, weights=weights), batch


def _check_range(tbe: TBE, batch: CheckedBatch) -> None:
    """Refuse what FBGEMM's CPU kernels would: -1, and any row where the bounds check is off. They will see slots.

    On a GPU nothing refuses -1, as waiting for the answer would stall: RowSpace takes it for its table's first row,
    where stock reads out of bounds.
    """
    rows = torch.repeat_interleave(tbe.rows_per_table, batch.bounds.diff(), output_size=batch.indices.numel())
    if bool(((batch.indices < 0) | (batch.indices >= rows)).any()):
        raise RuntimeError("a look-up is out of its table's range")


@contextmanager
def bounds_unchecked(tbe: TBE) -> Iterator[None]:
    """No bounds check inside: it was done, and would take the padding behind a side's look-ups for a mistake.

    (It lets an index of -1 pass, but wants the last offset to be the number of indices, and sets it so:
    ``embedding_bounds_check_v1.cu`` and ``_v2.cu``, FBGEMM 1.6.0 and 1.8.0.)
    """
    mode = tbe.bounds_check_mode_int
    tbe.bounds_check_mode_int = BoundsCheckMode.NONE.value
    try:
        yield
    finally:
        tbe.bounds_check_mode_int = mode


def without_hot(counter: LookupCounter, overlay: Overlay, call: Call) -> Call:
    """The call for FBGEMM's prefetch, hot rows as -1, which it takes for pruned ones and leaves alone.

    ``linearize_cache_indices.cu`` gives an index below 0 the number behind the last row's; ``lru_cache_find.cu``,
    ``lfu_cache_find.cu`` and ``lxu_cache.cu`` pass that number over: it is neither inserted nor locked, and found
    nowhere. (FBGEMM 1.6.0 and 1.8.0.)

    They stay where they are in the batch, so that :func:`take_prefetched` finds each look-up's place in the cache even
    if rows have moved between the prefetch and the forward.
    """
    overlay.hold()
    call, batch = checked_call(counter, call, prefetches=True)
    numbers = overlay.space.of_lookups(batch.indices, batch.lengths)
    return replace(call, indices=batch.indices.masked_fill(overlay.words.index_select(0, numbers) >= 0, -1))


def take_prefetched(tbe: TBE, cold: Side) -> None:
    """Let the forward find what a prefetch found of the whole batch, for the cold look-ups alone.

    A row that has become cold since was not prefetched: its location is -1, a miss, and it is read and updated in the
    table. Should the next batch's prefetch put it into the cache before this one's backward, FBGEMM itself mends that
    where ``prefetch_pipeline`` is set (``_update_cache_counter_and_locations``); without, it is for the caller, as with
    any miss, not to prefetch that early.
    """
    if not tbe.lxu_cache_locations_list:
        return
    locations = cold.of_batch(tbe.lxu_cache_locations_list[0])
    if (valid := cold.chosen.valid) is not None:
        locations = torch.where(valid, locations, -1)
    tbe.lxu_cache_locations_list[0] = locations
