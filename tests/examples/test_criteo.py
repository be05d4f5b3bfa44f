"""Criteo files: every form of a record gives the same sample, and every bad file an error that names the place."""

import gzip
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.criteo import COLUMNS, DataError, hash_ids, load_criteo
from examples.samples import SPARSE_NAMES, Samples

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "criteo_tb_80k.parquet"
ROWS = 1000

Record = list[int | None]


def make_records(n: int, seed: int = 0) -> list[Record]:
    """Label, 13 dense, 26 categories of up to 64 bits; a fifth of the features missing."""
    random = np.random.default_rng(seed)
    records: list[Record] = []
    for _ in range(n):
        values = [*random.integers(-2, 5000, 13).tolist(), *(int(v) for v in random.integers(0, 1 << 62, 26))]
        records.append([int(random.integers(2)), *(None if random.random() < 0.2 else v for v in values)])
    return records


def tsv_line(record: Record) -> str:
    numbers = ["" if v is None else str(v) for v in record[:14]]
    return "\t".join(numbers + ["" if v is None else f"{v:08x}" for v in record[14:]])


def write_tsv(path: Path, lines: list[str]) -> Path:
    text = "".join(line + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path: Path, records: list[Record], **changed: pa.Array | None) -> Path:
    """The records, categories as int64; `changed` replaces columns, or leaves out those that are None."""
    columns: dict[str, Any] = {}
    for i, name in enumerate(COLUMNS):
        columns[name] = pa.array([record[i] for record in records], pa.int64() if i > 13 else pa.int32())
    columns.update(changed)
    pq.write_table(pa.table({name: column for name, column in columns.items() if column is not None}), path)
    return path


def assert_equal(a: Samples, b: Samples) -> None:
    for name in ("dense", "sparse", "labels"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=0)
    assert a.table_rows == b.table_rows


# --- what is read -----------------------------------------------------------------------------------------------------


def test_tsv_gzip_and_parquet_give_equal_samples(tmp_path: Path) -> None:
    records = make_records(200)
    lines = [tsv_line(record) for record in records]
    from_tsv = load_criteo(write_tsv(tmp_path / "a.tsv", lines), ROWS)
    assert len(from_tsv) == 200
    assert_equal(from_tsv, load_criteo(write_tsv(tmp_path / "a.tsv.gz", lines), ROWS))
    assert_equal(from_tsv, load_criteo(write_parquet(tmp_path / "a.parquet", records), ROWS))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_categories_may_be_hexadecimal_strings(tmp_path: Path, kind: pa.DataType) -> None:
    records = make_records(50)
    as_text = {
        name: pa.array([None if r[14 + i] is None else f"{r[14 + i]:X}" for r in records], pa.string()).cast(kind)
        for i, name in enumerate(SPARSE_NAMES)
    }
    assert_equal(
        load_criteo(write_parquet(tmp_path / "int.parquet", records), ROWS),
        load_criteo(write_parquet(tmp_path / "text.parquet", records, **as_text), ROWS),
    )


def test_values_are_what_the_docstring_says(tmp_path: Path) -> None:
    record: Record = [1, 0, 99, -2, None, *[7] * 9, None, 0xAB, *[0xFF] * 24]
    samples = load_criteo(write_tsv(tmp_path / "a.tsv", [tsv_line(record)]), ROWS)
    assert samples.labels.tolist() == [1.0]
    expected = np.log1p([0, 99, 0, 0, *[7] * 9])
    torch.testing.assert_close(samples.dense[0], torch.tensor(expected, dtype=torch.float32))
    assert samples.sparse[0, 0] == 0, "a missing category is row 0"
    assert samples.sparse[0, 1] == hash_ids(np.array([0xAB], np.uint64), 1, ROWS)[0]
    assert samples.sparse[0, 2:].min() > 0
    assert samples.table_rows == (ROWS,) * 26


def test_limit_reads_the_first_records_only(tmp_path: Path) -> None:
    lines = [tsv_line(record) for record in make_records(30)]
    whole = load_criteo(write_tsv(tmp_path / "a.tsv", lines), ROWS)
    some = load_criteo(tmp_path / "a.tsv", ROWS, limit=10)
    assert_equal(some, whole.slice(0, 10))
    assert len(load_criteo(tmp_path / "a.tsv", ROWS, limit=1000)) == 30


def test_chunks_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = make_records(100)
    path = write_parquet(tmp_path / "a.parquet", records)
    tsv = write_tsv(tmp_path / "a.tsv", [tsv_line(record) for record in records])
    whole = load_criteo(path, ROWS)
    monkeypatch.setattr("examples.criteo.CHUNK", 7)
    assert_equal(load_criteo(path, ROWS), whole)
    assert_equal(load_criteo(tsv, ROWS), whole)
    assert_equal(load_criteo(path, ROWS, limit=20), whole.slice(0, 20))


def test_crlf_line_ends_are_no_part_of_the_last_category(tmp_path: Path) -> None:
    lines = [tsv_line(record) for record in make_records(5)]
    unix = load_criteo(write_tsv(tmp_path / "a.tsv", lines), ROWS)
    assert_equal(load_criteo(write_tsv(tmp_path / "b.tsv", [line + "\r" for line in lines]), ROWS), unix)


def test_real_criteo_sample() -> None:
    if not SHARED.exists():
        pytest.skip(f"needs the shared Criteo sample at {SHARED}, which is not part of the repository")
    samples = load_criteo(SHARED, 100_000)
    assert len(samples) == 80_000
    assert samples.labels.mean().item() == pytest.approx(0.032, abs=0.001)
    # The README of the data: the top 1% of distinct rows take .71 of look-ups (missing values aside).
    present = samples.sparse > 0
    counts = torch.unique((samples.sparse + torch.arange(26) * 100_000)[present], return_counts=True)[1]
    counts = counts.sort(descending=True).values
    assert (counts[: len(counts) // 100].sum() / counts.sum()).item() == pytest.approx(0.71, abs=0.03)


# --- hashing ----------------------------------------------------------------------------------------------------------


@given(
    values=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50),
    feature=st.integers(0, 25),
    rows=st.integers(2, 2**40),
)
def test_hash_stays_in_the_table_and_off_row_0(values: list[int], feature: int, rows: int) -> None:
    ids = hash_ids(np.array(values, np.uint64), feature, rows)
    assert ids.min() >= 1
    assert ids.max() < rows


def test_hash_spreads_consecutive_values_evenly() -> None:
    counts = np.bincount(hash_ids(np.arange(100_000, dtype=np.uint64), 3, 101), minlength=101)[1:]
    # 1000 expected in each of 100 rows; chi-squared with 99 degrees of freedom exceeds 149 once in a thousand.
    assert counts.size == 100
    assert ((counts - 1000.0) ** 2 / 1000).sum() < 149


def test_hash_differs_between_features() -> None:
    values = np.arange(1000, dtype=np.uint64)
    assert (hash_ids(values, 0, 1 << 30) == hash_ids(values, 1, 1 << 30)).sum() == 0


def test_hash_is_the_same_in_another_process() -> None:
    code = (
        "import numpy as np; from examples.criteo import hash_ids; print(*hash_ids(np.arange(5, dtype='u8'), 7, 999))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in out.split()] == hash_ids(np.arange(5, dtype=np.uint64), 7, 999).tolist()


# --- bad files --------------------------------------------------------------------------------------------------------


def broken(record: Record, column: str, text: str) -> str:
    fields = tsv_line(record).split("\t")
    fields[COLUMNS.index(column)] = text
    return "\t".join(fields)


@pytest.mark.parametrize(
    ("column", "text", "said"),
    [
        ("label", "2", "line 3, column label: the value is 2.0; a label is 0 or 1"),
        ("label", "", "line 3, column label: the value is None; a label is 0 or 1"),
        ("label", "yes", r"column label: line 3: .*'yes'.*correct or remove the line"),
        ("I4", "x1", r"column I4: line 3: .*'x1'.*correct or remove the line"),
        ("I4", "inf", "line 3, column I4: the value is inf; give a finite number"),
        ("C5", "12g4", "line 3, column C5: the value is '12g4'; give up to 16 hexadecimal digits"),
        ("C5", "0" * 17, "line 3, column C5: the value is '0{17}'; give up to 16"),
        ("C26", "é", "line 3, column C26: the value is 'é'; give up to 16"),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 17, 2])
def test_bad_tsv_value_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, column: str, text: str, said: str
) -> None:
    monkeypatch.setattr("examples.criteo.CHUNK", chunk)  # 2: the line number counts over chunks
    records = make_records(4)
    lines = [tsv_line(record) for record in records]
    lines[2] = broken(records[2], column, text)
    with pytest.raises(DataError, match=said) as caught:
        load_criteo(write_tsv(tmp_path / "a.tsv", lines), ROWS)
    assert str(tmp_path / "a.tsv") in str(caught.value)


def test_line_with_too_few_fields(tmp_path: Path) -> None:
    lines = [tsv_line(record) for record in make_records(3)]
    lines[1] = lines[1].rsplit("\t", 1)[0]
    with pytest.raises(DataError, match=r"line 2: Expected 40 columns, got 39.*a record is 40 tab-separated fields"):
        load_criteo(write_tsv(tmp_path / "a.tsv", lines), ROWS)


def test_tsv_cut_off_in_a_line(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [tsv_line(record) for record in make_records(3)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="line 3: Expected 40 columns"):
        load_criteo(path, ROWS)


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_truncated_gzip(tmp_path: Path, keep: float) -> None:
    path = write_tsv(tmp_path / "a.tsv.gz", [tsv_line(record) for record in make_records(300)])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"is not a whole gzip file .*fetch it again"):
        load_criteo(path, ROWS)


def test_gzip_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.gz").write_text(tsv_line(make_records(1)[0]) + "\n")
    with pytest.raises(DataError, match="is not a whole gzip file"):
        load_criteo(tmp_path / "a.tsv.gz", ROWS)


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.parquet"])
def test_file_without_records(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        write_parquet(path, [])
    else:
        write_tsv(path, [])
    with pytest.raises(DataError, match="holds no records"):
        load_criteo(path, ROWS)


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz", "a.parquet"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="does not exist; give the path"):
        load_criteo(tmp_path / name, ROWS)


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", make_records(50))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="is not a whole parquet file"):
        load_criteo(path, ROWS)


def test_parquet_without_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", make_records(3), I7=None, C20=None)
    with pytest.raises(DataError, match=r"lacks the columns I7, C20 .*name them label, I1\.\.I13, C1\.\.C26"):
        load_criteo(path, ROWS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"I2": pa.array(["1", "2", "3"])}, "column I2: the type is string; give integers or floats"),
        ({"C3": pa.array([1.0, 2.0, 3.0])}, "column C3: the type is double; give integers or hexadecimal strings"),
        ({"label": pa.array([0, 1, 7])}, "record 3, column label: the value is 7; a label is 0 or 1"),
        ({"label": pa.array([0, None, 1])}, "record 2, column label: the value is None"),
        ({"C3": pa.array(["ab", "zz", "1"])}, "record 2, column C3: the value is 'zz'"),
    ],
)
def test_bad_parquet_column(tmp_path: Path, changed: dict[str, pa.Array], said: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", make_records(3), **changed)
    with pytest.raises(DataError, match=said):
        load_criteo(path, ROWS)


def test_arguments_out_of_range(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "a.tsv", [tsv_line(make_records(1)[0])])
    with pytest.raises(ValueError, match="rows_per_table is 1; give 2 or more"):
        load_criteo(path, 1)
    with pytest.raises(ValueError, match="limit is 0; give 1 or more"):
        load_criteo(path, ROWS, limit=0)


# --- any record, any form ---------------------------------------------------------------------------------------------


@given(
    record=st.tuples(
        st.integers(0, 1),
        *[st.none() | st.integers(-(2**31), 2**31 - 1)] * 13,
        *[st.none() | st.integers(0, 2**63 - 1)] * 26,
    )
)
def test_any_record_reads_the_same_from_both_forms(
    tmp_path_factory: pytest.TempPathFactory, record: tuple[int | None, ...]
) -> None:
    folder = tmp_path_factory.mktemp("any")
    assert_equal(
        load_criteo(write_tsv(folder / "a.tsv", [tsv_line(list(record))]), ROWS),
        load_criteo(write_parquet(folder / "a.parquet", [list(record)]), ROWS),
    )
