"""What one TBE looks up, counted."""

from __future__ import annotations

from itertools import pairwise

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor

from torchrec_slipstream.access.counters import RowCounts
from torchrec_slipstream.access.sketch import RowSketch
from torchrec_slipstream.tbe.finding import FoundTbe
from torchrec_slipstream.tbe.memory import optimizer_state


class LookupCounter:
    """Counts the look-ups of one TBE, as FBGEMM saw them in the forward that it has just run.

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
    """

    def __init__(self, found: FoundTbe, *, fades: bool = False) -> None:
        tbe = found.tbe
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
        self._feature_begin = torch.tensor(
            [found.shards[t].row_begin for t in self.feature_table], dtype=torch.int64, device=self.device
        )
        has_slots = [found.shards[t].counted for t in self.feature_table]
        self._counts_rows = any(has_slots)
        # None where every row has its slot; else 0 for the features whose rows share one.
        self._feature_factor = None if all(has_slots) else torch.tensor(has_slots, device=self.device).long()

    @property
    def touches(self) -> Tensor:
        """int32 ``[slots]``, look-ups of every slot in counted steps; only differences of them mean something."""
        return self.counts.touches

    @property
    def element_size(self) -> int:
        """Bytes of one weight."""
        return self.tbe.split_embedding_weights()[0].element_size()

    def optimizer_bytes(self, dim: int) -> int:
        """Bytes of optimizer state of a row of ``dim`` values; of an optimizer that we do not know, Adam's."""
        try:
            return optimizer_state(self.tbe.optimizer).row_bytes(dim)
        except ValueError:
            return optimizer_state(EmbOptimType.ADAM).row_bytes(dim)

    def observe(self, batch_sizes: list[list[int]] | None, *, want_rows: bool) -> tuple[Tensor, Tensor]:
        """Count the look-ups of the forward just run.

        Args:
            batch_sizes: of a variable batch, its samples by feature and rank.
            want_rows: whether the slots are asked for; else something of no meaning may stand in their place.

        Returns:
            The slots of the look-ups' rows, int64 ``[N]``; where each feature's look-ups begin, ``[features + 1]``.
        """
        # What FBGEMM made of the arguments: casts done, out-of-range indices put right by its bounds check.
        indices, offsets = self.tbe._indices, self.tbe._offsets
        if self.device.type == "cpu" and self.tbe.bounds_check_mode_int == BoundsCheckMode.NONE.value:
            # Nothing refuses indices that are longer than the last offset says; FBGEMM does not read their end.
            indices = indices[: int(offsets[-1])]
        bag_bounds = self.tbe._vbe_B_offsets
        if bag_bounds is not None and bag_bounds.numel() > 0:
            bounds = offsets.index_select(0, bag_bounds)
        else:
            bounds = offsets[:: max(1, (offsets.numel() - 1) // len(self.feature_table))]
        lengths = bounds.diff()
        self.lookups += lengths
        rows = bounds
        if want_rows or (self.counting and self._counts_rows):
            rows = torch.repeat_interleave(self._feature_begin, lengths, output_size=indices.numel())
            if self._feature_factor is None:
                rows += indices
            else:
                factor = torch.repeat_interleave(self._feature_factor, lengths, output_size=indices.numel())
                rows += indices * factor
        if self.counting:
            if self._counts_rows:
                self.counts.add(rows)
            if self.sketches:
                self._add_to_sketches(indices, bounds)
            self.count_samples(offsets, batch_sizes)
        return rows, bounds

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
