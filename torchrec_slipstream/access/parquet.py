"""Measures an access profile straight from a parquet file: what :meth:`AccessProfile.from_parquet` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access.measure import in_sequence, row_state_bytes, shown
from torchrec_slipstream.access.profile import AccessProfile
from torchrec_slipstream.access.table import TableAccess
from torchrec_slipstream.access.tally import Tally
from torchrec_slipstream.errors import ProfileError

Hashing = Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | Literal["modulo"] | None
_Value = TypeVar("_Value")

# Samples read at a time.
_CHUNK = 1 << 17


@dataclass(frozen=True)
class _Column:
    name: str
    table: str
    rows: int | None
    hashing: Hashing
    # Of the first and the second half of the samples.
    tallies: tuple[Tally, Tally]


def from_parquet(
    path: str | Path,
    columns: Sequence[str] | Mapping[str, str] | None,
    *,
    embedding_dim: int | Mapping[str, int],
    rows: int | Mapping[str, int] | None,
    hashing: Hashing | Mapping[str, Hashing],
    limit: int | slice | None,
    null_row: int | None,
    element_size: int,
    optimizer: str,
    progress: bool,
) -> AccessProfile:
    """Count the ids in a parquet file's columns, read in parts of some 10^5 samples.

    A column holds integers, a look-up a sample, or lists of integers, as many look-ups as the list is long. Nulls are
    no look-ups, unless ``null_row`` says which row they look up.

    Ids are the table's rows, unless ``hashing`` turns them into rows as training does, for instance
    ``{"C1": lambda ids: hash_ids(ids.view(np.uint64), 0, 10**6), ...}`` with the hash of ``examples/criteo.py``.
    Published logs hold raw ids of 40 bits and more: counted as they are, they make a table of as many rows.

    The profile also knows what the first half of the samples said of the second (:meth:`AccessProfile.followed_by`).

    Args:
        path: the file.
        columns: the id columns; or a mapping of columns to tables, in which several columns may share a table. None:
            all columns of integers or of lists of integers.
        embedding_dim: of all tables, or by table.
        rows: of all tables, or by table; None: one more than the table's largest row.
        hashing: of all columns, or by column: a function from ids, int64 or uint64 ``[n]``, to rows, integers ``[n]``;
            or ``"modulo"``, the remainder by ``rows``; or None.
        limit: count the first so many samples only, or those of a slice without a step, in the file's order.
        null_row: row that a null looks up, after hashing (a null list, and a null in a list, are never look-ups).
        element_size: bytes of a weight.
        optimizer: see :meth:`AccessProfile.measure`.
        progress: show a progress bar, where ``tqdm`` is installed.

    Raises:
        ProfileError: the file cannot be read, or lacks a column; a column of another type; an id that is not a row; no
            look-up in all columns.
        ImportError: ``pyarrow`` is not installed.
    """
    pa, parquet = pyarrow_modules()
    path = Path(path)
    begin, end = _range(limit)
    try:
        with parquet.ParquetFile(path) as file:
            chosen = _columns(file.schema_arrow, path, columns, rows, hashing)
            total = file.metadata.num_rows
            end = total if end is None else min(end, total)
            names = [one.name for one in chosen]
            samples = [0, 0]
            half = (begin + max(end, begin)) // 2
            parts = chain(
                ((0, part) for part in _parts(pa, file, names, begin, half)),
                ((1, part) for part in _parts(pa, file, names, half, end)),
            )
            for window, part in shown(parts, None, progress):
                for one in chosen:
                    _count(pa, part.column(one.name), one, one.tallies[window], null_row, path)
                samples[window] += part.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ProfileError(f"{path} cannot be read as parquet ({error}); give a whole parquet file") from error
    windows: tuple[list[TableAccess], list[TableAccess]] = ([], [])
    for name in dict.fromkeys(one.table for one in chosen):
        dim = _of(embedding_dim, name, "embedding_dim", "table")
        state = row_state_bytes(optimizer, dim)
        found = [tally.finish() for tally in next(one for one in chosen if one.table == name).tallies]
        number = max(number for number, _, _ in found)
        for tables, (known, counts, ids) in zip(windows, found, strict=True):
            if ids is None and known < number:  # a size that was not given is the larger of both halves'
                counts = np.pad(counts, (0, number - known))
            tables.append(TableAccess(name, number, dim, counts, ids, element_size=element_size, optimizer_bytes=state))
    earlier, later = (AccessProfile(tables, number) for tables, number in zip(windows, samples, strict=True))
    measured = in_sequence(earlier, later)
    if not measured.lookups:
        raise ProfileError(
            f"{path} has no look-up in column(s) {', '.join(names)} (in {measured.samples} of its {total} samples); "
            "give samples with ids there, or null_row=... if a null looks a row up"
        )
    return measured


def pyarrow_modules() -> tuple[Any, Any]:
    """``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        ImportError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("reading parquet needs pyarrow: pip install pyarrow") from error
    return pyarrow, pyarrow.parquet


def _columns(
    schema: Any,
    path: Path,
    columns: Sequence[str] | Mapping[str, str] | None,
    rows: int | Mapping[str, int] | None,
    hashing: Hashing | Mapping[str, Hashing],
) -> list[_Column]:
    if isinstance(columns, str):
        raise ProfileError(f"columns={columns!r} is a string; give a list of column names")
    if columns is None:
        columns = [field.name for field in schema if _is_ids(field.type)]
    tables = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    if not tables:
        raise ProfileError(f"{path} has no column of integers or lists of integers to count; it has {schema.names}")
    if missing := [name for name in tables if name not in schema.names]:
        raise ProfileError(f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(schema.names)}")
    tallies: dict[str, tuple[Tally, Tally]] = {}
    chosen = []
    for name, table in tables.items():
        kind = schema.field(name).type
        if not _is_ids(kind):
            raise ProfileError(f"{path}, column {name!r} is {kind}; give integers or lists of integers")
        number = None if rows is None else _of(rows, table, "rows", "table")
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ProfileError(f"table {table!r}: rows={number!r}; give an integer of at least 1")
        way: Hashing = hashing.get(name) if isinstance(hashing, Mapping) else hashing
        if way is not None and way != "modulo" and not callable(way):
            raise ProfileError(f"column {name!r}: hashing={way!r}; give a function, 'modulo' or None")
        if way == "modulo" and number is None:
            raise ProfileError(f"column {name!r} is hashed by 'modulo', which needs rows=... of table {table!r}")
        chosen.append(_Column(name, table, number, way, tallies.setdefault(table, (Tally(number), Tally(number)))))
    return chosen


def _is_ids(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_ids(kind.value_type)
    return types.is_integer(kind) or (_is_list(kind) and types.is_integer(kind.value_type))


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _parts(pa: Any, file: Any, names: list[str], begin: int, end: int) -> Iterator[Any]:
    """The samples ``[begin, end)`` of the file as record batches; row groups outside of them are not read."""
    groups: list[int] = []
    first = at = 0
    for group in range(file.metadata.num_row_groups):
        after = at + file.metadata.row_group(group).num_rows
        if after > begin and at < end:
            if not groups:
                first = at
            groups.append(group)
        at = after
    if not groups:
        return
    at = first
    for batch in file.iter_batches(batch_size=_CHUNK, columns=names, row_groups=groups):
        low, high = max(begin - at, 0), min(end - at, batch.num_rows)
        if high > low:
            yield batch.slice(low, high - low)
        at += batch.num_rows
        if at >= end:
            return


def _count(pa: Any, values: Any, column: _Column, tally: Tally, null_row: int | None, path: Path) -> None:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    nulls = 0
    if _is_list(values.type):
        values = values.flatten()  # of this slice, without those of null lists
    else:
        nulls = values.null_count
    ids = values.drop_null().to_numpy(zero_copy_only=False)
    ids = ids.astype(np.uint64 if ids.dtype.kind == "u" else np.int64, copy=False)
    if callable(column.hashing):
        ids = _hashed(ids, column.hashing, column.name)
    elif column.hashing == "modulo":
        ids = ids % ids.dtype.type(column.rows)
    if null_row is not None and nulls:
        ids = np.concatenate([ids.astype(np.int64), np.full(nulls, null_row)])
    highest = 2**63 - 1 if column.rows is None else column.rows - 1
    if len(ids) and (ids.min() < 0 or ids.max() > highest):
        bad = ids.min() if ids.min() < 0 else ids.max()
        size = f", which has {column.rows} rows" if column.rows is not None else ""
        raise ProfileError(
            f"{path}, column {column.name!r}: id {bad} is not a row of table {column.table!r}{size}; give rows=... "
            "that hold all ids, or hashing=... as training does it"
        )
    tally.add(ids)


def _hashed(ids: npt.NDArray[Any], hashing: Callable[[Any], Any], column: str) -> npt.NDArray[np.integer]:
    rows = np.asarray(hashing(ids))
    if rows.dtype.kind not in "iu" or rows.shape != ids.shape:
        raise ProfileError(
            f"column {column!r}: hashing gave {rows.dtype} {rows.shape} for {ids.shape} ids; it has to give an integer "
            "row for each id"
        )
    return rows


def _range(limit: int | slice | None) -> tuple[int, int | None]:
    """First sample and the one after the last."""
    bounds = limit if isinstance(limit, slice) else slice(0, limit)
    begin, end = 0 if bounds.start is None else bounds.start, bounds.stop
    for value in (begin, end):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ProfileError(f"limit={limit!r}; give a number of samples, or a slice of numbers of at least 0")
    if bounds.step not in (None, 1) or (end is not None and end < begin):
        raise ProfileError(f"limit={limit!r}; give a slice that goes forward, without a step")
    return begin, end


def _of(given: _Value | Mapping[str, _Value], name: str, what: str, kind: str) -> _Value:
    if not isinstance(given, Mapping):
        return given
    if name not in given:
        raise ProfileError(f"{what} names no {kind} {name!r}; it has {', '.join(map(repr, given)) or 'none'}")
    return given[name]
