"""A loader, read batch by batch, and read on by a resumed run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torchrec_slipstream.errors import StateError

_END = object()


class Reader(Iterator[Any]):
    """The batches of a loader.

    Args:
        loader: iterated once, when the first batch is asked for. One with a ``state_dict`` and a ``load_state_dict`` of
            its own (torchdata's ``StatefulDataLoader``) is resumed by them, any other is read on to where it was.

    Raises (from ``next``):
        StateError: a loader that is read on has fewer batches than the saved run had read.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._read = 0
        self._has_begun = False
        self._is_restored = False  # the loader, by a state of its own

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator, self._has_begun = self._read_on(), True
        batch = next(self._iterator)
        self._read += 1
        return batch

    def _read_on(self) -> Iterator[Any]:
        """The loader's batches from where the saved run was."""
        iterator = iter(self._loader)
        if not self._is_restored:
            for read in range(self._read):
                if next(iterator, _END) is _END:
                    raise StateError(
                        f"the saved run had read {self._read} input batches, and this loader has {read}; resume with "
                        "the same data in the same order"
                    )
        return iterator

    def _stateful(self) -> Any | None:
        """The loader, if it has a state."""
        has = all(hasattr(self._loader, name) for name in ("state_dict", "load_state_dict"))
        return self._loader if has else None

    def state_dict(self) -> dict[str, Any]:
        """Batches read, and the loader's own state, if it has one."""
        stateful = self._stateful() if self._has_begun else None
        loader = stateful.state_dict() if stateful is not None else None
        return {"read": self._read, "has_begun": self._has_begun, "loader": loader}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, when the next batch is asked for; before the first was."""
        if state["loader"] is not None and (stateful := self._stateful()) is not None:
            stateful.load_state_dict(state["loader"])
            self._is_restored = True
        self._read, self._has_begun = state["read"], state["has_begun"]
