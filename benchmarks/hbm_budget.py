"""How long is an embedding step, and how much of it is served from HBM, over the HBM given to rows?

    python -m benchmarks.hbm_budget --device cuda --json

The providers of ``tbe_providers.py`` on one TBE's tables, forward and fused backward. A budget is a share of the
tables' bytes, optimizer state included: ours holds that many rows with their state, FBGEMM's cache as many as fit
without it (it leaves state in host memory, or in HBM for all rows). Both begin with what a profile of earlier batches
knows. FBGEMM's cache is tuned: of ``--search`` parts of the budget the fastest is kept, for LRU and LFU each. (Without
a dense part to hide behind, a ``prefetch()`` is what its forward does anyway: ``prefetch_overlap.py`` asks for more.)

Who takes turns with whom: tables that memory holds at once. A cache has to stay warm, so each candidate takes its turns
with ``torchrec_fused``, ``ours`` and ``ours_skip*`` and is gone; theirs are of all these turns. ``uvm*`` take turns
with ``torchrec_fused`` alone, since ``ours`` has its hot rows elsewhere. A turn is ``--steps`` steps on batches drawn
before; ``stock_ms`` is ``torchrec_fused`` at the same point.

``floor_multiple`` is over ``floor.py``'s floor with ours' hot rows, and with the live rows where updates are left out
(null where those are drawn, and on a CPU, where there is no bus). Rows are appended as each point is done, or cut off.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.floor import Memories, measure_here
from benchmarks.harness import Row, Timing
from benchmarks.tbe_exactness import difference
from benchmarks.tbe_providers import (
    CPU_OPTIMIZERS,
    OPTIMIZERS,
    Attached,
    Cached,
    Ours,
    Provider,
    free,
)
from benchmarks.tbe_turns import Bench, Point
from torchrec_slipstream.tbe.finding import TBE

# By device: the tables, a batch, budgets. A GPU's tables are 20 GB.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"tables": 4, "rows": 100_000, "dim": 64, "batch": 40_000, "profile": 32, "budgets": [0.1, 0.01, 0.5]},
    "cuda": {
        **{"tables": 10, "rows": 4_000_000, "dim": 128, "batch": 1_000_000, "profile": 128},
        "budgets": [0.1, 0.25, 0.05, 0.01, 0.5],
    },
}
# Of ours over FBGEMM's cache, the part of the budget that the cache of cold rows gets.
_CACHE_PART = 0.2
_SKIPS = {"ours": "all", "ours_skip": "skip", "ours_skip_sampling": "sampling"}


def measure_without_budget(bench: Bench, point: Point) -> None:
    """All rows in host memory, against all in HBM."""
    fused = bench.whole("torchrec_fused")
    uvm = {name: one for kind in ("uvm", "uvm_host_mapped") for name, one in bench.whole(kind).items()}
    if not uvm:
        return
    for name, provider in (fused | uvm).items():
        hot = torch.ones_like(bench.profile.counts, dtype=torch.bool) if name in fused else None
        point.note(name, provider, bench.floor(hot, None))
    bench.take_turns(fused | uvm)


def measure_budget(bench: Bench, point: Point, apart: dict[str, list[float]]) -> None:
    """All providers whose rows in HBM a budget bounds. ``apart``: by backing, how far ours is from stock."""
    shape, traffic, gradient = bench.shape, bench.traffic, bench.gradient
    slots = max(1, round(point.budget * shape.tables * shape.rows))
    # A slot of FBGEMM's cache has no optimizer state.
    cache_slots = min(shape.tables * shape.rows, slots * shape.row_bytes(bench.optimizer) // (4 * shape.dim))
    with_all: dict[str, Provider] = bench.whole("torchrec_fused")
    for name, provider in with_all.items():
        hot = torch.ones_like(bench.profile.counts, dtype=torch.bool)
        point.note(name, provider, bench.floor(hot, None))
    hot = torch.zeros_like(bench.profile.counts, dtype=torch.bool)
    hot[bench.profile.hottest(slots)] = True
    ours_floor = bench.floor(hot, None)
    attached = None
    if bench.wants(*_SKIPS) and (tbe := bench.tbe("uvm", *_SKIPS)) is not None:
        attached = Attached(tbe, bench.profile, slots)
        for name, mode in _SKIPS.items():
            if bench.wants(name):
                provider = Ours(attached, traffic, gradient, mode)
                live = provider.live()
                floor = bench.floor(hot, live) if mode != "sampling" else None
                point.note(name, provider, floor, **(_exactness(apart["uvm"]) if mode == "all" else {}))
                with_all[name] = provider
    try:
        searched = False
        for algorithm in ("lru", "lfu"):
            name = f"uvm_caching_{algorithm}"
            if bench.wants(name) and (tbe := bench.tbe("uvm_caching", name)) is not None:
                _search(bench, point, tbe, algorithm, cache_slots, with_all, ours_floor)
                searched = True
        if not searched:
            bench.take_turns(with_all)
        fused = {name: one for name, one in with_all.items() if name in ("torchrec_fused", "ours")}
        for name, backing in (("ours_caching", "uvm_caching"), ("ours_host_mapped", "uvm_host_mapped")):
            if bench.wants(name) and (tbe := bench.tbe(backing, name)) is not None:
                under = max(1, round(_CACHE_PART * slots)) if name == "ours_caching" else 0
                if under:
                    Cached(tbe, traffic, gradient, bench.profile, "lru", under)
                other = Attached(tbe, bench.profile, max(1, slots - under))
                provider = Ours(other, traffic, gradient)
                bench.warm(provider)
                point.note(name, provider, ours_floor, **_exactness(apart[backing]))
                bench.take_turns({**fused, name: provider})
                other.detach()
    finally:
        if attached is not None:
            for name in _SKIPS.keys() & point.quality.keys():
                point.quality[name]["skipped_share"] = attached.skipped_share(_SKIPS[name])
            attached.detach()


def _search(
    bench: Bench, point: Point, tbe: TBE, algorithm: str, slots: int, others: dict[str, Provider], floor: float
) -> None:
    """Of the cache's sizes at or under the budget keep the fastest, as the algorithm's provider."""
    name = f"uvm_caching_{algorithm}"
    rows = bench.shape.tables * bench.shape.rows
    tried: dict[str, float] = {}
    kept: tuple[list[float], list[float]] | None = None
    for part in bench.args.search:
        cached = Cached(tbe, bench.traffic, bench.gradient, bench.profile, algorithm, max(1, round(part * slots)))
        bench.warm(cached)
        bench.samples.pop(name, None)
        bench.hits.pop(name, None)
        try:
            bench.take_turns({**others, name: cached})
        except SystemExit:  # cut off: what was measured before is to be recorded
            if kept is not None:
                bench.samples[name], bench.hits[name] = kept
            raise
        median = Timing(tuple(bench.samples[name])).p50
        if kept is None or median < min(tried.values()):
            kept = (bench.samples[name], bench.hits[name])
            point.note(name, cached, floor, load_factor=part * slots / rows)
        tried[f"{part * slots / rows:.4g}"] = median
        bench.samples[name], bench.hits[name] = kept
        point.quality[name]["searched_ms"] = dict(tried)


def _exactness(apart: Sequence[float]) -> dict[str, Any]:
    return {"exact": apart[0] == 0.0, "difference_one_lookup": apart[0], "difference_four_lookups": apart[1]}


def measure(args: argparse.Namespace, optimizer: str, memories: Memories, result: dict[str, Any]) -> list[Row]:
    """All points of one optimizer; rows are recorded as they come."""
    backings = ("uvm",) if args.device == "cpu" else ("uvm", "uvm_caching", "uvm_host_mapped")
    # FBGEMM's kernels depend on the dim: 4 columns a thread, 32 threads a row.
    apart = {
        one: [difference(one, optimizer, args.device, dim=args.dim, bag=bag) for bag in (1, 4)] for one in backings
    }
    if any(first for first, _ in apart.values()):
        print(f"NOT EXACT with one look-up a bag: {apart}", file=sys.stderr)
    bench = Bench(args, optimizer, memories)
    rows: list[Row] = []
    for budget in (0.0, *args.budgets):
        point = Point(bench, budget)
        try:
            if budget:
                measure_budget(bench, point, apart)
            else:
                measure_without_budget(bench, point)
        finally:
            found = point.rows()
            if args.record:
                harness.record(found, args.csv)
            rows += found
        print(show(optimizer, budget, found), flush=True)
    result["set_up_seconds"][optimizer] = bench.set_up_seconds
    result["not_run"] |= {f"{optimizer}.{name}": why for name, why in bench.not_run.items()}
    return rows


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("hbm_budget", "Step time and hit rate of one TBE over the HBM given to its rows.")
    parser.add_argument("--tables", type=int, help="(default: by device)")
    parser.add_argument("--rows", type=int, help="of each table (default: by device)")
    parser.add_argument("--dim", type=int, help="(default: by device)")
    parser.add_argument("--batch", type=int, help="look-ups of a batch (default: by device)")
    parser.add_argument("--zipf", type=float, default=1.05, help="exponent of the popularity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=float, nargs="+", help="shares of the tables' bytes (default: by device)")
    parser.add_argument("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--search", type=float, nargs="+", default=[1.0, 0.5], help="parts of the budget for a cache")
    parser.add_argument("--leave-out", nargs="*", default=[], metavar="PROVIDER", help="not to be run")
    parser.add_argument("--profile", type=int, help="batches counted before (default: by device)")
    parser.add_argument("--warm", type=int, default=48, help="steps that a cache sees before it is timed")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds at least")
    parser.add_argument("--most-rounds", type=int, default=40, help="measured rounds at most")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="of measuring, after which rounds end; and of --warm"
    )
    parser.add_argument("--kernels", type=int, default=0, help="show where time goes, once a provider: so many lines")
    parser.add_argument("--memories", type=Path, metavar="FILE", help="of benchmarks.floor --out (default: measure)")
    parser.add_argument("--host-gib", type=float, default=100.0, help="of host memory that tables may take together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    for name, value in _DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if bad := [budget for budget in args.budgets if not 0 < budget <= 1]:
        parser.error(f"--budgets {bad}: give shares above 0, up to 1")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record as it goes, and print; the result that is printed."""
    args = parse_arguments(argv)
    harness.keep_freed_memory()
    # `timeout` ends us so: what was measured is recorded on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    memories = Memories.load(args.memories) if args.memories else measure_here(args.device, 4 * args.dim)
    result: dict[str, Any] = {"ms": {}, "not_run": {}, "set_up_seconds": {}, "memories": asdict(memories)}
    rows: list[Row] = []
    for optimizer in args.optimizers:
        if args.device == "cpu" and optimizer not in CPU_OPTIMIZERS:
            result["not_run"][optimizer] = "FBGEMM has it on CUDA only"
        else:
            rows += measure(args, optimizer, memories, result)
            free()
    for row in rows:
        key = f"{row.parameters['optimizer']}.{row.parameters['budget']:g}"
        result["ms"].setdefault(key, {})[row.provider] = row.timing.p50
    for name, why in result["not_run"].items():
        print(f"not run: {name}: {why}")
    args.record = False  # they are there already
    return harness.finish(args, result, [])


def show(optimizer: str, budget: float, rows: Sequence[Row]) -> str:
    """A point for people."""
    lines = [f"{optimizer}, {budget:.0%} of the tables' bytes in HBM: ms a step, of the floor, look-ups served"]
    for row in rows:
        multiple = row.quality["floor_multiple"]
        floor = f"{multiple:.2f}x" if multiple is not None else "-"
        lines.append(f"  {row.provider:<20}{row.timing.p50:>10.3f}{floor:>9}{row.quality['hit_rate']:>9.1%}")
    return "\n".join(lines) if rows else f"{optimizer}, {budget:.0%}: nothing that runs here"


if __name__ == "__main__":
    main()
