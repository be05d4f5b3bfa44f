"""Saved profiles come back exactly, and a damaged file never comes back as something else."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.access.profiles import profiles, sparse, zipf_counts
from torchrec_slipstream.access import AccessProfile, TableAccess
from torchrec_slipstream.errors import ProfileError


@given(profile=profiles(), compressed=st.booleans())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, profile: AccessProfile, compressed: bool) -> None:
    path = tmp_path_factory.mktemp("p") / "profile.npz"
    profile.save(path, compressed=compressed)
    loaded = AccessProfile.load(path)
    assert loaded == profile
    for name, one in profile.tables.items():
        assert loaded[name].counts.dtype == one.counts.dtype
        assert (loaded[name].ids is None) == (one.ids is None)
    assert os.listdir(path.parent) == ["profile.npz"]


@given(one=profiles((30, 7)), other=profiles((30, 7)), third=profiles((30, 7)))
def test_round_trip_of_what_was_learnt(
    tmp_path_factory: pytest.TempPathFactory, one: AccessProfile, other: AccessProfile, third: AccessProfile
) -> None:
    learnt = one.followed_by(other).merge(third.followed_by(one))
    path = tmp_path_factory.mktemp("p") / "profile.npz"
    learnt.save(path)
    loaded = AccessProfile.load(path)
    assert loaded == learnt
    for name, table in learnt.tables.items():
        assert loaded[name].recurrence == table.recurrence
        assert (table.recurrence is None) == (min(one.samples, other.samples) < 1 > min(third.samples, one.samples))


def make_profile() -> AccessProfile:
    a = TableAccess("a", 3000, 16, zipf_counts(3000, 1.2, 20_000), optimizer_bytes=4)
    b = TableAccess("b", 500, 8, zipf_counts(500, 1.0, 900), lookups=1000)
    return AccessProfile([a, sparse(b)], 2000, 4)


@pytest.fixture(scope="module", params=[True, False], ids=["compressed", "stored"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "profile.npz"
    make_profile().save(path, compressed=request.param)
    return path.read_bytes()


def load_or_refuse(path: Path) -> AccessProfile | None:
    try:
        return AccessProfile.load(path)
    except ProfileError:
        return None


@given(data=st.data())
@settings(max_examples=150)
def test_flipped_bytes(saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = bytearray(saved)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    path.write_bytes(content)
    # A flip in a time stamp or an unused flag changes nothing; any other is refused.
    assert load_or_refuse(path) in (None, make_profile())


def test_every_bit_of_the_counts(saved: bytes, tmp_path: Path) -> None:
    """Flips among the counts are refused, but for the few that deflate reads alike."""
    path, profile = tmp_path / "flipped.npz", make_profile()
    refused = 0
    for place in range(len(saved) // 4, len(saved) // 4 + 50):
        for bit in range(8):
            content = bytearray(saved)
            content[place] ^= 1 << bit
            path.write_bytes(content)
            loaded = load_or_refuse(path)
            assert loaded in (None, profile)
            refused += loaded is None
    assert refused > 380  # of 400


@given(data=st.data())
@settings(max_examples=100)
def test_truncated(saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "truncated.npz"
    path.write_bytes(saved[: data.draw(st.integers(0, len(saved) - 1))])
    assert load_or_refuse(path) is None


# --- files that are whole, and wrong ----------------------------------------------------------------------------------


def rewrite(path: Path, **changed: bytes | None) -> None:
    """Replace members of the archive, or leave out those that are None; checksums are right."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members.update({name.replace("__", "."): content for name, content in changed.items()})  # type: ignore[misc]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            if content is not None:
                archive.writestr(name, content)


def header_of(path: Path) -> dict:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("header.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "it is of version 2, and this release reads version 1; update torchrec_slipstream"),
        ({"version": 0}, "it is of version 0, and this release reads version 1; measure again"),
        ({"format": "other"}, "it is not an access profile; give what AccessProfile.save wrote"),
        ({"samples": -1}, "samples=-1"),
        ({"samples": None}, "samples=None"),
        ({"tables": 3}, "is not an access profile, or is damaged"),
    ],
)
def test_bad_header(tmp_path: Path, change: dict, said: str) -> None:
    make_profile().save(path := tmp_path / "p.npz")
    rewrite(path, header__json=json.dumps(header_of(path) | change).encode())
    with pytest.raises(ProfileError, match=said):
        AccessProfile.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": 2999}, "table 'a': there are 3000 counts for 2999 rows"),
        ({"counted": 7}, "table 'a': the counts add up to 20000, and the header says 7"),
        ({"lookups": 5}, "table 'a': lookups is 5"),
        ({"sparse": True}, "table 'a': ids_0.npy is missing"),
        ({"name": "b"}, "two tables are called 'b'"),
    ],
)
def test_header_that_disagrees(tmp_path: Path, change: dict, said: str) -> None:
    make_profile().save(path := tmp_path / "p.npz")
    header = header_of(path)
    header["tables"][0] |= change
    rewrite(path, header__json=json.dumps(header).encode())
    with pytest.raises(ProfileError, match=said):
        AccessProfile.load(path)


def test_missing_members(tmp_path: Path) -> None:
    make_profile().save(path := tmp_path / "p.npz")
    rewrite(path, ids_1__npy=None)
    with pytest.raises(ProfileError, match=r"p.npz: table 'b': ids_1.npy is missing"):
        AccessProfile.load(path)
    rewrite(path, header__json=None)
    with pytest.raises(ProfileError, match=r"p.npz: it is not an access profile"):
        AccessProfile.load(path)


def test_more_values_than_the_header_says(tmp_path: Path) -> None:
    """Two arrays in one member: numpy reads the first and stops."""
    make_profile().save(path := tmp_path / "p.npz")
    with zipfile.ZipFile(path) as archive:
        content = archive.read("counts_0.npy")
    rewrite(path, counts_0__npy=content + content)
    with pytest.raises(ProfileError, match=r"table 'a': counts_0.npy holds 3000 values or more"):
        AccessProfile.load(path)


def test_foreign_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    np.save(tmp_path / "single.npy", np.arange(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("other.npz", "single.npy", "text.npz", "empty.npz"):
        with pytest.raises(ProfileError, match=f"{name}.* not an access profile.*give what AccessProfile.save wrote"):
            AccessProfile.load(tmp_path / name)
    for missing in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(
            ProfileError, match=r"is no file; give the path of an access profile that AccessProfile.save wrote"
        ):
            AccessProfile.load(missing)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    """An array of objects would run code when it is loaded."""
    make_profile().save(path := tmp_path / "p.npz")
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([Path("x")] * 3000, dtype=object), allow_pickle=True)
    rewrite(path, counts_0__npy=objects.read_bytes())
    with pytest.raises(ProfileError, match="allow_pickle=False"):
        AccessProfile.load(path)


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    """Saving puts a new file in its place instead of writing over the old one."""
    make_profile().save(path := tmp_path / "p.npz")
    before = path.read_bytes()
    with open(path, "rb") as reader:
        make_profile().decayed(0.5).save(path)
        assert reader.read() == before
    assert AccessProfile.load(path) == make_profile().decayed(0.5)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_profile().save(path := tmp_path / "p.npz")
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    with pytest.raises(ProfileError, match=r"cannot write .*p.npz: .*No space left.*give a path"):
        make_profile().decayed(0.5).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["p.npz"]
    with pytest.raises(ProfileError, match=r"cannot write .*folder.npz"):
        make_profile().save(tmp_path / "no" / "folder.npz")
