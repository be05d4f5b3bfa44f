"""Placements: their figures, and their files."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.placement.planning import SHARDERS, model_of, planner_of, profile_of, skewed, topology_of
from torchrec_slipstream import Placement, PlanError


def a_placement(seed: int = 0, devices: int = 2, lookups: int = 5000) -> Placement:
    rows, dims = [40, 3000], [16, 64]
    counts = [skewed(n, lookups, seed=seed + i) for i, n in enumerate(rows)]
    planner = planner_of(profile_of(counts, dims, samples=5000), topology_of(devices), hbm_budget="30KB", batch_size=64)
    planner.plan(model_of(rows, dims), SHARDERS)
    assert planner.placement is not None
    return planner.placement


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 100), devices=st.sampled_from([1, 2, 4]), lookups=st.sampled_from([0, 3, 5000]))
def test_a_placement_survives_its_file_exactly(tmp_path: Path, seed: int, devices: int, lookups: int) -> None:
    placement = a_placement(seed, devices, lookups)
    placement.save(tmp_path / "p.npz")
    loaded = Placement.load(tmp_path / "p.npz")
    assert loaded == placement
    assert str(loaded) == str(placement)
    assert pickle.loads(pickle.dumps(placement)) == placement
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"], "nothing else is left behind"


def test_placements_that_differ_are_not_equal() -> None:
    one = a_placement()
    moved = [replace(shard, hot_rows=shard.hot_rows[:-1]) for shard in one.shards]
    assert one != replace(one, shards=tuple(moved))
    assert one != replace(one, expected_ms=0.0)
    assert one != a_placement(seed=5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_file_is_refused_or_reads_the_same(tmp_path: Path, where: float, bit: int, cut: bool) -> None:
    path = tmp_path / "p.npz"
    placement = a_placement()
    placement.save(path)
    data = bytearray(path.read_bytes())
    at = int(where * len(data))
    if cut:
        data = data[:at]
    else:
        data[at] ^= 1 << bit
    path.write_bytes(data)
    try:
        loaded = Placement.load(path)
    except PlanError:
        return
    assert loaded == placement  # a bit of the zip's own bookkeeping, say of a date


def test_foreign_and_newer_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "p.npz"
    with pytest.raises(PlanError, match=r"p.npz is no file; give the path of a placement that Placement.save wrote"):
        Placement.load(path)
    np.savez(path, a=np.ones(3))
    with pytest.raises(PlanError, match=r"p.npz: it is not a placement"):
        Placement.load(path)
    path.write_text("no archive")
    with pytest.raises(PlanError, match=r"p.npz is not a placement, or is damaged .*plan and save it again"):
        Placement.load(path)
    _rewrite(path, version=2)
    with pytest.raises(PlanError, match=r"version 2, and this release reads version 1; update torchrec_slipstream"):
        Placement.load(path)
    _rewrite(path, format="torchrec_slipstream.access_profile")
    with pytest.raises(PlanError, match=r"it is not a placement"):
        Placement.load(path)
    with pytest.raises(PlanError, match=r"cannot write .*give a path that can be written"):
        a_placement().save(tmp_path / "no such folder" / "p.npz")


def test_hot_rows_out_of_their_shard_are_refused(tmp_path: Path) -> None:
    path, placement = tmp_path / "p.npz", a_placement()
    bad = replace(placement.shards[0], rows=3, hot_rows=np.array([1, 7]))
    replace(placement, shards=(bad, *placement.shards[1:])).save(path)
    with pytest.raises(PlanError, match=r"the hot rows are not ascending rows of 3; plan and save it again"):
        Placement.load(path)


def _rewrite(path: Path, **header: object) -> None:
    """A good file but for some entries of its header."""
    a_placement().save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["header.json"] = json.dumps(json.loads(members["header.json"]) | header).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
