"""What a loader's batches have in common, so that their samples can be joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any
from zlib import crc32

from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_slipstream.errors import InputError


class Schema:
    """The fields of the first batch with samples, apart from these: what every batch of every rank has to repeat.

    Attributes:
        of_first: of its class (under ``""``) and its fields, in words; empty before there is one.
    """

    def __init__(self) -> None:
        self.of_first: dict[str, str] = {}

    def check(self, batch: Any) -> None:
        """Raises InputError if the batch could not be joined with the first."""
        found = {"": type(batch).__name__}
        found |= {field.name: _described(getattr(batch, field.name)) for field in fields(batch)}
        first = self.of_first = self.of_first or found
        if found == first:
            return
        name = next(name for name in {**first, **found} if first.get(name) != found.get(name))
        what = f"batch's {name!r}" if name else "batch"
        raise InputError(
            f"the {what} is {found.get(name)}, and was {first.get(name)} in the loader's first batch; give the same in "
            "every batch"
        )

    @property
    def digest(self) -> int:
        """To compare over ranks; 0 before the first batch."""
        return crc32(repr(self.of_first).encode()) if self.of_first else 0

    def check_ranks(self, digests: Sequence[int]) -> None:
        """Raises InputError on all ranks if they differ."""
        if len(set(digests) - {0}) > 1:
            raise InputError(
                f"the ranks' first batches differ in their fields, keys or shapes; give the same on all ranks (on this "
                f"one: {self.of_first or 'no batch yet'})"
            )


def _described(value: Any) -> str:
    if isinstance(value, KeyedJaggedTensor):
        weights = "without" if value.weights_or_none() is None else "with"
        return f"a KeyedJaggedTensor of {', '.join(value.keys())} {weights} weights"
    if isinstance(value, Tensor):
        return f"a tensor [{', '.join(['B', *map(str, value.shape[1:])])}]"
    return "None"
