"""Which rows should be in fast memory, and what do other ways of choosing them cost?

    python -m benchmarks.placement --data ../shared/data/criteo_tb_80k.parquet --json
    python -m benchmarks.placement --data production --json
    python -m benchmarks.placement --scale --json

The first part of a trace is profiled (or warms a cache up), the rest is measured, at HBM budgets of 1, 5, 10 and 25% of
the tables' bytes (weights and row-wise Adagrad's state). A row hits if it is in HBM when its batch arrives. The JSON:

``budget``      share of look-ups whose row hits, by budget and policy:
``ours``              rows by worth a byte over all tables, the worth learnt from the profile's first and second half
                      (``AccessProfile.followed_by``), as the planner takes them;
``ours_counts``       the same by the profile's access counts alone;
``torchrec_scaleup``  TorchRec's ``EmbeddingOffloadScaleupProposer`` fed with our statistics, spending all the budget,
                      each table's cache filled with its most looked-up rows;
``uniform``           one load factor for all tables, likewise;
``lru``, ``lfu``      FBGEMM's cache with its 32-way sets, simulated: one for all tables of equal dim, all of one load
                      factor. They go on learning while the rest is measured;
``static_best``       the best fixed choice in hindsight (but for the last row): the allocation on the rest's look-ups;
``belady``            what no cache of this size can exceed that knows the future, and may fill itself before the rest
                      begins: an upper bound (PFOO-L), see ``caches.belady_bound``.
``requests``    the same placements by share of requests, a request being one distinct row of one batch: what crosses
                the bus. ``static_best`` is the allocation on requests then, and ``belady`` is exact where all rows are
                of equal bytes.
``of_static_best``  ours over static_best, of ``budget``.

With ``--scale``: seconds and peak memory of allocating 1,000 tables with 10^9 rows of int32 counts, histograms and hot
rows included.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import caches, harness
from benchmarks.harness import Row, Timing
from benchmarks.policies import TorchRecScaleup, densest, held_out, profile_of, uniform
from benchmarks.traces import Production, Trace, make_production, read_trace
from torchrec_slipstream.access import CountHistogram
from torchrec_slipstream.placement.allocation import TableDemand, allocate, hot_rows_of

BUDGETS = (0.01, 0.05, 0.1, 0.25)
POLICIES = ("ours", "ours_counts", "torchrec_scaleup", "uniform", "lru", "lfu", "static_best", "belady")
METRICS = ("budget", "requests")
Bools = npt.NDArray[np.bool_]
Rates = dict[str, dict[str, float]]


class Comparison:
    """One trace, cut into the part that is known and the rest that is measured."""

    def __init__(self, trace: Trace, first: int) -> None:
        self.trace, self.first, self.last = trace, first, len(trace.batches) - 1
        if not 2 <= first < self.last:
            raise ValueError(f"{self.last} batches, of which {first} are profiled; give 2 or more, and leave some")
        self.counts = trace.count_lookups(0, first)
        self.values = held_out(trace, first)
        self.profile = profile_of(trace, 0, first)
        self.scaleup = TorchRecScaleup(trace, self.profile)
        self.rest = slice(int(trace.batches[first]), len(trace.rows))
        self.worth = {
            "budget": trace.count_lookups(first, self.last),
            "requests": trace.count_batches(first, self.last),
        }
        self.since, self.until = caches.waits(trace.rows, trace.batches, first)
        self.request_bytes = trace.row_bytes[trace.rows[self.rest]]

    def rates(self, share: float) -> dict[str, dict[str, float]]:
        """Hit rate by metric and policy, with ``share`` of the tables' bytes."""
        budget = int(share * self.trace.total_bytes)
        placed = {
            "ours": densest(self.trace, self.counts, budget, self.values),
            "ours_counts": densest(self.trace, self.counts, budget),
            "torchrec_scaleup": self.scaleup.hot_rows(budget),
            "uniform": uniform(self.trace, self.profile, budget),
        }
        cached = {"lru": self._cache("lru", share, budget), "lfu": self._cache("lfu", share, budget)}
        found: dict[str, dict[str, float]] = {}
        for metric in METRICS:
            worth = self.worth[metric]
            weights = self.trace.lookups[self.rest] if metric == "budget" else np.ones(len(self.since), dtype=np.int64)
            hits = {name: float(worth[hot].sum()) for name, hot in placed.items()}
            hits |= {name: float(weights[hit].sum()) for name, hit in cached.items()}
            hits["static_best"] = float(worth[densest(self.trace, worth, budget)].sum())
            hits["belady"] = self._belady(metric, weights, budget)
            found[metric] = {name: hits[name] / float(worth.sum()) for name in POLICIES}
        return found

    def _cache(self, kind: str, share: float, budget: int) -> Bools:
        """Which requests of the rest hit FBGEMM's cache."""
        trace = self.trace
        hits = np.zeros(len(trace.rows), dtype=bool)
        table_of = np.repeat(np.arange(len(trace.tables)), [table.rows for table in trace.tables])
        dims = np.array([table.dim for table in trace.tables])
        row_dims = dims[table_of]
        sets = _deal_sets(trace, share, budget)
        for dim, number in sets.items():
            mine = row_dims == dim
            # Linear ids run through the tables of one cache.
            linear = np.cumsum(mine) - 1
            sets_of = caches.cache_set(linear, max(1, number))
            chosen = np.flatnonzero(mine[trace.rows])
            batches = np.searchsorted(chosen, trace.batches)
            rows, lookups = trace.rows[chosen], trace.lookups[chosen]
            if kind == "lru":
                hits[chosen] = caches.simulate_lru(rows, batches, sets_of, number)
            else:
                hits[chosen] = caches.simulate_lfu(rows, lookups, batches, sets_of, number)
        return hits[self.rest]

    def _belady(self, metric: str, weights: npt.NDArray[np.integer], budget: int) -> float:
        sizes = {table.row_bytes for table in self.trace.tables}
        if metric == "requests" and len(sizes) == 1:
            return float(caches.belady(self.since, self.until, budget // sizes.pop()))
        return caches.belady_bound(self.since, self.until, self.request_bytes, budget, weights)


def _deal_sets(trace: Trace, share: float, budget: int) -> dict[int, int]:
    """Sets of the cache of each dim: of one load factor, rounded so that all together keep to the budget."""
    rows: dict[int, int] = {}
    set_bytes: dict[int, int] = {}
    for table in trace.tables:
        rows[table.dim] = rows.get(table.dim, 0) + table.rows
        set_bytes[table.dim] = caches.WAYS * table.row_bytes
    wanted = {dim: share * number / caches.WAYS for dim, number in rows.items()}
    sets = {dim: int(number) for dim, number in wanted.items()}
    left = budget - sum(sets[dim] * set_bytes[dim] for dim in sets)
    for dim in sorted(wanted, key=lambda dim: sets[dim] - wanted[dim]):
        if set_bytes[dim] <= left:
            sets[dim] += 1
            left -= set_bytes[dim]
    return sets


def measure_scale(tables: int, rows: int, seed: int = 0) -> tuple[dict[str, Any], list[float]]:
    """Seconds of histograms, allocation and hot rows of so many counts, and the process's peak memory."""
    generator = np.random.default_rng(seed)
    sizes = np.full(tables, rows // tables)
    # Counts with a heavy tail; two thirds of the rows are looked up once or never. The counts are the input: not timed.
    sample = (generator.pareto(1.05, 1 << 22) * 0.7).clip(0, 1 << 30).astype(np.int32)
    # A copy: np.resize may give a part of something larger.
    counts = [np.resize(np.roll(sample, int(generator.integers(1 << 22))), size).copy() for size in sizes]
    row_bytes = [4 * int(dim) + 4 for dim in generator.choice([16, 32, 64, 128, 256], tables)]
    budget = sum(size * each for size, each in zip(sizes.tolist(), row_bytes, strict=True)) // 10
    began = time.perf_counter()
    demands = [TableDemand(f"t{i}", CountHistogram.of(counts[i]), row_bytes[i]) for i in range(tables)]
    counted = time.perf_counter()
    shares = allocate(demands, budget)
    allocated = time.perf_counter()
    hot = [hot_rows_of(counts[i], shares[f"t{i}"]) for i in range(tables)]
    ended = time.perf_counter()
    result = {
        "tables": tables,
        "rows": int(sizes.sum()),
        "classes": sum(len(one.histogram.counts) for one in demands),
        "hot_rows": sum(len(one) for one in hot),
        "seconds": ended - began,
        "seconds_histograms": counted - began,
        "seconds_allocation": allocated - counted,
        "seconds_hot_rows": ended - allocated,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    return result, [ended - began]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("placement", "Hit rates of row placements and caches at HBM budgets.")
    parser.add_argument("--data", help="a Criteo or REES46 parquet file, or 'production' for synthetic tables")
    parser.add_argument("--profile", type=float, default=0.5, help="share of the batches that is profiled")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="shares of the tables' bytes")
    parser.add_argument("--batch", type=int, help="samples a batch (default: 2048; production: 65536)")
    parser.add_argument("--dim", type=int, default=64, help="of a file's tables")
    parser.add_argument("--headroom", type=float, default=1.0, help="rows of a file's tables over their distinct ids")
    parser.add_argument("--shuffle", action="store_true", help="put a file's samples into random order: no drift")
    parser.add_argument(
        "--resample", type=int, help="draw so many times a file's samples from it: no drift, and longer"
    )
    parser.add_argument("--batches", type=int, default=Production.batches, help="of production traffic")
    parser.add_argument("--sample", type=int, default=Production.sample, help="one row in so many is simulated")
    parser.add_argument("--tables", type=int, help="of production traffic, or of --scale (default: 800, or 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", action="store_true", help="measure the time and memory of allocating, on its own")
    parser.add_argument("--rows", type=int, default=10**9, help="rows of all tables, of --scale")
    args = parser.parse_args(argv)
    if not args.scale and not args.data:
        parser.error("give --data PATH, --data production, or --scale")
    return args


def load(args: argparse.Namespace) -> Trace:
    if args.data == "production":
        sizes = Production(batches=args.batches, sample=args.sample, seed=args.seed)
        sizes = replace(sizes, tables=args.tables or sizes.tables, batch_size=args.batch or sizes.batch_size)
        return make_production(sizes)
    return read_trace(
        Path(args.data),
        batch_size=args.batch or 2048,
        dim=args.dim,
        headroom=args.headroom,
        shuffle=args.shuffle,
        resample=args.resample or 0,
        seed=args.seed,
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record and print; the result that is printed."""
    args = parse_arguments(argv)
    if args.scale:
        scale, seconds = measure_scale(args.tables or 1000, args.rows, args.seed)
        row = Row("placement.scale", "ours", scale, Timing(tuple(seconds)), "s", {"peak_gib": scale["peak_gib"]}, "cpu")
        print(", ".join(f"{name} {value:.5g}" for name, value in scale.items()))
        return harness.finish(args, {"scale": scale}, [row])
    trace = load(args)
    comparison = Comparison(trace, int(args.profile * (len(trace.batches) - 1)))
    result: dict[str, Any] = {metric: {} for metric in METRICS}
    rows: list[Row] = []
    parameters = {
        "data": Path(args.data).stem,
        "about": trace.about,
        "profile": args.profile,
        "batch": trace.batch_size,
        "batches": comparison.last,
        "tables": len(trace.tables),
        "bytes": trace.total_bytes,
        "dims": sorted({table.dim for table in trace.tables}),
        "seed": args.seed,
    }
    for share in args.budgets:
        print(f"budget {share:g} ...", file=sys.stderr)
        for metric, rates in comparison.rates(share).items():
            result[metric][f"{share:g}"] = rates
            question = "placement.hit_rate" if metric == "budget" else "placement.hit_rate_requests"
            rows += [
                Row(question, name, parameters | {"budget": share}, Timing((rate,)), "share", {}, "cpu")
                for name, rate in rates.items()
            ]
    result["of_static_best"] = {share: one["ours"] / one["static_best"] for share, one in result["budget"].items()}
    result["data"] = parameters
    print(show(result))
    return harness.finish(args, result, rows)


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [result["data"]["about"]]
    for metric, title in zip(METRICS, ("look-ups that hit", "requests that hit"), strict=True):
        lines.append(f"{title:<18}" + "".join(f"{float(share):>9.0%}" for share in result[metric]))
        lines += [
            f"{name:<18}" + "".join(f"{rates[name]:>9.4f}" for rates in result[metric].values()) for name in POLICIES
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
