"""PROJECTION: what a step's embeddings would take on 8 to 128 GPUs, by the planner's own cost model.

    python -m benchmarks.projection --json
    python -m benchmarks.projection --data terabyte --max-rows 100000000 --bandwidths this_machine.json --json

Nothing here was measured on such machines. ``SlipstreamPlanner`` says what the slowest device needs a step: TorchRec's
estimates for tables in HBM and for what is sent between devices, and besides, over the bus, each distinct cold row of a
global batch once to be read and once to be written. Every line that is printed and every row says that it is projected.

``ours``                  SlipstreamPlanner's plan, hot rows pinned in overlays;
``torchrec_uvm_caching``  TorchRec's ``EmbeddingOffloadScaleupProposer`` with the same statistics and topology, rated by
                          the same model: its caches miss as LRU caches of their size do (Che's approximation). The
                          best of a plan with each of ``sharding``.

Tables are ``production`` ones (``benchmarks.traces``: sizes, dims, exponents and look-ups a sample are drawn) or
Terabyte's; popularity is a law, not a trace. Each GPU's HBM for tables is such that the fewest GPUs together hold
``--budget`` of the tables' bytes (or ``--hbm``), besides room for inputs and outputs: more GPUs hold more. Of it
TorchRec is told to leave free what FBGEMM keeps for every row, which its planner does not count. The JSON's keys, by
devices and provider:

``projected_ms``        of the slowest device, of the embeddings alone.
``pinned_ms``           the same were each cache filled with its table's most looked-up rows: what of the difference is
                        the cache's policy, and what its size.
``cold_rows``           distinct cold rows a step, of all devices; the parts of a row in column shards are rows each.
``predicted_hit_rate``  share of look-ups that find their row in HBM, were all pinned.
``hbm_taken``           HBM of the fullest device over what it has, with all that FBGEMM allocates: above 1, the plan
                        would not fit.
``sharding``            the type that was best for TorchRec; ours takes any.
``topology``            by devices: HBM, bandwidths in GB/s, and where they are from.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import PlannerError, ShardingOption
from tqdm import tqdm

from benchmarks import harness
from benchmarks.configurations import CONFIGURATIONS
from benchmarks.harness import Row, Timing
from benchmarks.problems import SHARDERS, Problem, Shape, cached_share, make_profile
from benchmarks.traces import Production
from torchrec_slipstream import AccessProfile, SlipstreamPlanner
from torchrec_slipstream.budget import format_bytes, parse_bytes
from torchrec_slipstream.placement.allocation import TableShare
from torchrec_slipstream.placement.calibration import Bandwidths
from torchrec_slipstream.placement.estimators import (
    Booking,
    RowPerfEstimator,
    RowStorageEstimator,
    expected_milliseconds,
    storage_of,
)
from torchrec_slipstream.placement.filling import Filling
from torchrec_slipstream.placement.tables import plan_tables, set_pooling
from torchrec_slipstream.tbe.memory import CACHE_MAP_BYTES, optimizer_state

SHARDINGS = ("table_wise", "column_wise")
PROVIDERS = ("torchrec_uvm_caching", "ours")
# Of every row of a cached table, in HBM: row-wise Adagrad's state, and the cache's map from rows to tables.
_KEPT_BYTES = optimizer_state("rowwise_adagrad").rowwise_bytes + CACHE_MAP_BYTES
BANDWIDTHS = ("hbm_mem_bw", "ddr_mem_bw", "hbm_to_ddr_mem_bw", "intra_host_bw", "inter_host_bw")


@dataclass(frozen=True)
class Projected:
    """What one provider's plan is expected to be; see the module's docstring."""

    projected_ms: float
    pinned_ms: float
    cold_rows: float
    predicted_hit_rate: float
    hbm_taken: float
    sharding: str = "any"


def production_shapes(sizes: Production) -> list[Shape]:
    """Whole tables, drawn as :func:`benchmarks.traces.make_production` draws them."""
    generator = np.random.default_rng(sizes.seed)
    rows = np.exp(generator.uniform(np.log(sizes.smallest), np.log(sizes.largest), sizes.tables)).astype(np.int64)
    dims = generator.choice(sizes.dims, sizes.tables)
    exponents = generator.uniform(*sizes.exponents, sizes.tables)
    pooling = np.exp(generator.uniform(np.log(sizes.pooling[0]), np.log(sizes.pooling[1]), sizes.tables))
    drawn = zip(rows.tolist(), dims.tolist(), exponents.tolist(), pooling.tolist(), strict=True)
    return [Shape(number, dim, exponent, sizes.flat, bag) for number, dim, exponent, bag in drawn]


def project_ours(problem: Problem) -> Projected:
    """By the planner's own placement."""
    planner = problem.planner("ours_overlay")
    assert isinstance(planner, SlipstreamPlanner)
    planner.plan(problem.model, SHARDERS)
    placed = planner.placement
    assert placed is not None
    return Projected(
        projected_ms=placed.expected_ms,
        pinned_ms=placed.expected_ms,
        cold_rows=sum(shard.misses for shard in placed.shards),
        predicted_hit_rate=placed.hit_rate,
        hbm_taken=max(used / has for used, has in zip(placed.hbm_bytes, placed.hbm_capacity, strict=True)),
    )


def project_torchrec(problem: Problem) -> Projected:
    """TorchRec's plan, rated by our planner's model: the best of one plan a sharding type.

    Its proposer fixes how tables are sharded before it looks at the devices, which users constrain.

    Raises:
        PlannerError: it finds no plan with any of them.
    """
    found: list[Projected] = []
    failure: Exception | None = None
    kept = sum(one.rows for one in problem.shapes) * _KEPT_BYTES // problem.devices
    told = problem.with_hbm(problem.hbm - kept)
    for sharding in SHARDINGS:
        chosen: list[ShardingOption] = []
        planner = told.planner("torchrec_scaleup", sharding, callbacks=[partial(_keep, chosen)])
        try:
            plan = planner.plan(problem.model, SHARDERS)
        except PlannerError as error:
            failure = error
            continue
        pinned_ms, _, _ = rate(problem, chosen, "static")
        milliseconds, cold_rows, hbm_taken = rate(problem, chosen, "lru")
        hit_rate = problem.predicted_hit_rate(planner, plan)
        found.append(Projected(milliseconds, pinned_ms, cold_rows, hit_rate, hbm_taken, sharding))
    if not found and failure is not None:
        raise failure
    return min(found, key=lambda one: one.projected_ms)


def _keep(kept: list[ShardingOption], options: list[ShardingOption]) -> list[ShardingOption]:
    kept.extend(options)
    return options


def rate(problem: Problem, options: list[ShardingOption], policy: str) -> tuple[float, float, float]:
    """Of a TorchRec plan by our planner's model: milliseconds, cold rows a step, and the HBM taken.

    Args:
        policy: what a cache keeps: ``"lru"`` or ``"static"`` (see ``AccessStatistics``).
    """
    topology, global_batch = problem.topology(), problem.batch * problem.devices
    statistics = problem.profile.statistics(global_batch, policy)
    tables = plan_tables(options, SHARDERS, problem.profile, backing="caching", global_batch=global_batch)
    set_pooling(options, tables, global_batch)
    booking = Booking(bus=topology.hbm_to_ddr_mem_bw, tracked=False, tables=tables)
    estimators = [RowPerfEstimator(topology, None, booking), RowStorageEstimator(topology, None, booking)]
    enumerator = EmbeddingEnumerator(topology, problem.batch, estimator=estimators)
    enumerator.enumerate(problem.model, SHARDERS)  # from here on it knows the sharders, which estimators ask for
    booking.enumerating = False
    cold_rows = 0.0
    for option in options:
        table, share = tables[option.fqn], cached_share(option.compute_kernel, option.cache_params)
        of_table = statistics[option.name]
        misses = of_table.expected_lookups * of_table.expected_miss_rate(share)
        for i, shard in enumerate(option.shards):
            rows, columns = shard.size
            a_row, whole, hot = table.bytes_of(columns), share >= 1.0, int(share * rows)
            placed, fixed = (rows * a_row.whole, 0) if whole else (hot * a_row.hot, rows * a_row.fixed)
            missed = misses * rows / max(1, table.rows)
            booking.of_shards[option.fqn, i] = Filling(whole, TableShare(0, 0, hot, placed, 0), missed, placed, fixed)
            cold_rows += missed
    enumerator.populate_estimates(options)
    taken = [0] * problem.devices
    for shard in (shard for option in options for shard in option.shards):
        assert shard.rank is not None
        taken[shard.rank] += storage_of(shard).hbm
    has = topology.devices[0].storage.hbm
    return expected_milliseconds(options, problem.devices), cold_rows, max(taken) / has


def topology_of(problem: Problem, source: str) -> dict[str, Any]:
    """What is assumed of the machine, for the record."""
    topology = problem.topology()
    in_gb = {name: round(float(getattr(topology, name)) / 1e6, 3) for name in BANDWIDTHS if hasattr(topology, name)}
    hbm = topology.devices[0].storage.hbm
    return {"hbm": hbm, "hbm_for_tables": problem.hbm, "gb_per_s": in_gb, "bandwidths_from": source}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(
        "projection", "PROJECTION of the embeddings' time on 8 to 128 GPUs, by the planner's cost model."
    )
    parser.add_argument("--data", choices=("production", "terabyte"), default="production")
    parser.add_argument("--tables", type=int, default=26, help="of production's")
    parser.add_argument("--max-rows", type=int, default=10_000_000, help="of a table of terabyte's; larger are hashed")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 32, 128], help="GPUs, 8 a host")
    parser.add_argument("--batch", type=int, default=512, help="samples a GPU and step")
    parser.add_argument("--samples", type=int, default=10**7, help="of the access profile")
    parser.add_argument("--budget", type=float, default=0.05, help="share of the bytes that the fewest GPUs hold")
    parser.add_argument("--hbm", type=parse_bytes, help="for tables, a GPU, such as 8GiB; instead of --budget")
    parser.add_argument("--bandwidths", type=Path, help="what `slipstream plan --calibrate` saved; default: TorchRec's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0.0 < args.budget <= 1.0:
        parser.error(f"--budget {args.budget:g}: give a share of the tables' bytes, above 0 and at most 1")
    return args


def problems(args: argparse.Namespace) -> tuple[list[Problem], str]:
    """One for each number of devices, and where the bandwidths are from.

    Raises:
        ConfigError: the file of bandwidths is none.
    """
    if args.data == "production":
        shapes = production_shapes(Production(tables=args.tables, seed=args.seed))
    else:
        made = CONFIGURATIONS["terabyte"].hashed(args.max_rows)
        shapes = [Shape(rows, made.dim) for rows in made.table_rows]
    bandwidths, source = {}, "assumed: TorchRec's constants"
    if args.bandwidths is not None:
        measured = Bandwidths.load(args.bandwidths)
        bandwidths = {name: value for name in BANDWIDTHS if (value := getattr(measured, name)) is not None}
        source = f"measured on {measured.machine}: {', '.join(bandwidths)}; assumed, TorchRec's constants: the others"
    profile: AccessProfile = make_profile(shapes, args.samples, args.seed)
    hbm = args.hbm if args.hbm is not None else int(args.budget * sum(one.bytes for one in shapes) / min(args.devices))
    same: dict[str, Any] = {"batch": args.batch, "hbm": hbm, "bandwidths": bandwidths, "room_by_row": False}
    return [Problem(shapes, profile, devices=devices, **same) for devices in args.devices], source


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Project, record and print; the result that is printed."""
    args = parse_arguments(argv)
    logging.getLogger("torchrec").setLevel(logging.ERROR)
    of_devices, source = problems(args)
    shapes = of_devices[0].shapes
    keys = list(Projected.__dataclass_fields__)
    tables = {"tables": len(shapes), "rows": sum(one.rows for one in shapes), "bytes": sum(one.bytes for one in shapes)}
    result: dict[str, Any] = {"projection": True, "data": {"data": args.data} | tables, "topology": {}}
    result |= {key: {} for key in keys}
    records: list[Row] = []
    for problem in tqdm(of_devices, unit="plan"):
        devices = str(problem.devices)
        result["topology"][devices] = topology = topology_of(problem, source)
        for name, project in zip(PROVIDERS, (project_torchrec, project_ours), strict=True):
            found = asdict(project(problem))
            for key in keys:
                result[key].setdefault(devices, {})[name] = found[key]
            parameters = {"devices": problem.devices, **result["data"]}
            parameters |= {key: getattr(args, key) for key in ("batch", "samples", "budget", "hbm", "seed")}
            quality = {"projection": True, **found, **topology}
            timing = Timing((quality.pop("projected_ms"),))
            records.append(Row("projection", name, parameters, timing, "ms", quality))
    print(show(result))
    return harness.finish(args, result, records)


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    data, topologies = result["data"], result["topology"]
    lines = [f"{data['data']}: {data['tables']} tables, {data['rows']:,} rows, {format_bytes(data['bytes'])}"]
    first = next(iter(topologies.values()))
    speeds = ", ".join(f"{name} {value:,.1f}" for name, value in first["gb_per_s"].items())
    lines.append(f"GB/s {speeds} ({first['bandwidths_from']})")
    lines.append(f"{'GPUs':>5} {'':<22}{'ms a step':>10}{'if pinned':>10}{'cold rows':>12}{'hits':>8}{'HBM taken':>11}")
    for devices, by_provider in result["projected_ms"].items():
        for name, milliseconds in by_provider.items():
            pinned, cold, hits, taken = (
                result[key][devices][name] for key in ("pinned_ms", "cold_rows", "predicted_hit_rate", "hbm_taken")
            )
            of_hbm = f"{taken:.0%} of {format_bytes(topologies[devices]['hbm'])}"
            lines.append(
                f"{devices:>5} {name:<22}{milliseconds:>10.2f}{pinned:>10.2f}{cold:>12,.0f}{hits:>8.1%}  {of_hbm}"
            )
    return "\n".join(f"PROJECTION  {line}" for line in lines)


if __name__ == "__main__":
    main()
