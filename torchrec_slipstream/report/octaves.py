"""How values are spread, in powers of two: small enough to keep in a report, and exact to add up over ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Values are looked at in parts, so that those of a large table take no second copy of it.
_PART = 1 << 22
_LOWEST, _HIGHEST = -64, 63


@dataclass(frozen=True)
class Octaves:
    """``counts[i]`` values lie in ``[2 ** (lowest + i), 2 ** (lowest + i + 1))``.

    Negative ones, zeros and those that are not finite are left out.

    Values below ``2 ** -64`` count there, and those of ``2 ** 64`` or more in the octave below it.
    """

    lowest: int = 0
    counts: Sequence[int] = ()

    @staticmethod
    def of(values: Tensor, scale: float = 1.0) -> Octaves:
        """Of a tensor of any shape and number type, each value taken ``scale``-fold."""
        sums = torch.zeros(_HIGHEST - _LOWEST + 1, dtype=torch.int64)
        for part in values.flatten().split(_PART):
            positive = part[(part > 0) & part.isfinite()].double() * scale
            # frexp is exact where log2 rounds a value just below a power of two up to it.
            octave = (torch.frexp(positive).exponent.long() - 1).clamp(_LOWEST, _HIGHEST)
            sums += torch.bincount(octave - _LOWEST, minlength=sums.numel()).cpu()
        return Octaves(_LOWEST, sums.tolist())._trimmed()

    def __add__(self, other: Octaves) -> Octaves:
        if not self.counts or not other.counts:
            return self if self.counts else other
        lowest = min(self.lowest, other.lowest)
        counts = [0] * (max(one.lowest + len(one.counts) for one in (self, other)) - lowest)
        for one in (self, other):
            for i, count in enumerate(one.counts):
                counts[one.lowest - lowest + i] += count
        return Octaves(lowest, counts)

    @property
    def total(self) -> int:
        """Values counted."""
        return sum(self.counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, fit for JSON."""
        return {"lowest": self.lowest, "counts": list(self.counts)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Octaves:
        """What :meth:`to_dict` wrote."""
        return Octaves(values["lowest"], list(values["counts"]) or ())

    def _trimmed(self) -> Octaves:
        there = [i for i, count in enumerate(self.counts) if count]
        if not there:
            return Octaves()
        return Octaves(self.lowest + there[0], list(self.counts[there[0] : there[-1] + 1]))
