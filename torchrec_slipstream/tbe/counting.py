"""What one TBE looks up, counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor

from torchrec_slipstream.access.counters import RowCounts
from torchrec_slipstream.access.sketch import RowSketch
from torchrec_slipstream.tbe.finding import FoundTbe
from torchrec_slipstream.tbe.memory import optimizer_state
from torchrec_slipstream.tbe.row_space import RowSpace


@dataclass(frozen=True)
class CheckedBatch:
    """A batch after FBGEMM's bounds check.

    Attributes:
        indices: int ``[N]``, local rows.
        offsets: int ``[bags + 1]``.
        bounds: int ``[features + 1]``, where each feature's look-ups begin.
    """

    indices: Tensor
    offsets: Tensor
    bounds: Tensor

    @cached_property
    def lengths(self) -> Tensor:
        """int ``[features]``, each feature's look-ups."""
        return self.bounds.diff()


class LookupCounter:
    """Counts the look-ups of one TBE, as FBGEMM sees them after its bounds check.

    The rows of a shard have a *slot* each, in order, or share one if they are not counted one by one
    (``TableShard.slots``).

    Args:
        found: the TBE with its shards.
        fades: whether the counts will be halved now and then.

    Attributes:
        counting: whether the coming steps are counted. False at first.
        counts: look-ups of every slot in the counted steps.
        sketches: the same for the rows of shards that share a slot, by the shard's place; none at first.
        samples: float64 ``[features]``, bags of each feature in the counted steps.
        lookups: int64 ``[features]``, look-ups in all training steps, counted or not.
        followers: called with rows (int64 ``[n]``, slots) and what was taken off their touches (int32 ``[n]``).
    """

    def __init__(self, found: FoundTbe, *, fades: bool = False) -> None:
        tbe = found.tbe
        self.found = found
        self.tbe = tbe
        self.shards = found.shards
        self.device = tbe.current_device
        slots = max((shard.slots.stop for shard in found.shards), default=0)
        self.counting = False
        self.counts = RowCounts(slots, self.device, fades=fades)
        self.sketches: dict[int, RowSketch] = {}
        self.feature_table: list[int] = list(tbe.feature_table_map)
        self.samples = torch.zeros(len(self.feature_table), dtype=torch.float64)
        self.lookups = torch.zeros(len(self.feature_table), dtype=torch.int64, device=self.device)
        self.followers: list[Callable[[Tensor, Tensor], None]] = []
        self.space = RowSpace(
            [shard.rows for shard in found.shards],
            [shard.counted for shard in found.shards],
            self.feature_table,
            self.device,
        )

    @property
    def touches(self) -> Tensor:
        """int32 ``[slots]``, look-ups of every slot in counted steps; only differences of them mean something."""
        return self.counts.touches

    def lower_high(self) -> None:
        """Keep the touches within int32, and tell whoever holds differences of them. Call between two steps."""
        rows, taken = self.counts.lower_high()
        if rows.numel():
            for follow in self.followers:
                follow(rows, taken)

    @property
    def element_size(self) -> int:
        """Bytes of one weight."""
        return max(1, self.tbe.weights_precision.bit_rate() // 8)

    def optimizer_bytes(self, dim: int) -> int:
        """Bytes of optimizer state of a row of ``dim`` values; of an optimizer that we do not know, Adam's."""
        try:
            return optimizer_state(self.tbe.optimizer).row_bytes(dim)
        except ValueError:
            return optimizer_state(EmbOptimType.ADAM).row_bytes(dim)

    def checked(self) -> CheckedBatch:
        """The batch of the forward just run, as FBGEMM saw it: casts done, out-of-range indices put right."""
        tbe = self.tbe
        return self.batch_of(tbe._indices, tbe._offsets, tbe._vbe_B_offsets)

    def batch_of(self, indices: Tensor, offsets: Tensor, vbe_bounds: Tensor | None) -> CheckedBatch:
        """The batch of checked ``indices`` and ``offsets``; ``vbe_bounds``: of a variable batch, FBGEMM's B_offsets."""
        if self.device.type == "cpu" and self.tbe.bounds_check_mode_int == BoundsCheckMode.NONE.value:
            # Nothing refuses indices that are longer than the last offset says; FBGEMM does not read their end.
            indices = indices[: int(offsets[-1])]
        if vbe_bounds is not None and vbe_bounds.numel() > 0:
            bounds = offsets.index_select(0, vbe_bounds)
        else:
            bounds = offsets[:: max(1, (offsets.numel() - 1) // len(self.feature_table))]
        return CheckedBatch(indices, offsets, bounds)

    def observe(self, batch: CheckedBatch, batch_sizes: list[list[int]] | None, *, rows: Tensor | None = None) -> None:
        """Count the look-ups of a training step's forward.

        Args:
            batch: its look-ups.
            batch_sizes: of a variable batch, its samples by feature and rank.
            rows: the slots of the look-ups' rows (``space``), where they are known.
        """
        self.lookups += batch.lengths
        if not self.counting:
            return
        if self.space.any_own:
            self.counts.add(self.rows_of(batch) if rows is None else rows)
        if self.sketches:
            self._add_to_sketches(batch.indices, batch.bounds)
        self.count_samples(batch.offsets, batch_sizes)

    def rows_of(self, batch: CheckedBatch) -> Tensor:
        """int64 ``[N]``, the slots of the look-ups' rows."""
        return self.space.of_lookups(batch.indices, batch.lengths)

    def _add_to_sketches(self, indices: Tensor, bounds: Tensor) -> None:
        for table, (begin, end) in zip(self.feature_table, pairwise(bounds.tolist()), strict=True):
            if table in self.sketches:
                self.sketches[table].add(indices[begin:end])

    def count_samples(self, offsets: Tensor, batch_sizes: list[list[int]] | None) -> None:
        """Count the bags of a batch, which may hold no look-up at all."""
        if not self.counting:
            return
        if batch_sizes is None:
            self.samples += (offsets.numel() - 1) // len(self.feature_table)
        else:
            self.samples += torch.tensor([float(sum(by_rank)) for by_rank in batch_sizes], dtype=torch.float64)
