"""How many samples a second does a DLRM train, by provider, and at what AUC?

    python -m benchmarks.throughput --json

Each configuration (benchmarks/configurations.py: the papers' Kaggle, Terabyte and Avazu, their larger tables hashed to
``--max-rows``, and two embedding-bound ones of ours) is trained by every provider (benchmarks/providers.py) from equal
weights on equal batches of synthetic traffic, turn by turn. The JSON, by configuration and provider:

``speedup``         stock's (``torchrec_fused``) step over the provider's: the median of the rounds; ``_p20``, ``_p80``.
``ms``              the median step, session's step() included; ``mean_speedup`` is of means, which see the decisions.
``samples_per_second``  by the median step.
``auc``, ``log_loss``  of held-out samples after all steps; few steps, so these only compare.
``skipped_share``   of the look-ups in the measured rounds, those whose update was left out.
``not_run``         (beside the configurations) which providers this machine cannot run, and why.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torchrec.datasets.utils import Batch

from benchmarks import harness
from benchmarks.configurations import CONFIGURATIONS, Configuration, make_batches
from benchmarks.harness import Row, Timing, interleaved
from benchmarks.providers import NAMES, Provider, Setting, build, not_run
from examples.metrics import Evaluation
from examples.runtime import pick_device, process_group, quiet

STOCK = "torchrec_fused"
_SHAPE = ("dim", "batch", "lookups", "zipf", "positives", "table_rate", "dense_sizes", "over_sizes")


def evaluate(provider: Provider, test: Batch, device: torch.device) -> dict[str, float]:
    """AUC and log-loss (nats) of a batch; ends the provider's training."""
    evaluation = Evaluation(device)  # that the process group can gather from
    evaluation.update(provider.predict(test).to(device), test.labels.to(device))
    return {name: value for name, value in evaluation.compute().items() if name in ("auc", "log_loss")}


def counted(provider: Provider) -> tuple[int, int]:
    """Look-ups so far, and those whose update was left out; none without a session."""
    if provider.session is None:
        return 0, 0
    total = provider.session.report().total
    return total.lookups, total.skipped


def measure(
    configuration: Configuration, names: list[str], args: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], list[Row]]:
    """All providers on one configuration: results and rows by provider."""
    device = pick_device(args.device)
    # Each batch once: a second pass would flatter whoever forgets least.
    batches, test = make_batches(configuration, args.warmup + args.rounds, args.test, seed=args.seed)
    setting = Setting(configuration, batches, args.seed, device)
    providers = {name: build(name, setting) for name in names}
    before: dict[str, tuple[int, int]] = {}

    def count(name: str, turn: int) -> None:
        if turn == args.warmup:
            before[name] = counted(providers[name])

    timings = interleaved(
        {name: lambda turn, step=provider.step: step() for name, provider in providers.items()},  # type: ignore[misc]
        args.rounds,
        args.warmup,
        device=args.device,
        title=configuration.name,
        before=count,
    )
    stock = timings[STOCK]
    parameters = {
        "configuration": configuration.name,
        "max_rows": args.max_rows,
        "rows": sum(configuration.table_rows),
        "tables": len(configuration.table_rows),
        "about": "synthetic, hashed",
        **{name: getattr(configuration, name) for name in _SHAPE},
        **{name: getattr(args, name) for name in ("rounds", "warmup", "test", "seed")},
    }
    results, rows = {}, []
    for name, timing in timings.items():
        # Round by round: what else the machine did then hit both.
        ratios = Timing(tuple(a / b for a, b in zip(stock.samples, timing.samples, strict=True)))
        lookups, skipped = (now - then for now, then in zip(counted(providers[name]), before[name], strict=True))
        results[name] = {
            "speedup": ratios.p50,
            "speedup_p20": ratios.p20,
            "speedup_p80": ratios.p80,
            "mean_speedup": stock.mean / timing.mean,
            "ms": 1e3 * timing.p50,
            "samples_per_second": configuration.batch / timing.p50,
            "skipped_share": skipped / max(1, lookups),
            **evaluate(providers[name], test, device),
        }
        samples = tuple(1e3 * one for one in timing.samples)
        rows.append(Row("throughput", name, parameters, Timing(samples), "ms", results[name], device=args.device))
    return results, rows


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = []
    for configuration, providers in result["configurations"].items():
        lines.append(f"{configuration}:")
        lines.append(
            f"  {'provider':<26}{'ms':>9}{'speedup':>9}{'by means':>9}{'AUC':>9}{'log-loss':>10}{'left out':>10}"
        )
        lines += [
            f"  {name:<26}{one['ms']:>9.2f}{one['speedup']:>9.3f}{one['mean_speedup']:>9.3f}{one['auc']:>9.4f}"
            f"{one['log_loss']:>10.4f}{one['skipped_share']:>10.1%}"
            for name, one in providers.items()
        ]
    lines += [f"not run: {name} ({reason})" for name, reason in result["not_run"].items()]
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("throughput", "End-to-end DLRM training steps, by provider.")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--providers", nargs="+", choices=NAMES, default=list(NAMES), help=f"{STOCK} is always run")
    parser.add_argument("--max-rows", type=int, default=200_000, help="larger tables are hashed to as many rows")
    parser.add_argument("--batch", type=int, help="samples a step (default: the configuration's)")
    parser.add_argument("--rounds", type=int, default=25, help="measured rounds")
    parser.add_argument("--warmup", type=int, default=135, help="rounds thrown away; skipping begins, and is tried")
    parser.add_argument("--test", type=int, default=65_536, help="held-out samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    harness.check_least(parser, args, max_rows=1, batch=1, rounds=1, test=1, warmup=0, seed=0)
    try:
        pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record and print; the result that is printed."""
    args = parse_arguments(argv)
    quiet()
    harness.keep_freed_memory()
    reasons = {name: not_run(name, args.device) for name in args.providers}
    names = [name for name in NAMES if name == STOCK or (name in reasons and reasons[name] is None)]
    result: dict[str, Any] = {
        "configurations": {},
        "not_run": {name: reason for name, reason in reasons.items() if reason is not None},
    }
    with process_group(pick_device(args.device)):
        for chosen in args.configurations:
            configuration = CONFIGURATIONS[chosen].hashed(args.max_rows)
            if args.batch is not None:
                configuration = configuration.with_batch(args.batch)
            result["configurations"][chosen], rows = measure(configuration, names, args)
            if args.record:  # at once: a run that is cut off keeps what it had
                harness.record(rows, args.csv)
    print(show(result), file=sys.stdout)
    return harness.finish(args, result, [])


if __name__ == "__main__":
    main()
