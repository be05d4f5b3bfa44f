"""Histories that stay short however long a run is: they are in every report and every saved state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

MOST = 1000
_Entry = TypeVar("_Entry")


def thin(entries: list[_Entry], join: Callable[[_Entry, _Entry], _Entry]) -> None:
    """Of more than :data:`MOST` entries leave every other one, in place, and always the first and the last.

    Args:
        entries: in the order of time.
        join: of two neighbours, what stands for both from now on, at the later one's time.
    """
    while len(entries) > MOST:
        others = entries[1:]
        alone = others[len(others) - len(others) % 2 :]
        entries[1:] = [*map(join, others[::2], others[1::2]), *alone]
