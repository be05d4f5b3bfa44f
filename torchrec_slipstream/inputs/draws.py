"""What is drawn in this room: the same again for the same seed, rank and number of the draw."""

from __future__ import annotations

import torch
from torch import Tensor


class Draws:
    """Uniform numbers for one batch after another.

    Args:
        seed, rank: any integers from 0.

    Attributes:
        batches: drawn for so far; set it to go on from there.
    """

    def __init__(self, seed: int, rank: int) -> None:
        self._seed, self._rank, self.batches = seed, rank, 0

    def uniform(self, size: int) -> Tensor:
        """The next batch's, float32 [size] in [0, 1)."""
        # Odd multipliers spread neighbouring numbers over the 64 bits, which the generator takes as they come.
        mixed = self._seed * 0x9E3779B97F4A7C15 + self._rank * 0xBF58476D1CE4E5B9 + self.batches * 0x94D049BB133111EB
        self.batches += 1
        return torch.rand(size, generator=torch.Generator().manual_seed(mixed % 2**64 - 2**63))
