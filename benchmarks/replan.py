"""Does re-planning keep hot rows hot while traffic drifts, and what does it cost?

    python -m benchmarks.replan --json
    python -m benchmarks.replan --data ../shared/data/criteo_tb_80k.parquet --batch 256 --budget 0.01 --json

A DLRM (TorchRec's, its MLPs as in its own training script) trains on a time-ordered trace, one thread, under a real
session that re-plans every so many steps. What the session hits is held against other ways to fill fast memory of as
many rows. All have seen the same first part of the trace when the look-ups after it begin to count. The JSON:

``hit_rate``     share of those look-ups whose row is in fast memory:
``static``           the rows that the session has hot after the first part, never re-planned;
``ours``             the session, as its report says;
``lru``, ``lfu``     FBGEMM's cache with its 32-way sets, simulated, one for all tables; filled batch by batch;
``oracle``           the best rows for each interval, by its own counts, at the moments at which the session re-plans;
``plan``             static as well: the rows with the most look-ups in the first part.
``over_time``    the same, by interval.
``copy_ratio``   bytes a second of the run's own moves, over those of ``index_select`` and ``index_copy_`` of the same
                 rows, table by table, in turns: medians. ``write_ratio``: over ``index_copy_`` alone, of values that
                 lie ready. ``large_move``: both, for one move of 40,000 rows each way (``benchmarks/large_move.py``).
``stall_share``  of run time, all that training waits for at a re-plan: taking in the counts, deciding, moving.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import harness
from benchmarks.harness import Row, Timing
from benchmarks.large_move import time_large_move
from benchmarks.replan_rates import Comparison
from benchmarks.replan_run import Run, time_moves, train
from benchmarks.traces import Trace, TraceTable, assemble, read_trace
from examples.synthetic import make_synthetic
from torchrec_slipstream import PlacementConfig
from torchrec_slipstream.errors import SlipstreamError

PROVIDERS = ("static", "ours", "lru", "lfu", "oracle")
Floats = npt.NDArray[np.float64]
# At most so many of a run's re-plans are repeated for the copy ratio.
_REPEATED = 16


def drifting_trace(samples: int, rows: int, drift: float, *, batch_size: int, dim: int, seed: int) -> Trace:
    """The look-ups of ``examples.synthetic``: 26 tables, of which the largest has ``rows``."""
    made = make_synthetic(samples, rows, seed=seed, drift=drift).samples
    tables = [TraceTable(f"C{i + 1}", size, dim) for i, size in enumerate(made.table_rows)]
    about = f"synthetic, {samples} samples, {drift:.0%} of the popular rows change"
    return assemble(tables, list(made.sparse.T.numpy()), batch_size, about)


def without_tables(trace: Trace, names: list[str]) -> Trace:
    """The trace without the tables of these ``names``."""
    known = [table.name for table in trace.tables]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--without {unknown[0]}: there is no such table; there are {', '.join(known)}")
    keep = np.array([name not in names for name in known])
    if not keep.any():
        raise ValueError("--without leaves no table; name fewer")
    sizes = np.diff(trace.starts)
    of_row = np.repeat(np.arange(len(known)), sizes)
    shift = np.repeat(np.cumsum(np.where(keep, 0, sizes)), sizes)
    kept = keep[of_row[trace.rows]]
    return Trace(
        tables=tuple(table for table, stays in zip(trace.tables, keep, strict=True) if stays),
        rows=(trace.rows - shift[trace.rows])[kept].astype(np.int32),
        lookups=trace.lookups[kept],
        batches=np.concatenate([[0], np.cumsum(kept)])[trace.batches].astype(np.int64),
        batch_size=trace.batch_size,
        about=f"{trace.about}, without {', '.join(names)}",
    )


def measure(args: argparse.Namespace, trace: Trace) -> tuple[dict[str, Any], list[Row]]:
    """Train, compare, and repeat the moves."""
    every, slots = args.replan_every, int(args.budget * trace.total_rows)
    intervals = (len(trace.batches) - 1) // every
    first = max(1, round(args.warmup * intervals))
    if slots < 1:
        raise ValueError(f"--budget {args.budget:g} of {trace.total_rows} rows is none; give more")
    if intervals <= first:
        raise ValueError(
            f"{len(trace.batches) - 1} batches are {intervals} intervals of --replan-every {every}, of which {first} "
            "come before what counts; give more samples, or fewer steps between re-plans"
        )
    run = train(
        trace,
        slots,
        every,
        intervals * every,
        dense_sizes=args.dense_sizes,
        over_sizes=args.over_sizes,
        max_stall_share=args.max_stall_share or None,
        min_gain=args.min_gain,
        seed=args.seed,
    )
    comparison = Comparison(trace, run, first)
    rates = comparison.rates()
    begin = first * every
    seconds = float(run.train[begin:].sum() + run.session[begin:].sum())
    waited, moved_rows = run.replan_seconds[first:], int(run.moved_rows[first:].sum())
    moved = [one // every - 1 for one in run.moved_at if one > begin]
    result: dict[str, Any] = {
        "hit_rate": {name: comparison.total(one) for name, one in rates.items()},
        "copy_ratio": None,
        "stall_share": float(waited.sum()) / seconds,
        "replan_ms": 1e3 * float(np.median(waited[run.replans[first:] > 0])) if run.replans[first:].any() else 0.0,
        "step_ms": 1e3 * float(np.median(run.train[begin:])),
        "rows_moved_a_second": moved_rows / seconds,
        "rows_moved_a_step": moved_rows / len(run.train[begin:]),
        "replans": int(run.replans[first:].sum()),
        "replans_that_moved": len(moved),
        "replanned_at": [one for one in run.moved_at if one > begin],
        "steps": [int(step) for step in np.arange(first + 1, intervals + 1) * every],
        "over_time": {name: one.tolist() for name, one in rates.items()},
        "parameters": parameters(args, trace, run, first),
    }
    timings: dict[str, Timing] = {}
    if moved:
        chosen = sorted({moved[i] for i in np.linspace(0, len(moved) - 1, _REPEATED).round().astype(int)})
        timings, copied = time_moves(run, chosen, args.rounds)
        result["copy_ratio"] = timings["index_copy"].p50 / timings["migrate"].p50
        result["write_ratio"] = timings["write_alone"].p50 / timings["migrate"].p50
        result["bytes_a_second"] = {name: copied / timing.p50 for name, timing in timings.items()}
        large, copied = time_large_move(rounds=args.rounds)
        result["large_move"] = {
            "copy_ratio": large["index_copy"].p50 / large["migrate"].p50,
            "write_ratio": large["write_alone"].p50 / large["migrate"].p50,
            "bytes_a_second": copied / large["migrate"].p50,
        }
        timings |= {f"large_{name}": timing for name, timing in large.items()}
    return result, rows_of(result, waited, timings)


def parameters(args: argparse.Namespace, trace: Trace, run: Run, first: int) -> dict[str, Any]:
    names = ("batch", "dim", "budget", "replan_every", "warmup", "max_stall_share", "min_gain", "seed")
    return {name: getattr(args, name) for name in (*names, "dense_sizes", "over_sizes")} | {
        "about": trace.about,
        "tables": len(trace.tables),
        "rows": trace.total_rows,
        "slots": run.slots,
        "steps": len(run.train),
        "first_scored_step": first * run.every + 1,
    }


def rows_of(result: dict[str, Any], waited: Floats, timings: dict[str, Timing]) -> list[Row]:
    """What the CSV keeps."""
    known = result["parameters"]
    costs = {name: result[name] for name in ("stall_share", "replans", "step_ms", "rows_moved_a_second")}
    rows = [
        Row("replan.hit_rate", name, known, Timing((rate,)), "share", {}) for name, rate in result["hit_rate"].items()
    ]
    rows.append(Row("replan.stall", "ours", known, Timing(tuple(1e3 * waited)), "ms", costs))
    for name, timing in timings.items():
        of = result["large_move"] if name.startswith("large_") else result
        quality = {"copy_ratio": of["copy_ratio"], "write_ratio": of["write_ratio"]}
        rows.append(Row("replan.copy", name, known, Timing(tuple(1e3 * s for s in timing.samples)), "ms", quality))
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """The hit rates over steps, with the re-plans that moved rows marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for step in result["replanned_at"]:
        axes.axvline(step, color="0.85", linewidth=0.6, zorder=0)
    for name in PROVIDERS:
        axes.plot(result["steps"], result["over_time"][name], label=f"{name}, {result['hit_rate'][name]:.1%}")
    axes.set_xlabel("step (grey: re-plans that moved rows)")
    axes.set_ylabel("share of look-ups in fast memory")
    axes.set_title(result["parameters"]["about"], fontsize="medium")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    figure.savefig(path, dpi=120)


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    known, rate = result["parameters"], result["hit_rate"]
    lines = [
        f"{known['about']}; {known['rows']:,} rows, {known['slots']:,} of them hot, re-planned every "
        f"{known['replan_every']} of {known['steps']} steps; hits from step {known['first_scored_step']} on:",
        *(f"{name:<8}{one:>8.2%}" for name, one in rate.items()),
        f"{result['rows_moved_a_step']:.1f} rows moved a step, {result['rows_moved_a_second']:.0f} a second; a re-plan "
        f"took {result['replan_ms']:.2f} ms, a step {result['step_ms']:.2f} ms",
        f"{result['replans']} re-plans of {len(result['steps'])} moments, for which training waited "
        f"{result['stall_share']:.2%} of the time",
    ]
    if result["copy_ratio"] is not None:
        lines.append(
            f"rows moved at {result['bytes_a_second']['migrate'] / 1e6:.0f} MB/s: {result['copy_ratio']:.2f} of what "
            f"index_select and index_copy_ do, {result['write_ratio']:.2f} of index_copy_ alone"
        )
        large = result["large_move"]
        lines.append(
            f"80,000 rows at once at {large['bytes_a_second'] / 1e6:.0f} MB/s: {large['copy_ratio']:.2f} and "
            f"{large['write_ratio']:.2f}"
        )
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("replan", "Hit rates and costs of hot rows that are re-planned while traffic drifts.")
    parser.add_argument("--data", type=Path, help="a Criteo or REES46 parquet file in time order; else synthetic")
    parser.add_argument("--without", nargs="+", default=[], metavar="TABLE", help="leave these tables of a file out")
    parser.add_argument("--samples", type=int, default=480_000, help="of synthetic traffic")
    parser.add_argument("--rows", type=int, default=20_000, help="of the largest synthetic table")
    parser.add_argument("--drift", type=float, default=1.0, help="share of the popular rows that change")
    parser.add_argument("--batch", type=int, default=512, help="samples a step")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.05, help="share of all rows that can be hot")
    parser.add_argument("--replan-every", type=int, default=20, help="steps between two re-plans")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the trace before look-ups count")
    parser.add_argument(
        "--max-stall-share", type=float, default=0.01, help="PlacementConfig.max_stall_share; 0: no limit"
    )
    parser.add_argument("--min-gain", type=float, default=PlacementConfig().min_gain, help="PlacementConfig.min_gain")
    parser.add_argument("--dense-sizes", type=int, nargs="*", default=[512, 256], help="hidden layers below")
    parser.add_argument("--over-sizes", type=int, nargs="*", default=[512, 512, 256], help="hidden layers on top")
    parser.add_argument("--rounds", type=int, default=15, help="in which each move is repeated for copy_ratio")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the hit rates over steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    harness.check_least(parser, args, batch=1, dim=4, replan_every=1, rounds=1)
    for name in ("budget", "warmup"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name):g}: give a share above 0 and below 1")
    if args.dim % 4:
        parser.error(f"--dim {args.dim}: FBGEMM takes multiples of 4")
    if not 0 <= args.max_stall_share <= 1:
        parser.error(f"--max-stall-share {args.max_stall_share:g}: give a share from 0 (no limit) to 1")
    if not 0 <= args.min_gain <= 1:
        parser.error(f"--min-gain {args.min_gain:g}: give a share from 0 to 1")
    if args.data is not None and not args.data.is_file():
        parser.error(f"--data {args.data}: there is no such file")
    return args


def load(args: argparse.Namespace) -> Trace:
    if args.data is not None:
        trace = read_trace(args.data, batch_size=args.batch, dim=args.dim, seed=args.seed)
    else:
        trace = drifting_trace(args.samples, args.rows, args.drift, batch_size=args.batch, dim=args.dim, seed=args.seed)
    return without_tables(trace, args.without) if args.without else trace


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record and print; the result that is printed."""
    args = parse_arguments(argv)
    harness.keep_freed_memory()
    try:
        result, rows = measure(args, load(args))
    except (ValueError, SlipstreamError) as error:
        sys.exit(f"benchmarks.replan: {error}")
    if args.plot is not None:
        draw(result, args.plot)
    print(show(result))
    return harness.finish(args, result, rows)


if __name__ == "__main__":
    main()
