"""The command line's arguments: what they are called, and one line for each that is not what it should be."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from torchrec.distributed.planner.constants import DDR_CAP, HBM_CAP

from torchrec_slipstream.budget import format_bytes, parse_bytes
from torchrec_slipstream.errors import ConfigError
from torchrec_slipstream.tbe.memory import OPTIMIZERS

SHARDINGS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "grid_shard")
Command = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    """One line for a bad argument, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser(description: str, profile: Command, plan: Command, report: Command) -> argparse.ArgumentParser:
    """The parser; ``run`` of what it returns is the command, ``prog`` its name."""
    parser = _Parser(prog="slipstream", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="profile | plan | report", parser_class=_Parser)

    one = commands.add_parser("profile", help="count the look-ups in a parquet file")
    one.set_defaults(run=profile, prog=one.prog)
    one.add_argument("data", type=Path, metavar="DATA", help="parquet; columns of integers, or of lists of integers")
    one.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="where the profile goes")
    one.add_argument("--columns", type=_names, metavar="NAMES", help="id columns, with commas; * and ? stand for what "
                     "fits (default: all of integers)")  # fmt: skip
    one.add_argument("--table-names", type=_naming, metavar="t_{}", help="what tables are called; {} is the column")
    one.add_argument("--rows", type=_whole(1), metavar="N", help="of each table (default: its largest id + 1)")
    one.add_argument("--hash", choices=("none", "modulo"), default="none", help="how ids become rows (default: none)")
    one.add_argument("--null-row", type=_whole(0), metavar="ROW", help="row that a null looks up (default: none)")
    one.add_argument("--samples", type=_whole(1), metavar="N", help="read the first N only")
    one.add_argument("--dim", type=_whole(1), default=64, help="embedding dimension of the tables (default: 64)")
    one.add_argument("--element-size", type=int, choices=(2, 4), default=4, help="bytes of a weight (default: 4)")
    one.add_argument("--optimizer", choices=OPTIMIZERS, default="rowwise_adagrad", help="whose state rows have "
                     "(default: rowwise_adagrad)")  # fmt: skip

    two = commands.add_parser("plan", help="place rows by a profile; or measure this machine's bandwidths")
    two.set_defaults(run=plan, prog=two.prog)
    two.add_argument("--profile", type=Path, metavar="FILE.npz", help="of `slipstream profile` or AccessProfile.save")
    two.add_argument("--hbm-budget", type=_budget, metavar="SIZE", help="of each device for rows: 8GiB, 500MB, or 25%% "
                     "(default: all there is)")  # fmt: skip
    two.add_argument("--devices", type=_whole(1), default=1, metavar="N", help="in all (default: 1)")
    two.add_argument("--per-host", type=_whole(1), metavar="N", help="devices of one host (default: up to 8)")
    two.add_argument("--device", choices=("cuda", "cpu"), help="what they are (default: cuda; calibrating: what is "
                     "there)")  # fmt: skip
    two.add_argument("--hbm", type=_size, default=HBM_CAP, metavar="SIZE", help="of each device (default: "
                     f"{format_bytes(HBM_CAP)}, TorchRec's)")  # fmt: skip
    two.add_argument("--ddr", type=_size, metavar="SIZE", help="host memory of one host, for all its devices (default: "
                     f"{format_bytes(DDR_CAP)} a device, TorchRec's)")  # fmt: skip
    two.add_argument("--batch-size", type=_whole(1), metavar="N", help="samples a step and device (default: 512)")
    two.add_argument("--sharding", type=_shardings, default=list(SHARDINGS), metavar="KINDS", help="what may be used, "
                     f"with commas: {', '.join(SHARDINGS)} (default: all)")  # fmt: skip
    two.add_argument("--optimizer", choices=OPTIMIZERS, help="(default: the profile's)")
    two.add_argument("--backing", choices=("caching", "uvm"), default="caching", help="hot rows in FBGEMM's cache, or "
                     "in a session's overlay (uvm), with their state (default: caching)")  # fmt: skip
    two.add_argument("--bandwidths", type=Path, metavar="FILE.json", help="of --calibrate (default: TorchRec's)")
    two.add_argument("--calibrate", action="store_true", help="measure this machine's bandwidths instead of planning")
    two.add_argument("--row-bytes", type=_whole(4), default=256, metavar="N", help="of the rows to measure with "
                     "(default: 256)")  # fmt: skip
    two.add_argument("--seconds", type=float, default=3.0, help="to measure for (default: 3)")
    two.add_argument("--out", type=Path, metavar="FILE", help="where the placement goes (.npz), or bandwidths (.json)")

    three = commands.add_parser("report", help="make one HTML page of a run's record, or of several side by side")
    three.set_defaults(run=report, prog=three.prog)
    three.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="JSON of Report.save, or of train_dlrm.py "
                       "--json")  # fmt: skip
    three.add_argument("--out", type=Path, metavar="FILE.html", help="where the page goes (default: beside the first "
                       "RUN)")  # fmt: skip
    for command in (one, two):
        command.add_argument("--picture", type=Path, metavar="FILE.png", help="draw hit rate over bytes")
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        with suppress(ValueError):
            if (value := int(text.replace(",", "").replace("_", ""))) >= least:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")

    return parse


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _budget(text: str) -> int | float:
    if not text.endswith("%"):
        return _size(text)
    with suppress(ValueError):
        if 0 <= (share := float(text[:-1]) / 100) <= 1:
            return share
    raise argparse.ArgumentTypeError(f"{text!r} is not a share of the HBM; give 0% to 100%, or a size such as 8GiB")


def _shardings(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    for kind in kinds:
        if kind not in SHARDINGS:
            raise argparse.ArgumentTypeError(f"{kind!r} is not one of {', '.join(SHARDINGS)}")
    return kinds


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; give names, or leave it out for all columns")
    return names


def _naming(text: str) -> str:
    if "{}" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} names all tables alike; put {{}} where the column's name goes")
    return text


def is_file(path: Path, what: str) -> None:
    """``what`` names what the file should be, for the error (ConfigError) where there is none."""
    if not path.is_file():
        raise ConfigError(f"{path} {'is no file' if path.exists() else 'does not exist'}; give {what}")


def can_write(path: Path, option: str, ending: str) -> None:
    """Raises ConfigError where the path could not be written or ends otherwise: before the work, not after it."""
    if path.suffix.lower() != ending:
        raise ConfigError(f"{option} {path} must end in {ending}")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: there is no directory {path.parent}; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path} cannot be written; give another path")


def can_draw(path: Path) -> None:
    """The same for a picture, and ImportError without matplotlib."""
    can_write(path, "--picture", ".png")
    if find_spec("matplotlib") is None:
        raise ImportError("--picture needs matplotlib: pip install matplotlib")
