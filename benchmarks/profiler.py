"""What does counting look-ups cost, and how many of the hot rows does it find?

    python -m benchmarks.profiler --json

One TBE on one thread, forward and backward with its fused row-wise Adagrad, under sessions that leave no update out
(``target_share=0``) and differ in ``AccessConfig.counter`` only. They take turns on the same TBE; the one that counts
nothing is what the others are compared with. The JSON's keys:

``ratio``           step time over that of the session that counts nothing, step() included: medians of the counted and
                    of the other steps, each weighted by how many there are, so that a counter which counts one step in
                    eight is charged an eighth of it. ``counted_step`` is the ratio of the counted steps alone.
``recall``          share of the true hot rows, the 1% most looked-up of all rows over all steps, among as many rows
                    that the counter takes for the hottest; a row that ties with the least hot one counts as hot.
``recall_lookups``  look-ups of the rows that the counter takes for the hottest, over those of the truly hottest.
``bytes_per_row``   what a counter keeps, over the rows of all tables. A sketch's bytes depend on ``sketch_rows`` and
                    not on the table: see ``sketch_bytes`` a table.

Recall is of other runs, forward only, over batches of which no two are alike.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn
from tqdm import tqdm

from benchmarks import harness
from benchmarks.harness import Row, Timing
from benchmarks.tables import Sizes, count_lookups, make_batches, make_tbe
from benchmarks.update_filter import Bench
from torchrec_slipstream import AccessConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.access import AccessProfile
from torchrec_slipstream.tbe import UpdateFilter

COUNTERS = ("exact", "sampled", "sketch")
HOT_SHARE = 0.01


def attach(tbe: nn.Module, counter: str, args: argparse.Namespace) -> Slipstream:
    """A session that does nothing but count."""
    access = AccessConfig(counter=counter, every=args.every, sketch_rows=args.sketch_rows)
    config = SlipstreamConfig(staleness=StalenessConfig(target_share=0.0), access=access)
    return Slipstream(nn.ModuleList([tbe]), config)


def measure_cost(args: argparse.Namespace) -> tuple[dict[str, Timing], dict[str, list[bool]]]:
    """Step times by counter, "off" among them, and for each of them which steps were counted."""
    bench = Bench(_sizes(args), args.device)
    sessions: dict[str, Slipstream] = {}
    filters: dict[str, UpdateFilter | None] = {}
    for counter in ("off", *args.counters):
        # A session attaches for good; here all must step aside for each other's turns.
        sessions[counter] = attach(bench.tbe, counter, args)
        (one,) = sessions[counter]._filters
        one.detach()
        filters[counter] = one
    counted: dict[str, list[bool]] = {counter: [] for counter in sessions}

    def after_step(name: str) -> None:
        counted[name].append(sessions[name]._filters[0].counting)
        sessions[name].step()

    timings = bench.time(filters, args.rounds, args.warmup, "sessions", after_step)
    return timings, {name: flags[args.warmup :] for name, flags in counted.items()}


def weighted_median(timing: Timing, counted: list[bool], share: float) -> tuple[float, float]:
    """Seconds a step where this share of the steps is counted, from the medians of both kinds; and of counted ones."""
    seconds = {kind: [s for s, is_so in zip(timing.samples, counted, strict=True) if is_so == kind] for kind in (0, 1)}
    medians = {kind: float(np.median(values)) for kind, values in seconds.items() if values}
    of_counted, of_others = medians.get(1, medians.get(0, 0.0)), medians.get(0, medians.get(1, 0.0))
    return share * of_counted + (1.0 - share) * of_others, of_counted


def measure_recall(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each counter: recall of the hot rows, by rows and by look-ups, and the bytes that it keeps."""
    # Nothing is learnt, so the rows may be narrow.
    sizes = replace(_sizes(args), dim=4, batches=args.steps)
    batches, offsets = make_batches(sizes, args.device)
    true = count_lookups(sizes, batches).numpy()
    tbe = make_tbe(sizes, args.device)
    result = {}
    for counter in args.counters:
        session = attach(tbe, counter, args)
        for indices in tqdm(batches, desc=f"recall, {counter}", unit="step"):
            tbe(indices, offsets)
            session.step()
        held = _counter_bytes(session)
        profile = session.access_profile()
        session.detach()
        by_rows, by_lookups = recall(true, _dense(profile, sizes), max(1, round(HOT_SHARE * true.size)))
        result[counter] = {
            "recall": by_rows,
            "recall_lookups": by_lookups,
            "bytes_per_row": held / true.size,
            "bytes_per_table": held / sizes.tables,
        }
    return result


def recall(true: npt.NDArray[Any], estimated: npt.NDArray[Any], hot: int) -> tuple[float, float]:
    """Of the ``hot`` rows with the largest estimates: the share that is truly hot, and their look-ups over those of the
    truly hottest. ``true`` and ``estimated`` are look-ups ``[rows]``; of equal estimates the lowest row is taken."""
    taken = true[np.argsort(-estimated, kind="stable")[:hot]]
    best = np.sort(true)[::-1][:hot]
    return float((taken >= best[-1]).mean()), float(taken.sum() / best.sum())


def _dense(profile: AccessProfile, sizes: Sizes) -> npt.NDArray[Any]:
    """Counts of all rows of all tables, in the tables' order."""
    return np.concatenate([profile[f"table_{t}"].counts_of(0, sizes.rows) for t in range(sizes.tables)])


def _counter_bytes(session: Slipstream) -> int:
    (one,) = session._filters
    return sum(sketch.nbytes for sketch in one.sketches.values()) if one.sketches else one.counts.nbytes


def _sizes(args: argparse.Namespace) -> Sizes:
    return Sizes(**{name: getattr(args, name) for name in asdict(Sizes())})


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(
        "profiler", "Time and memory that counting look-ups costs, and the hot rows that it finds."
    )
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--counters", nargs="+", choices=COUNTERS, default=list(COUNTERS), help="to be measured")
    parser.add_argument("--rounds", type=int, default=320, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=8, help="rounds thrown away")
    parser.add_argument("--steps", type=int, default=256, help="steps after which recall is measured")
    parser.add_argument("--every", type=int, default=AccessConfig().every, help="AccessConfig.every")
    parser.add_argument("--sketch-rows", type=int, default=AccessConfig().sketch_rows, help="AccessConfig.sketch_rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record and print; the result that is printed."""
    args = parse_arguments(argv)
    harness.keep_freed_memory()
    missing = find_spec("datasketches") is None
    not_run = {name: "needs datasketches" for name in args.counters if name == "sketch" and missing}
    args.counters = [name for name in args.counters if name not in not_run]
    timings, counted = measure_cost(args)
    off = timings["off"].p50
    kept = measure_recall(args)
    result: dict[str, Any] = {name: {} for name in ("ratio", "counted_step", "recall", "recall_lookups")}
    result |= {"bytes_per_row": {}, "sketch_bytes": None, "not_run": not_run}
    for counter in args.counters:
        share = AccessConfig(counter=counter, every=args.every).scale
        seconds, of_counted = weighted_median(timings[counter], counted[counter], 1.0 / share)
        result["ratio"][counter] = seconds / off
        result["counted_step"][counter] = of_counted / off
        for key in ("recall", "recall_lookups", "bytes_per_row"):
            result[key][counter] = kept[counter][key]
    if "sketch" in kept:
        result["sketch_bytes"] = kept["sketch"]["bytes_per_table"]
    result["ms"] = {name: 1e3 * timing.p50 for name, timing in timings.items()}
    print(show(result, args))
    parameters = {**asdict(_sizes(args)), "hot_share": HOT_SHARE}
    for name in ("rounds", "warmup", "steps", "every", "sketch_rows"):
        parameters[name] = getattr(args, name)
    rows = [
        Row(
            question="profiler",
            provider=name,
            parameters=parameters,
            timing=Timing(tuple(1e3 * sample for sample in timing.samples)),
            unit="ms",
            quality={"mean": 1e3 * timing.mean}
            | {key: value[name] for key, value in result.items() if isinstance(value, dict) and name in value},
            device=args.device,
        )
        for name, timing in timings.items()
    ]
    return harness.finish(args, result, rows)


def show(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The result for people."""
    lines = [
        f"a step that counts nothing: {result['ms']['off']:.2f} ms; the hottest {HOT_SHARE:.0%} of the rows found "
        f"after {args.steps} steps",
        f"{'counter':<10}{'step':>8}{'counted step':>14}{'recall':>9}{'by look-ups':>13}{'bytes a row':>13}",
    ]
    lines += [
        f"{name:<10}{result['ratio'][name]:>8.3f}{result['counted_step'][name]:>14.3f}{result['recall'][name]:>9.1%}"
        f"{result['recall_lookups'][name]:>13.1%}{result['bytes_per_row'][name]:>13.2f}"
        for name in result["ratio"]
    ]
    if result["sketch_bytes"] is not None:
        lines.append(f"a sketch: {result['sketch_bytes']:,.0f} bytes a table, however large the table is")
    lines += [f"not run: {name}: {why}" for name, why in result["not_run"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
