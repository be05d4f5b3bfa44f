"""``slipstream profile``: how often are the rows of a log looked up? ``slipstream plan``: where should they live?
``slipstream report``: what became of them?

    slipstream profile day_0.parquet --columns 'C*' --rows 1000000 --hash modulo --out profile.npz
    slipstream plan --profile profile.npz --hbm-budget 8GiB --devices 8 --picture plan.png
    slipstream plan --calibrate --out bw.json
    slipstream report run.json --out run.html

None needs a GPU, a model or a process group: the plan is for the devices that the options describe. (Calibrating
measures the machine it runs on.)
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.planner.constants import DDR_CAP
from torchrec.modules.embedding_configs import DataType

from torchrec_slipstream.access import AccessProfile
from torchrec_slipstream.access.parquet import pyarrow_modules
from torchrec_slipstream.arguments import can_draw, can_write, is_file, make_parser
from torchrec_slipstream.errors import ConfigError, PlanError, ProfileError, SlipstreamError
from torchrec_slipstream.placement import Placement, SlipstreamPlanner
from torchrec_slipstream.placement.calibration import Bandwidths, calibrate
from torchrec_slipstream.placement.picture import draw
from torchrec_slipstream.report.page import page
from torchrec_slipstream.report.record import load_all
from torchrec_slipstream.tbe.memory import OPTIMIZERS, optimizer_state

_SHARES = (0.01, 0.05, 0.1, 0.25)
# Tables of more rows than so many times their look-ups are likely raw ids that training will hash.
_RAW = 1000
_WEIGHTS = {4: DataType.FP32, 2: DataType.FP16}
# Options of `slipstream plan` that calibrating heeds.
_CALIBRATES = ("device", "row_bytes", "seconds", "out")


def main(argv: list[str] | None = None) -> int:
    """Run a command line (default: ``sys.argv``'s); its exit status. What cannot be done ends in one message."""
    args = _parse(argv)
    try:
        with _hushed():
            return int(args.run(args))
    except (SlipstreamError, ImportError) as error:
        return _fail(args.prog, str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(args.prog, f"{where}{error.strerror or error}; give a path that can be read or written")
    except MemoryError as error:
        return _fail(args.prog, f"out of host memory ({error or 'allocation failed'}); give fewer rows or columns")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    return make_parser(__doc__ or "", profile, plan, report).parse_args(argv)


# ------------------------------------------------------------------------------------------------------------ profile


def profile(args: argparse.Namespace) -> int:
    """``slipstream profile``."""
    is_file(args.data, "a parquet file")
    can_write(args.out, "--out", ".npz")
    if args.picture is not None:
        can_draw(args.picture)
    columns = _columns(args.data, args.columns) if args.columns is not None else None
    names = args.table_names
    if names is not None and columns is None:
        raise ConfigError("--table-names needs --columns, which says what to name")
    found = AccessProfile.from_parquet(
        args.data,
        {column: names.replace("{}", column) for column in columns} if columns and names else columns,
        embedding_dim=args.dim,
        rows=args.rows,
        hashing=None if args.hash == "none" else args.hash,
        limit=args.samples,
        null_row=args.null_row,
        element_size=args.element_size,
        optimizer=args.optimizer,
        progress=sys.stderr.isatty() and not args.json,
    )
    found.save(args.out)
    if args.picture is not None:
        draw(found, None, args.picture)
    print(json.dumps(_profile_dict(found), allow_nan=False) if args.json else found)
    if args.rows is None and (sparse := [one for one in found.tables.values() if one.rows > _RAW * one.lookups]):
        first = f"{sparse[0].name} (of {len(sparse)} such) has ids up to {sparse[0].rows - 1:,}"
        _say(args.prog, f"column {first}, hence as many rows; if training hashes them, give --rows N --hash modulo")
    return 0


def _columns(path: Path, patterns: list[str]) -> list[str]:
    """The file's columns that match the names or patterns, in the file's order."""
    pyarrow, parquet = pyarrow_modules()
    try:
        there: list[str] = parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise ProfileError(f"{path} cannot be read as parquet ({error}); give a whole parquet file") from error
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in there):
            raise ProfileError(f"{path} has no column {pattern!r}; it has {', '.join(there)}")
    return [name for name in there if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _profile_dict(found: AccessProfile) -> dict[str, Any]:
    return {
        "samples": found.samples,
        "lookups": found.lookups,
        "bytes": found.total_bytes,
        "hit_rate": {str(share): found.hit_rate(share) for share in _SHARES},
        "tables": {
            name: {
                "rows": table.rows,
                "embedding_dim": table.embedding_dim,
                "lookups": table.lookups,
                "used_rows": int(table.histogram.rows[table.histogram.counts > 0].sum()),
                "cacheability": table.cacheability,
                "hit_rate": {str(share): table.hit_rate(max(1, int(share * table.rows))) for share in _SHARES},
            }
            for name, table in found.tables.items()
        },
    }


# --------------------------------------------------------------------------------------------------------------- plan


def plan(args: argparse.Namespace) -> int:
    """``slipstream plan``."""
    if args.calibrate:
        return _calibrate(args)
    if args.profile is None:
        raise ConfigError("--profile is missing; give a profile of `slipstream profile`, or --calibrate")
    is_file(args.profile, "a profile of `slipstream profile`")
    if args.out is not None:
        can_write(args.out, "--out", ".npz")
    if args.picture is not None:
        can_draw(args.picture)
    per_host = args.per_host if args.per_host is not None else min(args.devices, 8)
    if args.devices % per_host:
        raise ConfigError(f"--devices {args.devices} is no multiple of --per-host {per_host}; give whole hosts")
    bandwidths = Bandwidths.load(args.bandwidths) if args.bandwidths is not None else None
    capacities = {"hbm_cap": args.hbm, "ddr_cap": args.ddr // per_host if args.ddr is not None else DDR_CAP}
    describes = {"world_size": args.devices, "local_world_size": per_host, "compute_device": args.device or "cuda"}
    measured = bandwidths if bandwidths is not None else Bandwidths(row_bytes=4, threads=1, machine="unknown")
    found = AccessProfile.load(args.profile)
    if not found.lookups:
        raise ProfileError(f"{args.profile} has no look-ups to plan by; profile data that has some")
    optimizer = args.optimizer if args.optimizer is not None else _optimizer_of(found)
    planner = SlipstreamPlanner(
        profile=found,
        topology=measured.topology(**describes, **capacities),
        hbm_budget=args.hbm_budget,
        batch_size=args.batch_size,
        backing=args.backing,
        # Not data parallel: its tables are copies in every device's HBM, without a fused optimizer.
        constraints={name: ParameterConstraints(sharding_types=args.sharding) for name in found.tables},
    )
    kind = EmbOptimType[optimizer_state(optimizer).name.upper()]
    planner.plan(_model(found), [EmbeddingBagCollectionSharder(fused_params={"optimizer": kind})])
    made = planner.placement
    assert made is not None
    if args.out is not None:
        made.save(args.out)
    if args.picture is not None:
        draw(found, made, args.picture)
    print(json.dumps(_plan_dict(made), allow_nan=False) if args.json else made)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    plain = vars(_parse(["plan", "--calibrate"]))
    in_vain = [name for name, value in plain.items() if name not in _CALIBRATES and vars(args)[name] != value]
    if in_vain:
        options = ", ".join("--" + name.replace("_", "-") for name in in_vain)
        raise ConfigError(
            f"--calibrate measures instead of planning, which {options} would be for; give one or the other"
        )
    if args.out is not None:
        can_write(args.out, "--out", ".json")
    found = calibrate(args.device, row_bytes=args.row_bytes, seconds=args.seconds)
    if args.out is not None:
        found.save(args.out)
    print(found)
    return 0


def _model(found: AccessProfile) -> nn.Module:
    """A collection ``tables`` of the profile's tables, on the meta device, where they take no memory."""
    tables = []
    for name, table in found.tables.items():
        if table.element_size not in _WEIGHTS:
            raise PlanError(f"table {name!r} has weights of {table.element_size} bytes; profile it with 4 or 2")
        tables.append(
            EmbeddingBagConfig(
                name=name,
                num_embeddings=table.rows,
                embedding_dim=table.embedding_dim,
                feature_names=[name],
                data_type=_WEIGHTS[table.element_size],
            )
        )
    return nn.ModuleDict({"tables": EmbeddingBagCollection(tables=tables, device=torch.device("meta"))})


def _optimizer_of(found: AccessProfile) -> str:
    """An optimizer that keeps what the profile says a row keeps."""
    for name in OPTIMIZERS:
        state = optimizer_state(name)
        if all(state.row_bytes(table.embedding_dim) == table.optimizer_bytes for table in found.tables.values()):
            return name
    raise ConfigError("the profile's tables have different optimizers; say with --optimizer which one to plan for")


def _plan_dict(made: Placement) -> dict[str, Any]:
    def number(value: float | None) -> float | None:
        return None if value is None or math.isnan(value) else value

    return {
        "hit_rate": number(made.hit_rate),
        "expected_ms": number(made.expected_ms),
        "hbm_budget": made.hbm_budget,
        "hbm_bytes": list(made.hbm_bytes),
        "host_bytes": list(made.host_bytes),
        "tables": {
            table.name: {
                "kernel": table.kernel,
                "sharding_type": table.sharding_type,
                "ranks": sorted({shard.rank for shard in made.shards if shard.table == fqn}),
                "rows": table.rows,
                "hot_rows": table.hot_rows,
                "hit_rate": number(table.hit_rate),
                "load_factor": table.load_factor,
                "hbm_bytes": table.hbm_bytes,
                "host_bytes": table.host_bytes,
            }
            for fqn, table in made.tables.items()
        },
    }


# ------------------------------------------------------------------------------------------------------------- report


def report(args: argparse.Namespace) -> int:
    """``slipstream report``."""
    for run in args.runs:
        is_file(run, "a run's record: what Report.save or examples/train_dlrm.py --json wrote")
    out = args.out if args.out is not None else args.runs[0].with_suffix(".html")
    can_write(out, "--out", ".html")
    if any(out.exists() and out.samefile(run) for run in args.runs):
        raise ConfigError(f"--out {out} is a RUN itself; give another path")
    found = load_all(args.runs)
    out.write_text(page(found), encoding="utf-8", errors="replace")  # JSON can name what UTF-8 cannot
    print(f"{out}: {', '.join(run.name for run in found)}")
    return 0


def _say(prog: str, message: str) -> None:
    print(f"{prog}: {message}", file=sys.stderr)


def _fail(prog: str, message: str) -> int:
    _say(prog, message)
    return 2


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what TorchRec tells its own developers about its planner's defaults."""
    logger = logging.getLogger("torchrec")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="torchrec")
            yield
    finally:
        logger.setLevel(level)


if __name__ == "__main__":
    sys.exit(main())
