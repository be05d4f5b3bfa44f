"""What is known of a loader before it is read."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any


def length_of(loader: Iterable[Any]) -> int | None:
    """How many batches it gives; None where it does not say."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:  # a DataLoader of an IterableDataset
        return None
