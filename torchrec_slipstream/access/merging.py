"""The counts of all ranks' shards, brought together into whole logical tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_slipstream.access.profile import AccessProfile
from torchrec_slipstream.access.table import TableAccess
from torchrec_slipstream.ranks import Ranks

# Rows that cross at a time, so that a rank which is not to have the profile needs little memory.
_CHUNK = 1 << 22

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PartInfo:
    """Which part of which table some counts are of, and what they come to; travels to all ranks.

    ``begin`` and ``rows`` are the part's rows in the table, ``samples`` the samples that its ``lookups`` came from;
    both can be fractions where they have faded. ``largest`` is its largest count. A sketch's part has its rows (int64,
    numbered in the table) and counts with it.
    """

    collection: str
    table: str
    table_rows: int
    embedding_dim: int
    element_size: int
    optimizer_bytes: int
    begin: int
    rows: int
    samples: float
    lookups: float = 0.0
    largest: int = 0
    sketch: tuple[Int64s, Int64s] | None = None


@dataclass(frozen=True)
class Part:
    """Counts of one part; ``read(begin, end)`` gives those of a range of its rows as an int64 CPU tensor."""

    info: PartInfo
    read: Callable[[int, int], Tensor] | None = None

    @staticmethod
    def dense(info: PartInfo, read: Callable[[int, int], Tensor]) -> Part:
        lookups = largest = 0
        for begin, end in _chunks(info.rows):
            counts = read(begin, end)
            lookups, largest = lookups + int(counts.sum()), max(largest, int(counts.max()))
        return Part(replace(info, lookups=lookups, largest=largest), read)

    @staticmethod
    def sparse(info: PartInfo, rows: Int64s, counts: Int64s, lookups: float) -> Part:
        """``rows`` are numbered within the part; ``lookups`` are all that there were."""
        return Part(replace(info, lookups=lookups, sketch=(rows + info.begin, counts)))


def merge(parts: list[Part], sampled_every: int, ranks: Ranks, dst: int | None) -> AccessProfile | None:
    """The profile of all ranks' ``parts`` on rank ``dst``, or (None) on all; None on the others."""
    tables: dict[tuple[str, str], list[tuple[int, int, PartInfo]]] = {}
    for owner, infos in enumerate(ranks.gather([part.info for part in parts])):
        for place, info in enumerate(infos):
            tables.setdefault((info.collection, info.table), []).append((owner, place, info))
    alike = Counter(table for _, table in tables)
    merged: list[TableAccess] = []
    samples = 0
    for (collection, table), found in sorted(tables.items(), key=lambda item: item[0]):
        infos = [info for _, _, info in found]
        samples = max(samples, round(_most_by_rows(infos, "samples")))
        sketches = [info.sketch for info in infos if info.sketch is not None]
        ids, counts = _joined(sketches) if sketches else (None, _collected(found, parts, ranks, dst))
        if counts is not None:
            merged.append(_table(table if alike[table] == 1 else f"{collection}.{table}", infos, counts, ids))
    return AccessProfile(merged, samples, sampled_every) if dst is None or dst == ranks.mine else None


def _collected(
    found: list[tuple[int, int, PartInfo]], parts: list[Part], ranks: Ranks, dst: int | None
) -> npt.NDArray[Any] | None:
    """Counts of all rows of one table, or None on a rank that is not to have them. ``found`` are its parts with the
    rank that owns each and the place there."""
    infos = [info for _, _, info in found]
    counts: npt.NDArray[Any] | None = None
    if dst is None or dst == ranks.mine:
        dtype = np.int32 if _most_by_rows(infos, "largest") < 2**31 else np.int64
        counts = np.zeros(infos[0].table_rows, dtype=dtype)
    for owner, place, info in found:
        read = parts[place].read if owner == ranks.mine else None
        if read is None and counts is None:
            continue
        for begin, end in _chunks(info.rows):
            chunk = read(begin, end) if read is not None else torch.empty(end - begin, dtype=torch.int64)
            chunk = ranks.move(chunk, owner, dst)
            if counts is not None:
                counts[info.begin + begin : info.begin + end] += chunk.numpy()
    return counts


def _table(name: str, infos: list[PartInfo], counts: npt.NDArray[Any], ids: Int64s | None) -> TableAccess:
    first = infos[0]
    # Counts are rounded one by one where they fade, so that they can add up to more than half of all.
    lookups = max(round(sum(info.lookups for info in infos)), int(counts.sum(dtype=np.int64)))
    return TableAccess(
        name=name,
        rows=first.table_rows,
        embedding_dim=first.embedding_dim,
        counts=counts,
        ids=ids,
        lookups=lookups,
        element_size=first.element_size,
        optimizer_bytes=first.optimizer_bytes,
    )


def _most_by_rows(infos: list[PartInfo], field: str) -> float:
    """Of one table: parts of other rows are other look-ups of the same samples; several of the same rows (replicas)
    add up."""
    by_begin: dict[int, float] = {}
    for info in infos:
        by_begin[info.begin] = by_begin.get(info.begin, 0) + getattr(info, field)
    return max(by_begin.values())


def _joined(sketches: list[tuple[Int64s, Int64s]]) -> tuple[Int64s, Int64s]:
    """Ascending rows and their counts, of several lists."""
    rows, places = np.unique(np.concatenate([rows for rows, _ in sketches]), return_inverse=True)
    counts = np.zeros(len(rows), dtype=np.int64)
    np.add.at(counts, places, np.concatenate([counts for _, counts in sketches]))
    return rows, counts


def _chunks(rows: int) -> Iterable[tuple[int, int]]:
    return ((begin, min(begin + _CHUNK, rows)) for begin in range(0, rows, _CHUNK))
