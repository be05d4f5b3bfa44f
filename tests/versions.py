"""Runs the tests on several releases of TorchRec, each in an environment of its own that is thrown away.

    python -m tests.versions --versions 1.6.1 1.9.2 --pytest tests/tbe        (`make test-versions` does this)

An environment is what `make venv` makes of ``requirements/cpu.txt`` with another torchrec in it, in a temporary
directory, and shares nothing with ``.venv``. The tests are those of this working tree: leave it alone meanwhile.
``--environments DIR ...`` takes virtual environments that are there instead, say with another torch.
Ends with a table in Markdown; the README's is a copy of one. Exit status 1 where any version failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "cpu.txt"
VERSIONS = ("1.6.1", "1.7.0", "1.8.0", "1.9.2")
# What of an environment the table shows.
_SHOWN = ("torchrec", "torch", "fbgemm-gpu-cpu")
# Setting up writes into the tree (setuptools' egg-info): one after the other.
_setting_up = Lock()


@dataclass
class Result:
    """What one version came to; ``failures`` are the names of tests, or why there is no result."""

    torchrec: str
    torch: str = "-"
    fbgemm: str = "-"
    passed: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        """Whether tests ran, and none failed."""
        return self.passed > 0 and not self.failures


def lock_with(text: str, torchrec: str) -> str:
    """The lock file's ``text`` with another ``torchrec``.

    Raises:
        ValueError: it does not pin torchrec once.
    """
    text, count = re.subn(r"(?m)^torchrec==\S+$", f"torchrec=={torchrec}", text)
    if count != 1:
        raise ValueError(
            f"the lock pins torchrec {count} times, not once: there is no line torchrec==VERSION to change"
        )
    return text


def read_junit(path: Path) -> tuple[int, int, list[str]]:
    """Of pytest's ``--junitxml``: how many tests passed, how many were skipped, and the names of those that failed.

    A test that fails and whose teardown does too is one; a file that cannot be collected is one.
    """
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        name = "::".join(part for part in (case.get("classname"), case.get("name")) if part)
        kinds = {child.tag for child in case}
        # What comes last of one test is its teardown.
        outcomes[name] = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
    counted = list(outcomes.values())
    failures = [name for name, outcome in outcomes.items() if outcome == "failed"]
    return counted.count("passed"), counted.count("skipped"), failures


def table(results: Sequence[Result]) -> str:
    """The results as a table in Markdown."""
    lines = [
        "| torchrec | torch | fbgemm-gpu-cpu | passed | failed | skipped | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in results:
        counts = (one.passed, one.failed, one.skipped) if one.passed or one.failed else ("-", "not run", "-")
        cells = (one.torchrec, one.torch, one.fbgemm, *counts, f"{one.seconds:.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def test_version(torchrec: str, pytest_arguments: Sequence[str], make_arguments: Sequence[str]) -> Result:
    """Set an environment up, run the tests in it, and throw it away."""
    with tempfile.TemporaryDirectory(prefix=f"torchrec-{torchrec}-") as temporary:
        folder = Path(temporary)
        venv, lock = folder / "venv", folder / "cpu.txt"
        lock.write_text(lock_with(LOCK.read_text(), torchrec))
        with _setting_up:
            variables = [f"VENV={venv}", f"LOCK={lock}", f"PYTHON={sys.executable}", *make_arguments]
            made = _run(torchrec, ["make", "--no-print-directory", "venv", *variables])
        if made != 0:
            return Result(torchrec, failures=[f"the environment could not be set up (make venv ended with {made})"])
        return test_environment(venv, pytest_arguments)


def test_environment(venv: Path, pytest_arguments: Sequence[str]) -> Result:
    """Run the tests in a virtual environment that is there."""
    places = list(venv.glob("lib/*/site-packages"))
    if len(places) != 1:
        return Result(str(venv), failures=["there is no lib/python*/site-packages: this is no virtual environment"])
    packages = metadata.distributions(path=[str(places[0])])
    have = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version for one in packages}
    result = Result(*(have.get(one, "-") for one in _SHOWN))
    with tempfile.TemporaryDirectory(prefix="junit-") as temporary:
        junit = Path(temporary) / "junit.xml"
        began = time.perf_counter()
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={junit}", *pytest_arguments]
        status = _run(result.torchrec, [str(venv / "bin" / "python"), "-m", "pytest", *options])
        result.seconds = time.perf_counter() - began
        if junit.exists():
            result.passed, result.skipped, result.failures = read_junit(junit)
            result.failed = len(result.failures)
    if status != 0 and not result.failures:
        result.failures = [f"pytest ended with {status} and names no test"]
    return result


for _no_test in (test_version, test_environment):
    _no_test.__test__ = False  # type: ignore[attr-defined]


def _run(torchrec: str, command: list[str]) -> int:
    """Run a command, each line of its output with the version before it; its exit status."""
    # What the make that called us handed on is not for the one that we call.
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{torchrec}  {line}", end="", flush=True)
    return process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Test the versions that are asked for; 0 where all succeeded."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__.splitlines()[0])
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), help="of torchrec (%(default)s)")
    parser.add_argument(
        "--environments", nargs="+", type=Path, metavar="DIR", help="virtual environments to use as they are, instead"
    )
    parser.add_argument("--pytest", default="", help="arguments for pytest, in one string")
    parser.add_argument("--make", nargs="*", default=[], help="variables for make venv, such as TORCH_INDEX=...")
    parser.add_argument("--jobs", type=int, default=1, help="versions at a time (%(default)s)")
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    options = parser.parse_args(arguments)
    chosen = shlex.split(options.pytest)
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        if options.environments:
            running = [pool.submit(test_environment, venv.absolute(), chosen) for venv in options.environments]
        else:
            running = [pool.submit(test_version, one, chosen, options.make) for one in options.versions]
        results = [one.result() for one in running]
    print()
    for one in results:
        for name in one.failures:
            print(f"torchrec {one.torchrec}: failed {name}")
    print(table(results))
    if options.markdown is not None:
        options.markdown.write_text(table(results) + "\n")
    return 0 if all(one.succeeded for one in results) else 1


if __name__ == "__main__":
    sys.exit(main())
