"""Sets of rows, and which look-ups of a batch are in them: hot rows for FAE, stale rows for Slipstream.

A loader's batch has look-ups of rows on all ranks, so every rank keeps every table's set. Memory: 1 byte of host memory
for every row of a table of which some rows are in the set, nothing for a table of which all or none are; and as much on
a device from the first batch that lies there. Ranks send each other 1 bit a row.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from torchrec_slipstream.errors import InputError, StateError
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe import TableShard
from torchrec_slipstream.tbe.features import ModelTable

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ShardRows:
    """Which rows of one shard are in a set: bool ``[rows of the shard]``.

    ``table`` is the table's fqn; the shard begins at ``row_offset`` and ``col_offset`` and is ``columns`` wide.
    """

    table: str
    row_offset: int
    col_offset: int
    columns: int
    rows: Bools

    @classmethod
    def of(cls, shard: TableShard, rows: Bools) -> ShardRows:
        """The set of a shard that this rank has."""
        return cls(shard.fqn, shard.row_offset, shard.col_offset, shard.dim, rows)


@dataclass(frozen=True)
class SampleLookups:
    """How many look-ups each sample has, and how many of them are in a set.

    Attributes:
        features: those of the batch's features that look up in a table, ``F`` of them.
        lookups, inside: int64 ``[F, B]``, where the batch lies.
    """

    features: tuple[str, ...]
    lookups: Tensor
    inside: Tensor

    @property
    def all_inside(self) -> Tensor:
        """bool ``[B]``, samples of which every look-up is in the set; true of one without look-ups."""
        return (self.lookups == self.inside).all(dim=0)


class RowSets:
    """A set of rows of every table.

    A feature that looks up in several tables has one look-up of each sample's id, which is in the set only if the row
    is in the set of all of them. An id that is no row of its table is in no set.

    Args:
        tables: the model's.
        members: by fqn: bool ``[rows]`` on the CPU, or True for all rows, or False for none, as for tables not named.
    """

    def __init__(self, tables: Iterable[ModelTable], members: Mapping[str, Tensor | bool]) -> None:
        self.tables = {table.fqn: table for table in tables}
        self._of_feature: dict[str, list[ModelTable]] = {}
        # With a False at either end, where ids that are no rows are sent.
        self._padded: dict[str, Tensor] = {}
        self._copies: dict[torch.device, dict[str, Tensor]] = {}
        self._whole: set[str] = set()
        for fqn, table in self.tables.items():
            for feature in table.features:
                self._of_feature.setdefault(feature, []).append(table)
            rows = members.get(fqn, False)
            number = (table.rows if rows else 0) if isinstance(rows, bool) else int(rows.sum())
            if number == table.rows:
                self._whole.add(fqn)
            elif number and isinstance(rows, Tensor):
                self._padded[fqn] = torch.zeros(table.rows + 2, dtype=torch.bool)
                self._padded[fqn][1:-1] = rows

    @classmethod
    def all_rows(cls, tables: Iterable[ModelTable]) -> RowSets:
        """All rows of all tables."""
        tables = list(tables)
        return cls(tables, dict.fromkeys((table.fqn for table in tables), True))

    @classmethod
    def of_shards(cls, tables: Iterable[ModelTable], shards: Iterable[ShardRows], whole: Iterable[str] = ()) -> RowSets:
        """Put the sets of shards together: a row is in a table's if it is in that of all its column shards.

        Args:
            shards: of all ranks. Of replicas the first counts.
            whole: fqns of tables of which all rows are in the set, whatever the shards say.
        """
        by_fqn = {table.fqn: table for table in tables}
        covered = {}
        seen = set()
        for shard in shards:
            place = shard.table, shard.row_offset, shard.col_offset
            if place in seen:
                continue
            seen.add(place)
            if shard.table not in covered:
                covered[shard.table] = np.zeros(by_fqn[shard.table].rows, dtype=np.uint16)
            # In columns: row shards of different column shards may begin at different rows.
            part = covered[shard.table][shard.row_offset : shard.row_offset + len(shard.rows)]
            part[shard.rows] += np.uint16(shard.columns)
        members: dict[str, Tensor | bool] = {
            fqn: torch.from_numpy(columns == by_fqn[fqn].dim) for fqn, columns in covered.items()
        }
        return cls(by_fqn.values(), members | dict.fromkeys(whole, True))

    @classmethod
    def gathered(
        cls, tables: Iterable[ModelTable], mine: Sequence[ShardRows], ranks: Ranks, whole: Iterable[str] = ()
    ) -> RowSets:
        """:meth:`of_shards` of all ranks' shards, from each rank's own: a collective call.

        Until it is done a rank needs, besides the sets, a bit for every row that one rank holds and 2 bytes for every
        row of the tables.
        """
        packed = [np.packbits(shard.rows) for shard in mine]
        places = [(s.table, s.row_offset, s.col_offset, s.columns, len(s.rows)) for s in mine]
        by_rank = ranks.gather(places)
        sizes = [sum(_bytes(place[-1]) for place in of_rank) for of_rank in by_rank]
        bits = ranks.each(np.concatenate([np.empty(0, dtype=np.uint8), *packed]), sizes)
        return cls.of_shards(tables, _unpacked(by_rank, bits), whole)

    def of(self, fqn: str) -> Tensor:
        """bool ``[rows]``, the set of one table."""
        if fqn in self._padded:
            return self._padded[fqn][1:-1]
        return torch.full((self.tables[fqn].rows,), fqn in self._whole)

    def sizes(self) -> dict[str, int]:
        """Rows in each table's set."""
        return {fqn: int(self.of(fqn).sum()) for fqn in self.tables}

    # ------------------------------------------------------------------------------------------- a batch

    def tables_of(self, feature: str) -> Sequence[ModelTable]:
        """The tables that a feature looks up in; none of a key that the model does not know."""
        return self._of_feature.get(feature, ())

    def lookups_in(self, features: KeyedJaggedTensor) -> Tensor:
        """bool ``[look-ups]`` where the batch lies, in the order of ``features.values()``.

        Those of a feature that looks up in no table are False. On a GPU the host waits for ``offset_per_key()``, unless
        the KJT knows it from before it was copied there.
        """
        ids = features.values()
        sets = self._padded_on(ids.device)
        inside = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
        bounds = features.offset_per_key()
        for feature, begin, end in zip(features.keys(), bounds[:-1], bounds[1:], strict=True):
            tables = self.tables_of(feature)
            if begin == end or not tables:
                continue
            part = self._are_in(tables[0], ids[begin:end], sets)
            for table in tables[1:]:
                part = part & self._are_in(table, ids[begin:end], sets)
            inside[begin:end] = part
        return inside

    def _padded_on(self, device: torch.device) -> Mapping[str, Tensor]:
        if device.type == "cpu":
            return self._padded
        if device not in self._copies:
            self._copies[device] = {fqn: rows.to(device) for fqn, rows in self._padded.items()}
        return self._copies[device]

    def _are_in(self, table: ModelTable, ids: Tensor, sets: Mapping[str, Tensor]) -> Tensor:
        if table.fqn in sets:
            return sets[table.fqn].index_select(0, (ids + 1).clamp(0, table.rows + 1))
        if table.fqn in self._whole:
            return (ids >= 0) & (ids < table.rows)
        return torch.zeros_like(ids, dtype=torch.bool)

    def samples(self, features: Sequence[KeyedJaggedTensor]) -> SampleLookups:
        """How many look-ups each sample has, and how many are in the set; ``features``: all KJTs of one batch.

        Raises:
            InputError: there is none.
        """
        if not features:
            raise InputError("the batch has no KeyedJaggedTensor, so its samples look up no rows; give it one")
        names: list[str] = []
        lookups, inside = [], []
        for one in features:
            keys, size = one.keys(), one.stride()
            known = [place for place, key in enumerate(keys) if key in self._of_feature]
            found = _sum_bags(self.lookups_in(one), one.offsets()).view(len(keys), size)
            inside.append(found[known])
            lookups.append(one.lengths().long().view(len(keys), size)[known])
            names += [keys[place] for place in known]
        return SampleLookups(tuple(names), torch.cat(lookups), torch.cat(inside))

    # ------------------------------------------------------------------------------------------- kept

    def state_dict(self) -> dict[str, Any]:
        """``whole``: the tables of which all rows are in the set; ``bits``: uint8, a bit a row, of those of which some
        are."""
        bits = {fqn: torch.from_numpy(np.packbits(rows[1:-1].numpy())) for fqn, rows in self._padded.items()}
        return {"whole": sorted(self._whole), "bits": bits}

    @classmethod
    def from_state(cls, tables: Iterable[ModelTable], state: Mapping[str, Any]) -> RowSets:
        """What :meth:`state_dict` told of.

        Raises:
            StateError: it is of other tables.
        """
        by_fqn = {table.fqn: table for table in tables}
        whole, bits = state.get("whole", ()), state.get("bits", {})
        unknown = sorted((set(whole) | set(bits)) - set(by_fqn))
        if unknown or any(part.numel() != _bytes(by_fqn[fqn].rows) for fqn, part in bits.items()):
            raise StateError(
                f"the saved sets of rows are of other tables ({unknown or sorted(bits)}); resume with the model that "
                "they were saved with"
            )
        members: dict[str, Tensor | bool] = dict.fromkeys(whole, True)
        for fqn, part in bits.items():
            rows = np.unpackbits(part.cpu().numpy(), count=by_fqn[fqn].rows)
            members[fqn] = torch.from_numpy(rows.view(np.bool_))
        return cls(by_fqn.values(), members)

    @property
    def digest(self) -> int:
        """A checksum: equal sets have the same."""
        state = self.state_dict()
        parts = [fqn.encode() + bits.numpy().tobytes() for fqn, bits in sorted(state["bits"].items())]
        return zlib.crc32(b"".join([*(fqn.encode() for fqn in state["whole"]), b"|", *parts]))


def _sum_bags(mask: Tensor, offsets: Tensor) -> Tensor:
    """int64 ``[bags]``, how many of each bag's look-ups are set."""
    running = torch.zeros(mask.numel() + 1, dtype=torch.int32, device=mask.device)
    if mask.is_cpu:  # where torch.cumsum takes longer
        np.cumsum(mask.numpy(), dtype=np.int32, out=running[1:].numpy())
    else:
        torch.cumsum(mask, 0, dtype=torch.int32, out=running[1:])
    return running.index_select(0, offsets).diff().long()


def _bytes(rows: int) -> int:
    return -(-rows // 8)


def _unpacked(
    by_rank: Sequence[Sequence[tuple[str, int, int, int, int]]], bits: Iterable[npt.NDArray[np.uint8]]
) -> Iterator[ShardRows]:
    for places, of_rank in zip(by_rank, bits, strict=True):
        begin = 0
        for table, row_offset, col_offset, columns, rows in places:
            mask = np.unpackbits(of_rank[begin : begin + _bytes(rows)], count=rows) > 0
            begin += _bytes(rows)
            yield ShardRows(table, row_offset, col_offset, columns, mask)
