"""The command line of train_dlrm.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from examples.model import SHARDINGS
from examples.tiers import PLACEMENTS
from torchrec_slipstream import (
    AccessConfig,
    ConfigError,
    InputsConfig,
    PlacementConfig,
    SlipstreamConfig,
    SlipstreamInputs,
    StalenessConfig,
)
from torchrec_slipstream.budget import parse_bytes
from torchrec_slipstream.config import SELECTIONS, SIGNALS

# What can be left out of the fused update, in the order in which --compare runs them: none; those of stale rows, where
# that saves time; or wherever there are any.
SKIP_MODES = ("off", "rows", "everywhere")
# The methods of InputsConfig that drop samples.
DROPPING = ("off", "random", "negatives", "thinning", "slipstream")
_STALENESS = StalenessConfig()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; argparse's exit with a message that names the value for one out of range."""
    parser = argparse.ArgumentParser(
        prog="train_dlrm",
        description="Train TorchRec's DLRM on click logs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="synthetic", help="a Criteo-format .parquet, .tsv or .tsv.gz, or 'synthetic'")
    data.add_argument("--samples", type=at_least(10), help="samples to read or make (all of a file; 200000 synthetic)")
    data.add_argument("--train-share", type=share, default=0.8, help="the first so much is trained on, the rest tests")
    data.add_argument("--rows-per-table", type=at_least(10), default=100_000, help="rows of the largest table")
    data.add_argument("--drift", type=share, default=0.0, help="synthetic: share of popular rows that change hands")

    model = parser.add_argument_group("model")
    model.add_argument("--embedding-dim", type=dim, default=16, help="a multiple of 4")
    model.add_argument("--dense-mlp", type=sizes, default="64,32", help="hidden widths below the interaction")
    model.add_argument("--over-mlp", type=sizes, default="64,32", help="hidden widths above the interaction")
    model.add_argument("--sharding", choices=sorted(SHARDINGS), default="auto", help="how tables may be sharded")

    run = parser.add_argument_group("training")
    run.add_argument("--batch-size", type=at_least(1), default=128, help="samples a step and rank")
    run.add_argument("--learning-rate", type=positive, default=0.03, help="of the tables (row-wise Adagrad)")
    run.add_argument("--dense-learning-rate", type=positive, help="of the MLPs (Adagrad); default: as the tables")
    run.add_argument("--epochs", type=at_least(1), default=1)
    run.add_argument("--evaluations", type=at_least(1), default=4, help="tests during the run, the last at its end")
    run.add_argument("--seed", type=at_least(0), default=0, help="of the weights, the order, and synthetic data")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument("--skip", choices=SKIP_MODES, default="off", help="stale rows' updates: rows, if it saves time")
    run.add_argument("--compare", action="store_true", help="run every --skip mode, one after the other")
    run.add_argument("--json", type=Path, metavar="FILE", help="write the results there, for `slipstream report`")

    tiers = parser.add_argument_group("hot rows")
    tiers.add_argument("--placement", choices=PLACEMENTS, default="off", help="planned, or found while training (live)")
    tiers.add_argument("--profile", type=Path, metavar="FILE", help="plan from this access profile (.npz)")
    tiers.add_argument("--hbm-budget", type=budget, default="10%", help="a rank: bytes, or a share of all rows' bytes")
    tiers.add_argument("--replan-every", type=at_least(0), default=0, help="steps between re-plans; 0: never")
    tiers.add_argument("--plot", type=Path, metavar="FILE", help="draw the hit rate over steps there")

    inputs = parser.add_argument_group("inputs")
    inputs.add_argument("--inputs", choices=DROPPING, default="off", help="which samples are dropped")
    inputs.add_argument("--drop-share", type=share, default=InputsConfig().drop_share, help="of all samples")

    # The rest of the knobs have their defaults; the config classes of torchrec_slipstream document them all.
    stale = parser.add_argument_group("staleness (with --skip)")
    stale.add_argument("--skip-share", type=share, default=_STALENESS.target_share, help="of look-ups, after warm-up")
    stale.add_argument("--warmup-steps", type=at_least(0), help="before skipping begins (a quarter of the run)")
    stale.add_argument("--interval", type=at_least(1), default=_STALENESS.interval, help="steps between decisions")
    stale.add_argument("--min-probability", type=share, default=_STALENESS.min_probability, help="least (sampling)")
    stale.add_argument("--tail-share", type=share, default=_STALENESS.tail_share, help="prefer rare rows (sampling)")
    stale.add_argument("--signal", choices=SIGNALS, default=_STALENESS.signal, help="of rows (duty, threshold)")
    stale.add_argument("--selection", choices=SELECTIONS, default=_STALENESS.selection, help="what is left out")
    stale.add_argument("--min-touches", type=at_least(1), default=_STALENESS.min_touches, help="look-ups before stale")
    stale.add_argument("--thaw-every", type=at_least(2), default=_STALENESS.thaw_every, help="intervals (threshold)")
    stale.add_argument("--count-every", type=at_least(1), help="count one step in k (8; 1 with --replan-every)")
    args = parser.parse_args(argv)
    if args.placement == "live" and not args.replan_every:
        parser.error("--placement live finds hot rows by re-planning: give --replan-every")
    return args


def session_config(args: argparse.Namespace, steps: int, hbm_budget: int | None = None) -> SlipstreamConfig:
    """The arguments as a SlipstreamConfig for a run of `steps`. Raises ConfigError for values that it refuses."""
    staleness = StalenessConfig(
        target_share=args.skip_share if args.skip != "off" else 0.0,
        warmup_steps=steps // 4 if args.warmup_steps is None else args.warmup_steps,
        interval=args.interval,
        where="everywhere" if args.skip == "everywhere" else "faster",
        min_probability=args.min_probability,
        tail_share=args.tail_share,
        signal=args.signal,
        selection=args.selection,
        min_touches=args.min_touches,
        thaw_every=args.thaw_every,
    )
    return SlipstreamConfig(
        staleness=staleness,
        access=AccessConfig(every=args.count_every or (1 if args.replan_every else AccessConfig().every)),
        placement=PlacementConfig(hbm_budget=hbm_budget, replan_every=args.replan_every),
        inputs=InputsConfig(
            method=args.inputs,
            drop_share=args.drop_share,
            seed=args.seed,
            slipstream=SlipstreamInputs(start=staleness.warmup_steps, snapshot_steps=args.interval),
        ),
    )


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` on."""

    def convert(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"is {value}; give {least} or more")
        return value

    convert.__name__ = "whole number"  # argparse names the type by this when int() fails
    return convert


def budget(text: str) -> str | float:
    """An argparse type: bytes as they stand ("64MiB"), a share ("10%") as a float."""
    if text.endswith("%"):
        return share(str(float(text[:-1]) / 100))
    try:
        parse_bytes(text)
    except ConfigError as error:  # argparse shows no other error's message
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def positive(text: str) -> float:
    """An argparse type: finite numbers above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"is {text}; give a number above 0")
    return value


def share(text: str) -> float:
    """An argparse type: numbers from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"is {text}; give a number from 0 to 1")
    return value


def dim(text: str) -> int:
    """An argparse type: the widths that FBGEMM has."""
    value = int(text)
    if value < 4 or value % 4:
        raise argparse.ArgumentTypeError(f"is {value}; give a multiple of 4 (FBGEMM's tables have no other widths)")
    return value


def sizes(text: str) -> list[int]:
    """An argparse type: layer widths, "64,32"."""
    values = [int(part) for part in text.split(",") if part]
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"is {text}; give widths of 1 or more, such as 64,32")
    return values
