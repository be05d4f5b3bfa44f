"""What do the recorded benchmarks show? Draws the README's figures from the CSV alone; nothing is run again.

    python -m benchmarks.plots --only hbm_budget --out docs/bench

A figure a question and device: ``docs/bench/QUESTION.png`` of a CPU, ``QUESTION_cuda.png`` of a GPU. A figure's rows
are those measured as its newest row was: on the same processor, with the same versions and parameters, but for those
that the figure is drawn over; of rows that differ in nothing else the newest. Differences to another row are taken
within a run, and curves over time are of the newest run alone. Under a figure stands what its rows share, and their
commits and days. Questions without rows are named.
"""

from __future__ import annotations

import argparse
import csv
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import figures, harness
from benchmarks.drawing import SETTINGS, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUT = harness.ROOT / "docs" / "bench"
_DPI = 110
_COLOURS = 128
# Rows of different machines or versions are never drawn together.
_SURROUNDINGS = ("device", "processor", "threads", "torch", "fbgemm", "torchrec")
# May differ anywhere: how often something was measured, and what one provider of `memory` alone has.
_FREE = frozenset({"rounds", "hot"})


@dataclass(frozen=True)
class Question:
    """A figure, and which parameters of its rows may differ.

    Attributes:
        sources: the CSV's questions that it is drawn from.
        axes: parameters that a panel is drawn over.
        panels: parameters of which each combination is a panel, or a group of bars.
        along: parameters that may differ between panels, but not within one.
        one_run: whether all rows are of one run, as where seconds are drawn that only compare within it.
    """

    draw: Callable[[Sequence[Record]], Figure]
    sources: tuple[str, ...]
    axes: tuple[str, ...] = ()
    panels: tuple[str, ...] = ()
    along: tuple[str, ...] = ()
    one_run: bool = False


_OF_TRACES = ("batch", "batches", "bytes", "data", "dims", "tables")
_OF_REPLANS = ("batch", "dim", "first_scored_step", "replan_every", "rows", "slots", "steps", "tables")
_OF_CONFIGURATIONS = (
    "batch",
    "dense_sizes",
    "dim",
    "lookups",
    "over_sizes",
    "positives",
    "rows",
    "table_rate",
    "tables",
    "zipf",
)
_OF_FILTER = ("speedup", "speedup_popular", "speedup_sampling", "overhead_at_0")
QUESTIONS = {
    "update_filter": Question(
        figures.update_filter,
        tuple(f"update_filter.{name}" for name in _OF_FILTER),
        axes=("share", "dim"),
        along=("count_every",),
    ),
    "convergence": Question(figures.convergence, ("convergence",), axes=("share",)),
    "inputs": Question(figures.inputs, ("inputs",), axes=("share",)),
    "throughput": Question(figures.throughput, ("throughput",), panels=("configuration",), along=_OF_CONFIGURATIONS),
    "time_to_auc": Question(figures.time_to_auc, ("time_to_auc",), one_run=True),
    "hbm_budget": Question(
        figures.hbm_budget, ("hbm_budget",), axes=("budget",), panels=("optimizer",), along=("rows",)
    ),
    "placement.hit_rate": Question(
        figures.placement, ("placement.hit_rate",), axes=("budget",), panels=("about",), along=_OF_TRACES
    ),
    "replan.hit_rate": Question(figures.replan, ("replan.hit_rate",), panels=("about", "budget"), along=_OF_REPLANS),
    "profiler": Question(figures.profiler, ("profiler",)),
    "planning": Question(figures.planning, ("planning",), axes=("rows", "tables")),
    "memory": Question(figures.memory, ("memory",), axes=("rows", "dim")),
    "ranks": Question(figures.ranks, ("ranks",), axes=("ranks",), panels=("sharding",)),
    "projection": Question(
        figures.projection, ("projection",), axes=("devices",), panels=("data",), along=("tables", "rows", "bytes")
    ),
}


def read(path: Path) -> list[Record]:
    """All rows of the CSV, the oldest first.

    Raises:
        ValueError: the file has another header.
        OSError: it cannot be read.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != harness.COLUMNS:
            raise ValueError(f"{path} has the header {reader.fieldnames}, not that of benchmarks.harness; give --csv")
        return _beside_stock(sorted(map(_record, reader), key=lambda one: one.columns["date"]))


def _beside_stock(records: list[Record]) -> list[Record]:
    """The same, those of ``throughput`` with their difference in AUC to stock in the same run, on the same batches."""

    def run(one: Record) -> tuple[str, ...]:
        return *_run(one), one.parameters["configuration"]

    found = [one for one in records if one.question == "throughput"]
    stock = {run(one): one.quality["auc"] for one in found if one.provider == "torchrec_fused"}
    return [
        replace(one, quality={**one.quality, "auc_delta": one.quality["auc"] - stock[run(one)]})
        if one.question == "throughput" and run(one) in stock
        else one
        for one in records
    ]


def _run(one: Record) -> tuple[str, str]:
    """What rows have in common that were recorded at once."""
    return one.columns["commit"], one.columns["date"]


def _record(row: dict[str, str]) -> Record:
    return Record(
        question=row["question"],
        provider=row["provider"],
        parameters=json.loads(row["parameters"]),
        quality=json.loads(row["quality"]),
        p20=float(row["p20"]),
        p50=float(row["p50"]),
        p80=float(row["p80"]),
        columns=row,
    )


def choose(records: Iterable[Record], question: Question) -> list[Record]:
    """The rows of one device that a figure is drawn from; ``records`` with the oldest first."""
    found = [one for one in records if one.question in question.sources]
    # Made-up data is for where there is no other.
    found = [one for one in found if one.parameters.get("data") != "synthetic"] or found
    within = {*question.axes, *question.panels}
    panels: dict[str, list[Record]] = {}
    for one in _like_the_newest(found, within.union(question.along)):
        panels.setdefault(_key(one, question.panels), []).append(one)
    chosen: dict[str, Record] = {}
    for panel in panels.values():
        for one in _like_the_newest(panel, within):
            chosen[one.provider + _key(one, (*question.axes, *question.panels))] = one
    rows = list(chosen.values())
    if question.one_run and rows:
        newest = max(rows, key=lambda one: one.columns["date"])
        rows = [one for one in rows if _run(one) == _run(newest)]
    return rows


def _like_the_newest(records: Sequence[Record], but_for: set[str]) -> list[Record]:
    """Those with the last one's surroundings and parameters, but for those named."""

    def fixed(one: Record) -> tuple[dict[str, Any], list[str]]:
        parameters = {name: value for name, value in one.parameters.items() if name not in but_for | _FREE}
        return parameters, [one.columns[name] for name in _SURROUNDINGS]

    return [one for one in records if fixed(one) == fixed(records[-1])]


def _key(one: Record, names: Sequence[str]) -> str:
    return json.dumps([one.question, *(one.parameters.get(name) for name in names)])


def small_print(records: Sequence[Record], width: int = 160) -> str:
    """Where the rows are from, and the parameters that all of them share."""
    records = sorted(records, key=lambda one: one.columns["date"])
    newest = records[-1].columns
    days = sorted({one.columns["date"][:10] for one in records})
    commits = list(dict.fromkeys(one.columns["commit"] for one in reversed(records)))
    threads = "1 thread" if newest["threads"] == "1" else f"{newest['threads']} threads"
    more = f" and {len(commits) - 2} more" if len(commits) > 2 else ""
    where = (
        f"{newest['device']}: {newest['processor']}, {threads}; torch {newest['torch']}, fbgemm "
        f"{newest['fbgemm']}, torchrec {newest['torchrec']}, Python {newest['python']}; commit "
        f"{', '.join(commits[:2])}{more}; {' to '.join(dict.fromkeys((days[0], days[-1])))}"
    )
    first = records[0].parameters
    shared = {
        name: value
        for name, value in first.items()
        if value not in (None, []) and all(one.parameters.get(name) == value for one in records)
    }
    if "data" in shared:
        shared["data"] = PurePosixPath(shared["data"]).name
    what = "; ".join(f"{name} {_plain(value)}" for name, value in shared.items())
    return "\n".join(line for text in (where, what) for line in textwrap.wrap(text, width))


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def draw(records: Sequence[Record], name: str, out: Path) -> list[Path]:
    """One question's figures, one a device that has rows; their files."""
    import matplotlib

    question = QUESTIONS[name]
    made = []
    for device in sorted({one.columns["device"] for one in records if one.question in question.sources}):
        chosen = choose([one for one in records if one.columns["device"] == device], question)
        suffix = "" if device == "cpu" else f"_{device}"
        path = out / f"{name.replace('.', '_')}{suffix}.png"
        with matplotlib.rc_context(SETTINGS):
            figure = question.draw(chosen)
            figure.supxlabel(small_print(chosen), x=0.008, ha="left", fontsize=6.5, color="0.3")
            _save(figure, path)
        made.append(path)
    return made


def _save(figure: Figure, path: Path) -> None:
    """As PNG, in few colours: a third of the bytes. The same rows make the same file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DPI)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def main(argv: list[str] | None = None) -> list[Path]:
    """Draw; the files that were made."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.plots",
        description="Figures of the recorded benchmarks, from the CSV alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--csv", type=Path, default=harness.CSV, metavar="FILE", help="the CSV to draw")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FOLDER", help="where the PNG files go")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(QUESTIONS), default=list(QUESTIONS), metavar="QUESTION", help="draw these"
    )
    args = parser.parse_args(argv)
    try:
        records = read(args.csv)
        args.out.mkdir(parents=True, exist_ok=True)
        made = []
        for name in args.only:
            files = draw(records, name, args.out)
            print(f"{name}: {', '.join(map(str, files)) or f'skipped, {args.csv} has no rows of it'}")
            made += files
    except (OSError, ValueError) as error:
        raise SystemExit(f"benchmarks.plots: {error}") from error
    except ModuleNotFoundError as error:
        raise SystemExit("benchmarks.plots: needs matplotlib: pip install matplotlib") from error
    return made


if __name__ == "__main__":
    main()
