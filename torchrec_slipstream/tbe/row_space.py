"""One number for every row of a TBE, over all its tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RowSpace:
    """Numbers the rows of a TBE's shards, one shard after the other.

    Args:
        rows: of each shard.
        own: for each shard, whether its rows have a number each; else they share one.
        feature_table: for each feature, the shard that it looks rows up in.

    Attributes:
        begins: where each shard's numbers begin.
        size: how many numbers there are.
    """

    def __init__(
        self, rows: Sequence[int], own: Sequence[bool], feature_table: Sequence[int], device: torch.device
    ) -> None:
        self.own = tuple(own)
        self.begins: list[int] = []
        self.size = 0
        for count, has_own in zip(rows, own, strict=True):
            self.begins.append(self.size)
            self.size += count if has_own else 1
        self._feature_begin = torch.tensor([self.begins[t] for t in feature_table], dtype=torch.int64, device=device)
        counted = [own[t] for t in feature_table]
        self.any_own = any(counted)
        # None where every row has its number; else 0 for the features whose rows share one.
        self._feature_factor = None if all(counted) else torch.tensor(counted, device=device).long()

    def of_lookups(self, indices: Tensor, lengths: Tensor) -> Tensor:
        """int64 ``[N]``, the numbers of the rows ``indices`` (``[N]``, local); ``lengths`` ``[features]`` of them.

        On a GPU a pruned look-up (-1) has the number of its table's first row, so that no other table's is meant.
        """
        if self._feature_factor is None and _are_alike(lengths):
            # In numpy, whose calls cost a CPU half of torch's.
            by_feature = indices.numpy().reshape(lengths.numel(), -1)
            return torch.from_numpy((by_feature + self._feature_begin.numpy()[:, None]).reshape(-1))
        if indices.device.type != "cpu":
            # FBGEMM's bounds check lets -1 pass, for a pruned row; its CPU kernels refuse that.
            indices = indices.clamp(min=0)
        numbers = torch.repeat_interleave(self._feature_begin, lengths, output_size=indices.numel())
        if self._feature_factor is None:
            numbers += indices
        else:
            numbers += indices * torch.repeat_interleave(self._feature_factor, lengths, output_size=indices.numel())
        return numbers


def _are_alike(lengths: Tensor) -> bool:
    """Whether all features surely have equally many look-ups, which one broadcast then serves. Never waits."""
    return lengths.device.type == "cpu" and bool((lengths.numpy() == lengths.numpy()[0]).all())
