"""Reads Criteo-format click logs: parquet, TSV and gzipped TSV.

A record is a label, 13 integer features I1..I13 and 26 categorical ones C1..C26, any of the features missing. The
published logs are tab-separated without a header, the categories as hexadecimal strings; parquet copies hold the same
columns by name, the categories as integers or as the same strings. The same record gives the same sample either way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
import torch

from examples.samples import DENSE_NAMES, SPARSE_NAMES, Samples, batches

__all__ = ["DataError", "Samples", "batches", "hash_ids", "load_criteo"]

COLUMNS = ("label", *DENSE_NAMES, *SPARSE_NAMES)
FORM = "40 tab-separated fields a line (label, I1..I13 as numbers, C1..C26 as hexadecimal), empty where missing"
# Records parsed at a time: bounds what the columns need besides the result, at no cost in speed.
CHUNK = 1 << 17


class DataError(ValueError):
    """A data file that cannot be used; the message names the file, the place, the value and the remedy."""


def load_criteo(path: str | Path, rows_per_table: int, limit: int | None = None) -> Samples:
    """Read a Criteo-format file.

    Dense features become log1p of their value, negative and missing ones 0. Categories are hashed with their
    feature's number into rows 1 .. rows_per_table-1 (deterministic: any process, any platform); a missing one is row 0.

    Args:
        path: a `.parquet`, `.tsv`, `.txt` or `.tsv.gz` file; what is not parquet by its name is read as TSV.
        rows_per_table: rows of each of the 26 tables, 2 or more.
        limit: read the first so many records only (1 or more); None: all.

    Raises:
        DataError: the file is missing, truncated, malformed, empty, or has columns, types or values that do not fit.
        ValueError: rows_per_table or limit out of range.
    """
    path = Path(path)
    if rows_per_table < 2:
        raise ValueError(f"rows_per_table is {rows_per_table}; give 2 or more (row 0 is for missing values)")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; give 1 or more, or None for the whole file")
    parquet = path.suffix == ".parquet"
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    done = 0
    try:
        for table in _read_parquet(path) if parquet else _read_tsv(path):
            table = table.slice(0, CHUNK if limit is None else limit - done)
            if table.num_rows:
                parts.append(_convert(table, rows_per_table, _Place(path, "record" if parquet else "line", done)))
                done += table.num_rows
            if done == limit:
                break
    except (pa.ArrowException, OSError) as error:  # DataError is neither: it passes through
        raise DataError(_explain(path, error, parquet)) from error
    if not parts:
        raise DataError(f"{path} holds no records; give a file with at least one")
    dense, sparse, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
    return Samples(dense, sparse, labels, (rows_per_table,) * len(SPARSE_NAMES))


def hash_ids(values: np.ndarray, feature: int, rows_per_table: int) -> np.ndarray:
    """Category values of one feature to rows 1 .. rows_per_table-1.

    splitmix64's finaliser over the value plus a multiple of its golden-ratio step: every bit of the value reaches
    every bit of the hash, and a value that occurs in two features falls on two unrelated rows.

    Args:
        values: uint64 [N]
        feature: 0 .. 25
    Returns:
        int64 [N]
    """
    z = values + np.uint64((feature + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return (z % np.uint64(rows_per_table - 1)).astype(np.int64) + 1


class _Place:
    """Where a chunk lies in its file, to say where a bad value is."""

    def __init__(self, path: Path, unit: str, start: int) -> None:
        self.path, self.unit, self.start = path, unit, start

    def error(self, column: str, row: int, value: object, remedy: str) -> DataError:
        """An error for `row` (from 0) of this chunk; messages count from 1."""
        where = f"{self.path}, {self.unit} {self.start + row + 1}, column {column}"
        return DataError(f"{where}: the value is {value!r}; {remedy}")


def _read_parquet(path: Path) -> Iterator[pa.Table]:
    file = pyarrow.parquet.ParquetFile(path)
    missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
    if missing:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing)} (it has {', '.join(file.schema_arrow.names) or 'none'}); "
            "name them label, I1..I13, C1..C26"
        )
    for batch in file.iter_batches(batch_size=CHUNK, columns=list(COLUMNS)):
        yield pa.Table.from_batches([batch])


def _read_tsv(path: Path) -> Iterator[pa.Table]:
    # Categories stay bytes: _parse_hex then names a bad one, whatever bytes it is made of.
    types = {"label": pa.float64(), **dict.fromkeys(DENSE_NAMES, pa.float64())}
    types.update(dict.fromkeys(SPARSE_NAMES, pa.binary()))
    reader = pyarrow.csv.open_csv(
        path,  # Arrow sees by the name that .gz is compressed
        # Not threaded: it would save little here, and Arrow then names no line in its errors.
        read_options=pyarrow.csv.ReadOptions(column_names=list(COLUMNS), use_threads=False, block_size=1 << 24),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=pyarrow.csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True),
    )
    for batch in reader:
        table = pa.Table.from_batches([batch])
        for start in range(0, table.num_rows, CHUNK):
            yield table.slice(start, CHUNK)


def _convert(table: pa.Table, rows_per_table: int, place: _Place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One chunk as dense float32 [n, 13], sparse int64 [n, 26], labels float32 [n]."""
    n = table.num_rows
    labels = _numbers(table, "label", place)
    bad = np.flatnonzero((labels != 0) & (labels != 1))  # NaN, a missing label, is neither
    if bad.size:
        value = table["label"][int(bad[0])].as_py()
        raise place.error("label", int(bad[0]), value, "a label is 0 or 1: correct it, or remove the record")
    dense = np.empty((n, len(DENSE_NAMES)), dtype=np.float32)
    for i, name in enumerate(DENSE_NAMES):
        values = np.nan_to_num(_numbers(table, name, place), nan=0.0, posinf=np.inf)
        infinite = np.flatnonzero(np.isposinf(values))
        if infinite.size:
            raise place.error(name, int(infinite[0]), float("inf"), "give a finite number, or leave it empty")
        dense[:, i] = np.log1p(np.maximum(values, 0.0))
    sparse = np.zeros((n, len(SPARSE_NAMES)), dtype=np.int64)
    for i, name in enumerate(SPARSE_NAMES):
        values, present = _categories(table, name, place)
        np.copyto(sparse[:, i], hash_ids(values, i, rows_per_table), where=present)
    return dense, sparse, labels.astype(np.float32)


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # Arrow keeps a lone or empty chunk wrapped in some releases
        column = column.chunk(0)
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _numbers(table: pa.Table, name: str, place: _Place) -> np.ndarray:
    """A numeric column as float64 [n], NaN where missing."""
    column = _column(table, name)
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{place.path}, column {name}: the type is {kind}; give integers or floats")
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    return np.asarray(column.cast(pa.float64(), safe=False).fill_null(np.nan))


def _categories(table: pa.Table, name: str, place: _Place) -> tuple[np.ndarray, np.ndarray]:
    """A categorical column as uint64 [n], and where it is present as bool [n]."""
    column = _column(table, name)
    kind = column.type
    if pa.types.is_null(kind):
        return np.zeros(len(column), np.uint64), np.zeros(len(column), np.bool_)
    present = np.asarray(column.is_valid())
    if pa.types.is_integer(kind):
        # Signed ids are taken by their bits: two's complement, so distinct stays distinct.
        wide = np.asarray(column.fill_null(0))
        return wide.astype(np.int64 if pa.types.is_signed_integer(kind) else np.uint64).view(np.uint64), present
    if any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)):
        values = _parse_hex(column.cast(pa.large_binary()).fill_null(b""), name, place)
        return values, present & (np.asarray(pc.binary_length(column).fill_null(0)) > 0)
    raise DataError(f"{place.path}, column {name}: the type is {kind}; give integers or hexadecimal strings")


_NIBBLES = np.full(256, 255, dtype=np.uint8)
for _digit in "0123456789abcdefABCDEF":
    _NIBBLES[ord(_digit)] = int(_digit, 16)


def _parse_hex(column: pa.Array, name: str, place: _Place) -> np.ndarray:
    """Hexadecimal strings (large_binary, no nulls, up to 16 digits) as uint64 [n]; an empty one is 0.

    A digit of all strings at a time: as many passes as the longest has digits, instead of a call a string.
    """
    n = len(column)
    offsets = np.frombuffer(column.buffers()[1], dtype=np.int64, count=n + 1, offset=8 * column.offset)
    start, length = offsets[:-1], np.diff(offsets)
    bad = length > 16
    values = np.zeros(n, dtype=np.uint64)
    if offsets[-1] > offsets[0]:
        text = np.frombuffer(column.buffers()[2], dtype=np.uint8)
        for digit in range(min(int(length.max()), 16)):
            here = length > digit
            nibble = _NIBBLES[text[np.where(here, start + digit, offsets[0])]]
            bad |= here & (nibble == 255)
            values = np.where(here, (values << np.uint64(4)) | nibble, values)
    if bad.any():
        row = int(np.argmax(bad))
        text_value = column[row].as_py().decode("utf-8", "backslashreplace")
        raise place.error(name, row, text_value, "give up to 16 hexadecimal digits, or leave it empty")
    return values


def _explain(path: Path, error: Exception, parquet: bool) -> str:
    """Arrow's error in this format's words: its columns by name, and what to do about it."""
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist; give the path of a Criteo-format .parquet, .tsv or .tsv.gz file"
    text = str(error)
    if "Empty CSV file" in text:
        return f"{path} holds no records (it is empty); give a file with at least one"
    if parquet:
        return f"{path} is not a whole parquet file ({text}); fetch or write it again"
    if "compressed" in text or "zlib" in text:
        return f"{path} is not a whole gzip file ({text}); fetch it again (`gzip -t` checks it)"
    text = re.sub(r"In CSV column #(\d+)", lambda match: f"column {COLUMNS[int(match[1])]}", text)
    return f"{path}: {text.replace('Row #', 'line ')}; a record is {FORM}: correct or remove the line"
