"""Access profiles as files (see ``torchrec_slipstream/archive.py``).

Arrays, for the i-th table: ``counts_i``, ``ids_i`` where it is sparse, and ``recurrence_i`` (int64 ``[4, k]``) where
two windows were measured; how many and how long they were is in the header. By number, so that a table may be called
anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access.profile import AccessProfile
from torchrec_slipstream.access.recurrence import Recurrence
from torchrec_slipstream.access.table import TableAccess
from torchrec_slipstream.archive import FileFormat, GetArray
from torchrec_slipstream.errors import ProfileError

FORMAT = FileFormat(
    name="torchrec_slipstream.access_profile",
    version=1,
    what="an access profile",
    writer="AccessProfile.save",
    remedy="measure again",
    error=ProfileError,
)
_FIELDS = ("name", "rows", "embedding_dim", "lookups", "element_size", "optimizer_bytes")
_WINDOWS = ("pairs", "earlier_samples", "later_samples")


def save(profile: AccessProfile, path: str | Path, *, compressed: bool = True) -> None:
    """Write a profile; the file appears whole or not at all. See :meth:`AccessProfile.save`."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    tables: list[dict[str, Any]] = []
    for i, table in enumerate(profile.tables.values()):
        arrays[f"counts_{i}"] = table.counts
        if table.ids is not None:
            arrays[f"ids_{i}"] = table.ids
        known = table.recurrence
        if known is not None:
            arrays[f"recurrence_{i}"] = np.stack([known.classes, known.rows, known.earlier, known.later])
        entry = {field: getattr(table, field) for field in _FIELDS}
        entry |= {"counted": table.counted_lookups, "sparse": table.ids is not None}
        windows = {field: getattr(known, field) for field in _WINDOWS} if known is not None else None
        tables.append(entry | {"recurrence": windows})
    header = {"samples": profile.samples, "sampled_every": profile.sampled_every, "tables": tables}
    FORMAT.write(path, header, arrays, compressed=compressed)


def load(path: str | Path) -> AccessProfile:
    """Read and check a profile. See :meth:`AccessProfile.load`."""
    return FORMAT.read(path, _parse)


def _parse(header: dict[str, Any], get: GetArray) -> AccessProfile:
    tables = [_table(i, entry, get) for i, entry in enumerate(header["tables"])]
    return AccessProfile(tables, header["samples"], header["sampled_every"])


def _table(i: int, entry: dict[str, Any], get: GetArray) -> TableAccess:
    def array(kind: str) -> npt.NDArray[Any]:
        try:
            return get(f"{kind}_{i}")
        except ProfileError as error:
            raise ProfileError(f"table {entry['name']!r}: {error}") from error.__cause__

    recurrence = None
    if (windows := entry["recurrence"]) is not None:
        recurrence = Recurrence(*array("recurrence"), **{field: windows[field] for field in _WINDOWS})
    table = TableAccess(
        counts=array("counts"),
        ids=array("ids") if entry["sparse"] else None,
        recurrence=recurrence,
        **{field: entry[field] for field in _FIELDS},
    )
    if table.counted_lookups != entry["counted"]:
        raise ProfileError(
            f"table {table.name!r}: the counts add up to {table.counted_lookups}, and the header says "
            f"{entry['counted']}; {FORMAT.remedy}"
        )
    return table
