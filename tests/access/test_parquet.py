"""Profiles straight from parquet: the same counts as reading it by hand, whatever its columns are made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.criteo import load_criteo
from tests.access.criteo import COLUMNS, SHARED, needs_criteo, read_profile
from torchrec_slipstream.access import AccessProfile, parquet
from torchrec_slipstream.errors import ProfileError


def write(path: Path, row_group_size: int = 1000, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def counts_of(profile: AccessProfile, name: str) -> dict[int, int]:
    ids, counts = profile[name].looked_up()
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))


@given(
    samples=st.lists(st.none() | st.lists(st.none() | st.integers(0, 9), max_size=3), min_size=1, max_size=30),
    group=st.integers(1, 10),
    chunk=st.integers(1, 10),
    begin=st.integers(0, 31),
    length=st.none() | st.integers(0, 31),
)
def test_any_part_of_any_file(
    tmp_path_factory: pytest.TempPathFactory,
    samples: list[list[int | None] | None],
    group: int,
    chunk: int,
    begin: int,
    length: int | None,
) -> None:
    """A column of lists and one of integers, with nulls at every level."""
    single = [None if one is None else next((v for v in one if v is not None), None) for one in samples]
    path = write(
        tmp_path_factory.getbasetemp() / "any.parquet",
        group,
        many=pa.array(samples, pa.list_(pa.int64())),
        one=pa.array(single, pa.int32()),
    )
    part = slice(begin, None if length is None else begin + length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_CHUNK", chunk)
        seen = samples[part]
        if not any(v is not None for one in seen if one is not None for v in one):
            with pytest.raises(ProfileError, match="has no look-up in column"):
                AccessProfile.from_parquet(path, embedding_dim=4, rows=10, limit=part)
            return
        profile = AccessProfile.from_parquet(path, embedding_dim=4, rows=10, limit=part)
        with_nulls = AccessProfile.from_parquet(path, ["one"], embedding_dim=4, rows=10, limit=part, null_row=7)
    assert profile.samples == len(seen)
    assert counts_of(profile, "many") == Counter(v for one in seen if one is not None for v in one if v is not None)
    assert counts_of(profile, "one") == Counter(v for v in single[part] if v is not None)
    assert counts_of(with_nulls, "one") == Counter(7 if v is None else v for v in single[part])


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.uint64(),
        pa.dictionary(pa.int32(), pa.int64()),
        pa.list_(pa.int32()),
        pa.large_list(pa.uint16()),
        pa.list_(pa.int64(), 2),
    ],
)
def test_types_of_columns(tmp_path: Path, kind: pa.DataType) -> None:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    values = [[3, 3], [5, 0], None] if lists else [3, None, 5, 3, 0]
    column = pa.array(values).dictionary_encode() if pa.types.is_dictionary(kind) else pa.array(values, kind)
    profile = AccessProfile.from_parquet(write(tmp_path / "a.parquet", c=column), embedding_dim=4)
    assert counts_of(profile, "c") == {0: 1, 3: 2, 5: 1}
    assert profile["c"].rows == 6
    assert profile.samples == len(values)


def test_columns_share_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", u=pa.array([1, 2]), v=pa.array([2, 6]), w=pa.array([0, 0]))
    profile = AccessProfile.from_parquet(
        path, {"u": "item", "v": "item", "w": "w"}, embedding_dim={"item": 4, "w": 8}, optimizer="adagrad"
    )
    assert counts_of(profile, "item") == {1: 1, 2: 2, 6: 1}
    assert (profile["item"].rows, profile["w"].rows) == (7, 1)
    assert (profile["item"].row_bytes, profile["w"].row_bytes) == (32, 64)
    assert profile.pooling_factor("item") == 2


def test_raw_ids_and_hashing(tmp_path: Path) -> None:
    raw = [2**40 + 5, 2**40 + 5, 12, -3]
    path = write(tmp_path / "a.parquet", c=pa.array(raw))
    modulo = AccessProfile.from_parquet(path, embedding_dim=4, rows=10, hashing="modulo")
    assert counts_of(modulo, "c") == {2: 1, 7: 1, (2**40 + 5) % 10: 2}
    own = AccessProfile.from_parquet(path, embedding_dim=4, hashing={"c": lambda ids: (ids & 7).astype(np.int32)})
    assert counts_of(own, "c") == {4: 1, 5: 3}
    # As rows they make a table as large as the largest id, of which only what was met is held.
    path = write(tmp_path / "b.parquet", c=pa.array(raw[:3]))
    unhashed = AccessProfile.from_parquet(path, embedding_dim=4)
    assert unhashed["c"].rows == 2**40 + 6
    assert unhashed["c"].ids is not None
    assert unhashed["c"].ids.tolist() == [12, 2**40 + 5]
    assert unhashed["c"].top_rows(1).tolist() == [2**40 + 5]


@needs_criteo
def test_criteo_as_the_example_reads_it() -> None:
    """The rows that examples/criteo.py trains with, through its own hash and its row for missing values."""
    profile = read_profile(limit=70_000, rows=5000)
    samples = load_criteo(SHARED, 5000, 70_000)
    for feature, name in enumerate(COLUMNS):
        assert np.array_equal(profile[name].counts, np.bincount(samples.sparse[:, feature], minlength=5000))
    assert profile.samples == 70_000


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"rows": 5}, r"column 'c': id 5 is not a row of table 'c', which has 5 rows; give rows=\.\.\. .* hashing"),
        ({"columns": ["d"]}, "column 'd': id -1 is not a row of table 'd'"),
        ({"columns": ["x", "c"]}, r"lacks the column\(s\) x; it has c, d, s, f"),
        ({"columns": "c"}, "columns='c' is a string; give a list of column names"),
        ({"columns": []}, "has no column of integers or lists of integers to count"),
        ({"columns": ["s"]}, "column 's' is string; give integers or lists of integers"),
        ({"columns": ["f"]}, "column 'f' is double; give integers"),
        ({"hashing": "modulo"}, r"column 'c' is hashed by 'modulo', which needs rows=\.\.\. of table 'c'"),
        ({"hashing": "md5"}, "column 'c': hashing='md5'; give a function, 'modulo' or None"),
        ({"hashing": lambda ids: ids / 2}, r"column 'c': hashing gave float64 \(1,\) for \(1,\) ids"),
        ({"rows": {"d": 5}}, "rows names no table 'c'; it has 'd'"),
        ({"rows": 0}, "table 'c': rows=0; give an integer of at least 1"),
        ({"embedding_dim": {"d": 5}}, "embedding_dim names no table 'c'"),
        ({"limit": -1}, "limit=-1; give a number of samples"),
        ({"limit": slice(0, 9, 2)}, "give a slice that goes forward, without a step"),
        ({"limit": slice(5, 2)}, "give a slice that goes forward"),
        ({"optimizer": "x"}, "optimizer 'x' is not known"),
    ],
)
def test_bad_values(tmp_path: Path, more: dict, said: str) -> None:
    path = write(
        tmp_path / "a.parquet",
        c=pa.array([1, 2, 5]),
        d=pa.array([1, -1, 5]),
        s=pa.array(["a", "b", "c"]),
        f=pa.array([0.5, 1.5, 2.5]),
    )
    with pytest.raises(ProfileError, match=said):
        AccessProfile.from_parquet(path, **{"columns": ["c"], "embedding_dim": 4, **more})


def test_a_file_without_a_look_up_is_refused(tmp_path: Path) -> None:
    nulls = pa.array([None, None], pa.int64())
    none = write(tmp_path / "none.parquet", c=nulls[:0])
    with pytest.raises(ProfileError, match=r"none.parquet has no look-up in column\(s\) c \(in 0 of its 0 samples\)"):
        AccessProfile.from_parquet(none, embedding_dim=4)
    path = write(tmp_path / "nulls.parquet", c=nulls, d=nulls, e=pa.array([0, 1]))
    with pytest.raises(ProfileError, match=r"column\(s\) c, d \(in 2 of its 2 samples\); .* null_row=\.\.\. if a null"):
        AccessProfile.from_parquet(path, ["c", "d"], embedding_dim=4)
    with pytest.raises(ProfileError, match=r"\(in 0 of its 2 samples\)"):
        AccessProfile.from_parquet(path, embedding_dim=4, limit=slice(2, None))
    assert AccessProfile.from_parquet(path, ["c"], embedding_dim=4, null_row=0).lookups == 2
    assert AccessProfile.from_parquet(path, embedding_dim=4)["c"].lookups == 0, "one empty table among others"


def test_bad_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", c=pa.array(range(1000)))
    path.write_bytes(path.read_bytes()[:-20])
    for bad in (path, tmp_path / "none.parquet"):
        with pytest.raises(ProfileError, match=r"cannot be read as parquet .*; give a whole parquet file"):
            AccessProfile.from_parquet(bad, embedding_dim=4)


def test_the_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    """20 MB of ids, in parts of 1 MB."""
    path = write(tmp_path / "a.parquet", 200_000, c=pa.array(np.arange(2_500_000) % 1000))
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    peaks: list[int] = []

    def watch(ids: np.ndarray) -> np.ndarray:
        peaks.append(pool.bytes_allocated() - before)
        return ids

    profile = AccessProfile.from_parquet(path, embedding_dim=4, rows=1000, hashing=watch, progress=True)
    assert profile["c"].counts.tolist() == [2500] * 1000
    assert len(peaks) > 10
    assert max(peaks) < 8_000_000
