"""How long does planning take over rows and over tables, and in how much memory?

    python -m benchmarks.planning --json
    python -m benchmarks.planning --rows 1e8 --tables 1000 --providers ours --json

From access counts to a plan, without collectives, for CUDA devices that need not be there. Every provider gets the same
model, access profile, topology and storage reservation (none). HBM is what inputs and outputs take and ``--budget``.

``ours``              SlipstreamPlanner;
``torchrec``          EmbeddingShardingPlanner as it comes: its own four proposers, any kernel, no statistics;
``torchrec_scaleup``  the same with EmbeddingOffloadScaleupProposer, tables in UVM caches, fed with our statistics.

Each plan is made in a forked process of its own, so that none finds what an earlier one has worked out; its seconds are
that process's, its peak is by how much it grew. A provider whose plan took longer than ``--repeat-below`` makes no
second one; a plan that exceeds ``--limit`` is ended. The JSON's keys, by size (``"rows x tables"``) and provider:

``seconds``             median of a plan.
``peak_bytes``          of the plan that grew most.
``predicted_hit_rate``  share of look-ups whose row is in HBM, were every cache filled with its table's most looked-up
                        rows: the best that the plan can give.
``not_run``             why there is nothing of a provider: out of time, or no plan was found. It gets no row.

To allocate alone, 10^9 rows of 1,000 tables, is timed by ``benchmarks.placement --scale``.
"""

from __future__ import annotations

import argparse
import logging
import time
from functools import partial
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.forks import in_a_fork
from benchmarks.harness import Row, Timing, interleaved
from benchmarks.problems import SHARDERS, Problem, Shape, make_profile

PROVIDERS = ("ours", "torchrec", "torchrec_scaleup")
# Of a plan: seconds, predicted hit rate, bytes that its process grew by.
Plan = tuple[float, float, int]


def make_problem(rows: int, tables: int, args: argparse.Namespace) -> Problem:
    """Tables of log-uniform sizes, the largest up to 100 times the smallest, of ``rows`` together."""
    sizes = np.exp(np.random.default_rng(args.seed).uniform(0.0, np.log(100.0), tables))
    shapes = [Shape(max(100, int(rows * share)), args.dim) for share in sizes / sizes.sum()]
    profile = make_profile(shapes, args.samples, args.seed)
    problem = Problem(shapes, profile, devices=args.devices, batch=args.batch, budget=args.budget)
    assert problem.model is not None  # made here, once, and not in any plan's time
    return problem


def plan_once(problem: Problem, provider: str) -> Plan:
    """Make a plan, in a process of its own."""
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    began_with, began = harness.peak_bytes(), time.perf_counter()
    planner = problem.planner(provider)
    plan = planner.plan(problem.model, SHARDERS)
    seconds, grown = time.perf_counter() - began, harness.peak_bytes() - began_with
    return seconds, problem.predicted_hit_rate(planner, plan), grown


def measure(problem: Problem, args: argparse.Namespace, title: str) -> tuple[dict[str, list[Plan]], dict[str, str]]:
    """The plans of each provider that has any, and why the others have none."""
    taken: dict[str, list[Plan]] = {name: [] for name in args.providers}
    not_run: dict[str, str] = {}

    def run(name: str, turn: int) -> None:
        if name in not_run or any(seconds > args.repeat_below for seconds, *_ in taken[name]):
            return
        plan = in_a_fork(partial(plan_once, problem, name), args.limit)
        if isinstance(plan, str):
            not_run[name] = plan
        else:
            taken[name].append(plan)

    interleaved({name: partial(run, name) for name in args.providers}, args.rounds, 0, title=title)
    return {name: plans for name, plans in taken.items() if plans}, not_run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("planning", "Time and memory of planning, over rows and over tables.")
    parser.add_argument(
        "--rows", type=harness.whole_number, nargs="+", default=[10**6, 10**7, 10**8], help="of all tables together"
    )
    parser.add_argument(
        "--tables", type=harness.whole_number, nargs="+", default=[10, 100], help="more than the first: fewest rows"
    )
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=512, help="samples a device")
    parser.add_argument(
        "--samples", type=harness.whole_number, default=10**6, help="of the access profile, one look-up a table"
    )
    parser.add_argument("--budget", type=float, default=0.1, help="share of the tables' bytes that HBM has room for")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--rounds", type=int, default=3, help="plans a provider and size")
    parser.add_argument("--repeat-below", type=float, default=5.0, help="seconds; a slower plan is made once")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds after which a plan is given up")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0.0 < args.budget <= 1.0:
        parser.error(f"--budget {args.budget:g}: give a share of the tables' bytes, above 0 and at most 1")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record and print; the result that is printed."""
    args = parse_arguments(argv)
    sizes = [(rows, args.tables[0]) for rows in args.rows] + [(args.rows[0], tables) for tables in args.tables[1:]]
    result: dict[str, Any] = {"seconds": {}, "peak_bytes": {}, "predicted_hit_rate": {}, "not_run": {}}
    records: list[Row] = []
    for rows, tables in sizes:
        size = f"{rows:,} x {tables:,}"
        plans, not_run = measure(make_problem(rows, tables, args), args, size)
        if not_run:
            result["not_run"][size] = not_run
        for name, taken in plans.items():
            seconds, rates, grown = zip(*taken, strict=True)
            timing = Timing(seconds)
            quality = {"peak_bytes": max(grown), "predicted_hit_rate": rates[0]}
            result["seconds"].setdefault(size, {})[name] = timing.p50
            for key, value in quality.items():
                result[key].setdefault(size, {})[name] = value
            parameters = {key: getattr(args, key) for key in ("devices", "dim", "batch", "samples", "budget", "seed")}
            parameters |= {"rows": rows, "tables": tables, "rounds": len(taken)}
            records.append(Row("planning", name, parameters, timing, "s", quality))
    print(show(result, args))
    return harness.finish(args, result, records)


def show(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The result for people."""
    lines = [
        f"plans for {args.devices} devices with HBM for {args.budget:.0%} of the tables' bytes",
        f"{'rows x tables':<22}{'':<18}{'seconds':>9}{'peak MiB':>10}{'hit rate':>10}",
    ]
    for size, by_provider in result["seconds"].items():
        for name, seconds in by_provider.items():
            peak, rate = result["peak_bytes"][size][name] / 2**20, result["predicted_hit_rate"][size][name]
            lines.append(f"{size:<22}{name:<18}{seconds:>9.2f}{peak:>10.0f}{rate:>10.1%}")
    for size, reasons in result["not_run"].items():
        lines += [f"{size:<22}{name:<18} {reason}" for name, reason in reasons.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
