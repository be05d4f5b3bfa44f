"""The main job (examples/train_dlrm.py) as benchmarks run it: its options, and its arguments for a run of one seed."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from examples.arguments import parse_arguments

# What is taken over to the main job's command line as it is.
JOB_OPTIONS = (
    "data",
    "samples",
    "epochs",
    "batch_size",
    "embedding_dim",
    "learning_rate",
    "rows_per_table",
    "interval",
)


def add_job_options(parser: ArgumentParser) -> None:
    """Options for paired runs of the main job."""
    parser.add_argument("--data", default="synthetic", help="a Criteo-format file, or 'synthetic'")
    parser.add_argument("--seeds", type=int, default=2, help="paired runs")
    parser.add_argument("--first-seed", type=int, default=0, help="seeds are counted from it")
    group = parser.add_argument_group("the main job (examples/train_dlrm.py)")
    group.add_argument("--samples", type=int, help="samples to read or make (all of a file; 200000 synthetic)")
    group.add_argument("--epochs", type=int, default=1)
    group.add_argument("--batch-size", type=int, default=128)
    group.add_argument("--embedding-dim", type=int, default=16)
    group.add_argument("--learning-rate", type=float, default=0.02)
    group.add_argument("--rows-per-table", type=int, default=30_000)
    group.add_argument("--interval", type=int, help="steps between decisions (default: StalenessConfig's)")
    group.add_argument("--device", default="cpu", choices=("cpu", "cuda"))


def job(args: Namespace, seed: int) -> Namespace:
    """The main job's arguments for one run; its own checks of them, its own defaults for the rest."""
    words = ["--seed", str(seed), "--evaluations", "1", "--device", args.device]
    for name in JOB_OPTIONS:
        if (value := getattr(args, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return parse_arguments(words)
