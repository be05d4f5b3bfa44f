"""What leaving updates out of one TBE costs and saves, as it was measured in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Payoff:
    """One TBE's last trial.

    Attributes:
        tables: names of the logical tables that the TBE holds, or has shards of.
        step: of the session, when the trial ended.
        stock_ms: milliseconds that the TBE's forward and backward take in a stock step, lower quartile.
        skipping_ms: the same with updates left out, all that chooses them included.
        pays: whether they are left out since.
        rank: whose TBE it is, as of when the ranks' are put together.
    """

    tables: list[str]
    step: int
    stock_ms: float
    skipping_ms: float
    pays: bool
    rank: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Payoff:
        """What :meth:`to_dict` gave. Raises TypeError for a table that has no name."""
        found = Payoff(**values)
        if not isinstance(found.tables, list) or not all(isinstance(name, str) for name in found.tables):
            raise TypeError(f"the tables of a payoff are {found.tables!r}")
        return found

    @property
    def names(self) -> str:
        """The tables, or how many they are."""
        if len(self.tables) < 2:
            return ", ".join(self.tables)
        return f"{len(self.tables)} tables ({self.tables[0]}, ...)"

    def __str__(self) -> str:
        what = "updates are left out" if self.pays else "left alone, all its updates run"
        return (
            f"rank {self.rank}, {self.names}: {self.stock_ms:.2f} ms a step with all updates, "
            f"{self.skipping_ms:.2f} with some left out (step {self.step:,}): {what}"
        )
