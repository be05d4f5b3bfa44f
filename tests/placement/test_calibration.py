"""Bandwidths: measured ones are sane and steady, saved ones come back, and a topology gets them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.planner import Topology

from tests.distributed.ranks import run_ranks
from torchrec_slipstream.errors import ConfigError
from torchrec_slipstream.placement.calibration import Bandwidths, calibrate

SOME = Bandwidths(ddr_mem_bw=2e6, hbm_to_ddr_mem_bw=1.5e7, row_bytes=256, threads=1, machine="a machine")


def streamed() -> float:
    """Bytes a millisecond of a plain copy, read and written: what random rows cannot beat by much."""
    source, target = torch.ones(16 * 2**20), torch.empty(16 * 2**20)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return 2 * 4 * source.numel() / (1e3 * min(times))


def test_host_memory_is_measured_steadily_and_within_sane_bounds() -> None:
    runs = [calibrate("cpu", seconds=0.4).ddr_mem_bw for _ in range(3)]
    # Another process can slow one of them, and make none faster.
    slowest, middle, fastest = sorted(run for run in runs if run is not None)
    assert fastest < 2 * middle, "two undisturbed runs differ twofold"
    # Slower than a stream (rows of 256 bytes at random), but by far no disk: 0.1 to 100 GB/s.
    assert slowest > 1e5
    assert fastest < min(1e8, 4 * streamed())


def test_small_rows_come_slower() -> None:
    small, large = (calibrate("cpu", row_bytes=row_bytes, seconds=0.3).ddr_mem_bw for row_bytes in (16, 1024))
    assert small is not None
    assert large is not None
    assert small < large / 2, "every row costs a miss, whatever its size"


def test_a_cpu_has_host_memory_only() -> None:
    found = calibrate("cpu", seconds=0.01, buffer_bytes=2**20, row_bytes=64)
    assert found.ddr_mem_bw is not None
    assert found.hbm_mem_bw is found.hbm_to_ddr_mem_bw is found.intra_host_bw is found.inter_host_bw is None
    assert found.row_bytes == 64
    assert found.threads == torch.get_num_threads()
    assert found.machine
    text = str(found)
    assert text.count("not measured") == 4
    assert f"{found.ddr_mem_bw / 1e6:.2f} GB/s" in text


def test_time_is_bounded() -> None:
    began = time.perf_counter()
    calibrate("cpu", seconds=0.2, buffer_bytes=2**24)
    assert 0.2 < time.perf_counter() - began < 2.0


def _links(rank: int) -> Bandwidths:
    return calibrate("cpu", seconds=0.01, buffer_bytes=2**20)


def test_ranks_measure_their_links_alike() -> None:
    first, second = run_ranks(2, _links)
    assert first.intra_host_bw == second.intra_host_bw
    assert first.intra_host_bw is not None
    assert 1e4 < first.intra_host_bw < 1e8
    assert first.inter_host_bw is None


def test_topology_gets_what_was_measured_and_defaults_for_the_rest() -> None:
    stock = Topology(world_size=2, compute_device="cuda")
    topology = SOME.topology(world_size=2, compute_device="cuda", hbm_cap=1234)
    assert topology.world_size == 2
    assert topology.devices[1].storage.hbm == 1234
    assert topology.ddr_mem_bw == 2e6
    assert topology.hbm_to_ddr_mem_bw == 1.5e7
    assert topology.hbm_mem_bw == stock.hbm_mem_bw
    assert SOME.topology(world_size=2, compute_device="cuda", ddr_mem_bw=7.0).ddr_mem_bw == 7.0, "ours goes before"
    links = Bandwidths(intra_host_bw=3e6, inter_host_bw=1e6, row_bytes=4, threads=1, machine="")
    comms = links.topology(world_size=4, local_world_size=2, compute_device="cpu").comms_bandwidths
    assert (comms.intra_host_bw, comms.inter_host_bw) == (3e6, 1e6)


def test_saved_ones_come_back(tmp_path: Path) -> None:
    SOME.save(tmp_path / "bw.json")
    assert Bandwidths.load(tmp_path / "bw.json") == SOME


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bw.json"
    SOME.save(path)

    def fill_the_disk(whole: Path, text: str) -> None:
        whole.write_bytes(text[:20].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill_the_disk)
    with pytest.raises(ConfigError, match=r"cannot write .*bw.json: No space left on device; give a path"):
        replace(SOME, threads=8).save(path)
    assert Bandwidths.load(path) == SOME
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "something else"}, "is not a file of bandwidths; measure anew with `slipstream plan --calibrate`"),
        ({"version": 2}, "is of version 2, this package reads 1; measure anew"),
        ({"threads": None}, r"missing or unknown values \(threads\); measure anew"),
        ({"colour": "red"}, r"missing or unknown values \(colour\)"),
        ({"ddr_mem_bw": -1.0}, "ddr_mem_bw=-1.0 must be a positive number of bytes a millisecond"),
        ({"ddr_mem_bw": "fast"}, "ddr_mem_bw='fast' must be a positive number"),
        ({"hbm_mem_bw": True}, "hbm_mem_bw=True must be"),
    ],
)
def test_foreign_and_damaged_files_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = tmp_path / "bw.json"
    SOME.save(path)
    values = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "threads" or value}))
    with pytest.raises(ConfigError, match=said) as caught:
        Bandwidths.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_files_that_are_no_json_objects_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bw.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a file of bandwidths"):
        Bandwidths.load(tmp_path / "bw.json")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; give a file of bandwidths, or measure anew"):
        Bandwidths.load(tmp_path / "bw.json")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"row_bytes": 0}, "row_bytes=0 must be a positive multiple of 4"),
        ({"row_bytes": 30}, "row_bytes=30 must be a positive multiple of 4"),
        ({"seconds": 0}, "seconds=0 must be a positive number"),
        ({"seconds": float("nan")}, "seconds=nan must be a positive number"),
        ({"buffer_bytes": 1000}, "buffer_bytes=1000 must hold 1024 rows of 256 bytes or more"),
        ({"device": "abacus"}, "device='abacus' is not a device; give cpu or cuda"),
        ({"device": "meta"}, "device='meta' cannot be measured; give cpu or cuda"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        calibrate(**{"device": "cpu", **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(ConfigError, match="torch sees no CUDA device; give cpu, or mend the driver"):
        calibrate("cuda")
