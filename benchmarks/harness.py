"""What all benchmarks share: providers that take turns, percentiles, and the one CSV that every result goes to."""

from __future__ import annotations

import argparse
import csv
import ctypes
import fcntl
import io
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from torchrec_slipstream.installed import processor

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT / "benchmarks" / "data" / "all_benchmark_data.csv"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
COLUMNS = (
    "question",
    "provider",
    "parameters",
    "p20",
    "p50",
    "p80",
    "unit",
    "quality",
    "device",
    "processor",
    "threads",
    "torch",
    "fbgemm",
    "torchrec",
    "python",
    "commit",
    "date",
)


@dataclass(frozen=True)
class Timing:
    """Measurements of one provider, in the order taken; in seconds where :func:`interleaved` took them."""

    samples: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """The value below which ``share`` (0 to 1) of the measurements lie, interpolated."""
        return float(np.quantile(self.samples, share))

    @property
    def p20(self) -> float:
        return self.percentile(0.2)

    @property
    def p50(self) -> float:
        return self.percentile(0.5)

    @property
    def p80(self) -> float:
        return self.percentile(0.8)

    @property
    def mean(self) -> float:
        """Unlike the median it sees what happens once in many steps; it also sees every other process."""
        return float(np.mean(self.samples))


@dataclass(frozen=True)
class Row:
    """One provider's result on one question, as the CSV keeps it."""

    question: str
    provider: str
    parameters: Mapping[str, Any]
    timing: Timing
    unit: str
    quality: Mapping[str, Any]
    device: str = "cpu"


def interleaved(
    providers: Mapping[str, Callable[[int], None]],
    rounds: int,
    warmup: int,
    *,
    device: str = "cpu",
    title: str = "rounds",
    before: Callable[[str, int], None] | None = None,
) -> dict[str, Timing]:
    """Time the providers in turns, so that whatever else the machine does hits all alike.

    Each round every provider runs once and is given the round's number (from 0, the warm-up's included); who goes
    first moves on by one a round. On a GPU a turn ends when the device has done its work.

    Args:
        rounds: measured rounds, 1 or more.
        warmup: rounds before them that are thrown away.
        before: called with the provider's name and the round before each turn, and not timed.
    """
    if rounds < 1 or warmup < 0 or not providers:
        raise ValueError(f"rounds={rounds}, warmup={warmup}, {len(providers)} providers: give 1 or more, 0, 1 or more")
    names = list(providers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(warmup + rounds), desc=title, unit="round", file=sys.stderr):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if before is not None:
                before(name, turn)
            _wait(device)
            began = time.perf_counter()
            providers[name](turn)
            _wait(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, as jemalloc and tcmalloc do, in pages of one size: for all providers alike.

    glibc hands large blocks back to the kernel when it sees fit; the faults of getting an output of 27 MB page by page
    again took up to twice a whole step's time, in some steps and not in others. And where huge pages are for who asks
    (``madvise``), numpy asks, torch does not: whichever model is built first into what numpy has freed was 4% faster
    than its twin. Does nothing without glibc.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
    libc.mallopt(trim_threshold, 2**30)
    libc.mallopt(mmap_threshold, 2**30)
    if _HUGE_PAGES.is_file() and "[madvise]" in _HUGE_PAGES.read_text():
        libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE of <linux/prctl.h>


def peak_bytes(device: str = "cpu") -> int:
    """The most memory that this process, or of a GPU what PyTorch in it, ever had: all providers together."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A benchmark's parser, with the options that all of them have."""
    parser = argparse.ArgumentParser(
        prog=f"benchmarks.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object, as the last line")
    parser.add_argument("--no-record", dest="record", action="store_false", help="append nothing to the CSV")
    parser.add_argument("--csv", type=Path, default=CSV, metavar="FILE", help="the CSV to append to")
    return parser


def check_least(parser: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """End the program with a message if an option is below its least value; one that is None is not looked at."""
    for name, value in ((name, getattr(args, name)) for name in least):
        if value is not None and value < least[name]:
            parser.error(f"--{name.replace('_', '-')} {value}: give {least[name]} or more")


def whole_number(text: str) -> int:
    """For ``type=``: an integer that may be written as ``1e6``. ValueError: it is none."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text} is no whole number")
    return int(number)


def finish(args: argparse.Namespace, result: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Record the rows and print the result, as the options say; the result again."""
    if args.record:
        record(rows, args.csv)
    if args.json:
        sys.stderr.flush()
        print(json.dumps(result, allow_nan=False), flush=True)
    return result


def record(rows: Iterable[Row], path: Path = CSV) -> None:
    """Append the rows to the CSV, all of them or none; what stands there is never changed.

    Raises:
        ValueError: the file has another header, or ends within a row. Nothing was written.
    """
    fixed = {**_surroundings(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in rows:
        values = {
            **fixed,
            "question": row.question,
            "provider": row.provider,
            "parameters": json.dumps(row.parameters, sort_keys=True),
            "p20": f"{row.timing.p20:.6g}",
            "p50": f"{row.timing.p50:.6g}",
            "p80": f"{row.timing.p80:.6g}",
            "unit": row.unit,
            "quality": json.dumps(row.quality, sort_keys=True),
            "device": row.device,
            "processor": _processor(row.device),
        }
        writer.writerow([values[column] for column in COLUMNS])
    _append(path, text.getvalue())


def _append(path: Path, lines: str) -> None:
    header = ",".join(COLUMNS) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        if size == 0:
            lines = header + lines
        elif (found := os.pread(file, len(header), 0).decode(errors="replace")) != header:
            raise ValueError(f"{path} has the header {found.splitlines()[:1]}, not {header!r}; give another --csv")
        elif os.pread(file, 1, size - 1) != b"\n":
            raise ValueError(f"{path} ends within a row; mend its last line, or give another --csv")
        data = lines.encode()
        # One write: a crash leaves all of it or nothing. A full disk can still take a part, which is taken back.
        if os.write(file, data) != len(data):
            os.ftruncate(file, size)
            raise OSError(f"could not write {len(data)} bytes to {path}; is the disk full?")
    finally:
        os.close(file)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _surroundings() -> dict[str, str]:
    fbgemm = next((found for name in ("fbgemm-gpu-cpu", "fbgemm-gpu") if (found := _version(name))), "unknown")
    return {
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "fbgemm": fbgemm,
        "torchrec": _version("torchrec") or "unknown",
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit that was measured, with "+dirty" where code that could matter differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Not the CSV: recording one benchmark must not make the next one look dirty.
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/data")
        return git("rev-parse", "--short=12", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor(device: str) -> str:
    return torch.cuda.get_device_name() if device != "cpu" else processor()
