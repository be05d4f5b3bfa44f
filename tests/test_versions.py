"""What ``make test-versions`` reads, writes and says; the environments themselves take minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.versions import LOCK, VERSIONS, Result, lock_with, main, read_junit, table
from torchrec_slipstream.installed import SUPPORTED, installed, outside_of_supported, versions_note

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

def test_passes(): pass

@pytest.mark.parametrize("number", [1, 2])
def test_of_numbers(number): assert number == 1

@pytest.fixture
def breaks():
    yield
    raise RuntimeError

def test_fails_with_its_teardown(breaks): assert False

def test_passes_but_for_its_teardown(breaks): pass

@pytest.mark.skip
def test_skipped(): assert False
"""


def test_reads_what_pytest_writes(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), f"--junitxml={tmp_path / 'out.xml'}"]
    command = [sys.executable, "-m", "pytest", *options, "--continue-on-collection-errors", str(tmp_path)]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 1
    passed, skipped, failures = read_junit(tmp_path / "out.xml")
    assert (passed, skipped) == (2, 1)
    assert sorted(failures) == [
        "test_broken",
        "test_some::test_fails_with_its_teardown",
        "test_some::test_of_numbers[2]",
        "test_some::test_passes_but_for_its_teardown",
    ]


def test_lock_with_another_torchrec() -> None:
    before, after = LOCK.read_text().splitlines(), lock_with(LOCK.read_text(), "1.6.1").splitlines()
    assert [line for line in after if line not in before] == ["torchrec==1.6.1"]
    assert len(after) == len(before)
    with pytest.raises(ValueError, match="pins torchrec 0 times"):
        lock_with("torch==2.13.0\n", "1.6.1")


def test_table() -> None:
    results = [
        Result("1.6.1", "2.13.0+cpu", "1.8.0", passed=12, skipped=3, seconds=61.4),
        Result("1.7.0", "2.13.0+cpu", "1.8.0", passed=11, skipped=3, failed=1, seconds=60.0, failures=["test_a"]),
        Result("1.8.0", failures=["the environment could not be set up (make venv ended with 2)"]),
    ]
    assert [one.succeeded for one in results] == [True, False, False]
    assert table(results).splitlines() == [
        "| torchrec | torch | fbgemm-gpu-cpu | passed | failed | skipped | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1.6.1 | 2.13.0+cpu | 1.8.0 | 12 | 0 | 3 | 61 |",
        "| 1.7.0 | 2.13.0+cpu | 1.8.0 | 11 | 1 | 3 | 60 |",
        "| 1.8.0 | - | - | - | not run | - | 0 |",
    ]


def test_runs_in_an_environment_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    markdown = tmp_path / "table.md"
    options = ["--pytest", str(tmp_path), "--markdown", str(markdown), "--environments"]
    assert main([*options, sys.prefix, str(tmp_path)]) == 1
    here, nowhere = markdown.read_text().splitlines()[2:]
    have = installed()
    assert here.startswith(f"| {have['torchrec']} | {have['torch']} | ")
    assert "| 2 | 3 | 1 |" in here
    assert nowhere == f"| {tmp_path} | - | - | - | not run | - | 0 |"
    assert "this is no virtual environment" in capsys.readouterr().out


def test_nothing_passed_is_no_success() -> None:
    assert not Result("1.6.1").succeeded


def test_tested_versions_span_those_supported() -> None:
    assert (VERSIONS[0], VERSIONS[-1]) == SUPPORTED["torchrec"]


def test_versions_outside() -> None:
    assert outside_of_supported(installed()) == []
    assert outside_of_supported({"torch": "2.11.0", "FBGEMM": "1.6.0", "torchrec": "1.9.7"}) == []
    assert outside_of_supported({"torch": "2.14.0a0+git", "FBGEMM": "not installed", "torchrec": "1.5.0"}) == [
        "torch 2.14.0a0+git (supported: 2.11 to 2.13)",
        "torchrec 1.5.0 (supported: 1.6.1 to 1.9.2)",
    ]


def test_import_that_fails_names_the_versions() -> None:
    code = "import torchrec.distributed.model_parallel as m; del m.DMPCollection; import torchrec_slipstream"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "cannot import name 'DMPCollection'" in done.stderr
    assert versions_note() in done.stderr
    assert f"torchrec {installed()['torchrec']}" in versions_note()
