"""Placements as files (see ``torchrec_slipstream/archive.py``): hot rows as one array a shard."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_slipstream.archive import FileFormat, GetArray
from torchrec_slipstream.errors import PlanError
from torchrec_slipstream.placement.placement import Placement, ShardPlacement, TablePlacement

FORMAT = FileFormat(
    name="torchrec_slipstream.placement",
    version=1,
    what="a placement",
    writer="Placement.save",
    remedy="plan and save it again",
    error=PlanError,
)
_SHARD = [one.name for one in fields(ShardPlacement) if one.name != "hot_rows"]
_TABLE = [one.name for one in fields(TablePlacement)]
_WHOLE = [one.name for one in fields(Placement) if one.name not in ("tables", "shards")]


def save(placement: Placement, path: str | Path) -> None:
    """Write a placement; the file appears whole or not at all. See :meth:`Placement.save`."""
    header = {name: getattr(placement, name) for name in _WHOLE}
    header["tables"] = [{name: getattr(table, name) for name in _TABLE} for table in placement.tables.values()]
    header["shards"] = [{name: getattr(shard, name) for name in _SHARD} for shard in placement.shards]
    FORMAT.write(path, header, {f"hot_{i}": shard.hot_rows for i, shard in enumerate(placement.shards)})


def load(path: str | Path) -> Placement:
    """Read and check a placement. See :meth:`Placement.load`."""
    return FORMAT.read(path, _parse)


def _parse(header: dict[str, Any], array: GetArray) -> Placement:
    tables = [TablePlacement(**{name: entry[name] for name in _TABLE}) for entry in header["tables"]]
    shards = []
    for i, entry in enumerate(header["shards"]):
        hot_rows = array(f"hot_{i}")
        shard = ShardPlacement(hot_rows=hot_rows, **{name: entry[name] for name in _SHARD})
        if hot_rows.dtype != np.int64 or hot_rows.ndim != 1 or not shard.has_good_rows:
            raise PlanError(
                f"table {entry['table']!r}, rank {entry['rank']}: the hot rows are not ascending rows of "
                f"{entry['rows']}; {FORMAT.remedy}"
            )
        shards.append(shard)
    whole: dict[str, Any] = {
        name: tuple(value) if isinstance(value := header[name], list) else value for name in _WHOLE
    }
    return Placement(tables={table.fqn: table for table in tables}, shards=tuple(shards), **whole)
