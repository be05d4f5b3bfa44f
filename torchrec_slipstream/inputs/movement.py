"""How far rows have moved between two steps, and what they all say together to every rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_slipstream.inputs.rows import RowSets, ShardRows
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe import TableShard
from torchrec_slipstream.tbe.features import ModelTable

# Rows are compared in parts of so many bytes, which bounds the memory needed besides the snapshot.
_CHUNK_BYTES = 64 * 2**20

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class WatchedShard(Protocol):
    """A shard of this rank whose rows train: where it lies in its table, its weights and its look-ups."""

    @property
    def at(self) -> TableShard: ...
    @property
    def device(self) -> torch.device: ...

    def weights(self, rows: Tensor) -> Tensor:
        """``[n, dim]``, a copy of the current weights of ``rows`` (int64 ``[n]``, of the shard)."""
        ...

    def touches(self, rows: Tensor) -> Tensor:
        """int64 ``[n]``, counted look-ups; only differences mean something."""
        ...


class Snapshot:
    """The hot rows of a shard as they are now. Costs their weights once more, on the shard's device, and 16 bytes a
    row.

    Args:
        shard: of this rank.
        rows: int64 ``[n]``, ascending, of the shard.
    """

    def __init__(self, shard: WatchedShard, rows: Tensor) -> None:
        self.shard = shard
        self.rows = rows.to(shard.device)
        self._weights = shard.weights(self.rows)
        self._touches = shard.touches(self.rows)

    def movement(self, kind: str, least_touches: int, scale: int) -> ShardMovement:
        """How far the rows have moved since.

        Args:
            kind: ``"plain"``: the largest distance of a dimension, as published; ``"per_touch"``: divided by the row's
                look-ups since; ``"relative"``: divided by the root mean square of the row's weights at the snapshot (of
                a column shard, of its part).
            least_touches: look-ups since, fewer of which make a row's movement infinite: it was not tried.
            scale: look-ups that a counted one stands for.
        """
        touched = self.shard.touches(self.rows) - self._touches
        # Counts near the end of int32 are lowered (RowCounts.lower_high): such a row was touched, and how.
        touched = torch.where(touched < 0, 2**30, touched) * scale
        moved = torch.empty(self.rows.numel(), dtype=torch.float32, device=self.rows.device)
        part = max(1, _CHUNK_BYTES // (4 * self.shard.at.dim))
        for begin in range(0, self.rows.numel(), part):
            some = slice(begin, begin + part)
            before = self._weights[some].float()
            distance = (self.shard.weights(self.rows[some]).float() - before).abs().amax(dim=1)
            if kind == "per_touch":
                distance = distance / touched[some]
            elif kind == "relative":
                distance = distance / before.square().mean(dim=1).sqrt()
            moved[some] = distance
        # What was not tried, or has become NaN, is not stale; nor is a row of zeros, of which nothing is a share.
        moved = torch.where((touched >= least_touches) & moved.isfinite(), moved, torch.inf)
        return ShardMovement(self.shard, self.rows.cpu().numpy(), moved.cpu().numpy())

    def state_dict(self) -> dict[str, Tensor]:
        """The rows, their weights and touches at the time."""
        return {"rows": self.rows, "weights": self._weights, "touches": self._touches}

    @classmethod
    def from_state(cls, shard: WatchedShard, state: Mapping[str, Tensor]) -> Snapshot:
        """What :meth:`state_dict` told of."""
        one = cls.__new__(cls)
        one.shard = shard
        one.rows, one._weights, one._touches = (state[name].to(shard.device) for name in ("rows", "weights", "touches"))
        return one


def snapshots(shards: Iterable[WatchedShard], hot: RowSets) -> list[Snapshot]:
    """Of the hot rows of all shards."""
    taken = []
    for shard in shards:
        part = hot.of(shard.at.fqn)[shard.at.row_offset : shard.at.row_offset + shard.at.rows]
        taken.append(Snapshot(shard, part.nonzero().squeeze(1)))
    return taken


@dataclass(frozen=True)
class ShardMovement:
    """Movement of ``rows`` (ascending, of the shard): float32 ``[n]``, infinite where a row was not tried."""

    shard: WatchedShard
    rows: Ints
    moved: Floats

    def below(self, threshold: float) -> ShardRows:
        """The shard's rows that moved less."""
        mask = np.zeros(self.shard.at.rows, dtype=np.bool_)
        mask[self.rows[self.moved.astype(np.float64) < threshold]] = True
        return ShardRows.of(self.shard.at, mask)


@dataclass(frozen=True)
class TableMovement:
    """What all ranks' sampled inputs looked up in a table: distinct rows ``ids`` (ascending), their look-ups, and how
    far they moved (float64, the most of all column shards; infinite where it is not known)."""

    ids: Ints
    lookups: Ints
    moved: npt.NDArray[np.float64]


def movements_of(
    wanted: Mapping[str, tuple[Ints, Ints]],
    tables: Mapping[str, ModelTable],
    mine: Sequence[ShardMovement],
    ranks: Ranks,
) -> dict[str, TableMovement]:
    """The movement of rows that any rank asks for, on all ranks: a collective call.

    Args:
        wanted: by fqn, distinct rows (ascending) and this rank's look-ups of each.
        tables: the model's, by fqn.
        mine: of this rank's shards.
    """
    asked: dict[str, list[tuple[Ints, Ints]]] = {}
    for of_rank in ranks.gather(dict(wanted)):
        for fqn, rows in of_rank.items():
            asked.setdefault(fqn, []).append(rows)
    found = {}
    for fqn in sorted(asked):
        ids, places = np.unique(np.concatenate([rows for rows, _ in asked[fqn]]), return_inverse=True)
        lookups = np.zeros(len(ids), dtype=np.int64)
        np.add.at(lookups, places, np.concatenate([counts for _, counts in asked[fqn]]))
        found[fqn] = TableMovement(ids, lookups, np.zeros(len(ids)))
    answers = [_answer(one, found[one.shard.at.fqn].ids) for one in mine if one.shard.at.fqn in found]
    columns = {fqn: np.zeros(len(one.ids), dtype=np.int64) for fqn, one in found.items()}
    seen = set()
    for of_rank in ranks.gather(answers):
        for fqn, place, width, at, moved in of_rank:
            if (fqn, place) not in seen:  # else a replica
                seen.add((fqn, place))
                found[fqn].moved[at] = np.maximum(found[fqn].moved[at], moved)
                columns[fqn][at] += width
    for fqn, one in found.items():
        one.moved[columns[fqn] != tables[fqn].dim] = np.inf
    return found


def _answer(one: ShardMovement, ids: Ints) -> tuple[str, tuple[int, int], int, Ints, Floats]:
    """Of the ``ids`` those that the shard has, and their movement."""
    shard = one.shard.at
    _, at, here = np.intersect1d(ids - shard.row_offset, one.rows, assume_unique=True, return_indices=True)
    place = shard.row_offset, shard.col_offset
    return shard.fqn, place, shard.dim, at.astype(np.int64), one.moved[here]


@dataclass(frozen=True)
class Scale:
    """A table's movements and the share of its look-ups that moved less: distinct values, ascending, and for each the
    share ``below`` it, in ``[0, 1)``."""

    values: npt.NDArray[np.float64]
    below: npt.NDArray[np.float64]

    @classmethod
    def of(cls, one: TableMovement) -> Scale:
        """Measured on sampled look-ups."""
        values, places = np.unique(one.moved, return_inverse=True)
        mass = np.bincount(places, weights=one.lookups, minlength=len(values))
        return cls(values, (np.cumsum(mass) - mass) / max(1.0, mass.sum()))

    def shares(self, one: TableMovement) -> TableMovement:
        """The same movements as shares; infinite ones stay so."""
        below = self.below[np.searchsorted(self.values, one.moved)]
        return replace(one, moved=np.where(np.isfinite(one.moved), below, np.inf))

    def threshold(self, share: float) -> float:
        """The movement below which are just the rows whose share is below ``share``."""
        at = int(np.searchsorted(self.below, share))
        return float(self.values[at]) if at < len(self.values) else float("inf")
