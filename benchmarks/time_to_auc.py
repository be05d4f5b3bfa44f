"""How long until a DLRM is as good as it gets, with and without updates left out?

    python -m benchmarks.time_to_auc --data day_0.parquet --json

Trains examples/train_dlrm.py's model with nothing left out (``none``: stock TorchRec) and with the providers of
``benchmarks.convergence`` and those that leave inputs out (``random_inputs`` is the control, ``thinning_ours`` leaves
updates out as well), tested at ``--evaluations`` moments. The target is, for each seed, what stock reaches at the
end of its run less ``--below``; a run's time to it is that of its training steps (tests are not counted), between two
tests by a straight line. The JSON, by provider (the CSV's percentiles are of whole runs, as some never get there):

``seconds``      by seed; null where the target was not reached.  ``ratio``: stock's over the provider's, the median of
                 the pairs where both reached it, and not at once.  ``reached``: how many did.
``final_auc``    the mean at the end, and ``auc_delta``, the mean of the differences to stock's.
``whole_run``    stock's time for the whole run over the provider's, the median of the pairs.
"""

from __future__ import annotations

import argparse
import sys
from statistics import fmean, median
from typing import Any

from tqdm import tqdm

from benchmarks import harness
from benchmarks.controls import PROVIDERS
from benchmarks.convergence import INPUT_PROVIDERS, train_with
from benchmarks.harness import Row, Timing
from examples.arguments import parse_arguments as job_arguments
from examples.arguments import share
from examples.runtime import pick_device, process_group, quiet
from examples.train_dlrm import load_data

NONE = "none"
Curve = list[tuple[float, float]]


def seconds_to(curve: Curve, target: float) -> float | None:
    """When a curve of (seconds, AUC) first reaches the target; None if it never does."""
    before_seconds, before_auc = 0.0, 0.5
    for seconds, auc in curve:
        if auc >= target:
            part = (target - before_auc) / (auc - before_auc) if auc > before_auc else 1.0
            return before_seconds + max(0.0, part) * (seconds - before_seconds)
        before_seconds, before_auc = seconds, auc
    return None


def measure(args: argparse.Namespace) -> dict[str, list[Curve]]:
    """Curves by provider, one a seed; who goes first moves on by one a seed."""
    names = [NONE, *args.providers]
    curves: dict[str, list[Curve]] = {name: [] for name in names}
    device = pick_device(args.device)
    with (
        process_group(device),
        tqdm(total=args.seeds * len(names), unit="run", file=sys.stderr) as bar,
    ):
        for seed in range(args.seeds):
            words = ["--data", args.data, "--seed", str(seed), "--evaluations", str(args.evaluations)]
            arguments = job_arguments([*words, "--device", args.device, *args.job])
            if seed == 0:
                _warm_up(arguments)
            data = load_data(arguments)
            first = seed % len(names)
            for name in names[first:] + names[:first]:
                bar.set_description(f"seed {seed}, {name}")
                run = train_with(arguments, data, name, args.share)
                aucs = [point["auc"] for point in run["history"]]
                curves[name].append(list(zip(run["tested_at_seconds"], aucs, strict=True)))
                bar.update()
    return curves


def _warm_up(arguments: argparse.Namespace) -> None:
    """A short run, thrown away: the first of a process pays for what is made once, a second or so; nobody shall."""
    short = {"data": "synthetic", "samples": 20 * arguments.batch_size, "epochs": 1, "evaluations": 1}
    warm = argparse.Namespace(**{**vars(arguments), **short, "placement": "off"})
    train_with(warm, load_data(warm), NONE, 0.0)


def summarise(curves: dict[str, list[Curve]], below: float) -> dict[str, dict[str, Any]]:
    """What the JSON has, by provider."""
    targets = [curve[-1][1] - below for curve in curves[NONE]]
    stock = [seconds_to(curve, target) for curve, target in zip(curves[NONE], targets, strict=True)]
    result = {}
    for name, found in curves.items():
        seconds = [seconds_to(curve, target) for curve, target in zip(found, targets, strict=True)]
        # 0 s: the target is no better than chance, where every curve begins.
        ratios = [a / b for a, b in zip(stock, seconds, strict=True) if a and b]
        result[name] = {
            "seconds": seconds,
            "ratio": median(ratios) if ratios else None,
            "reached": sum(one is not None for one in seconds),
            "final_auc": fmean(curve[-1][1] for curve in found),
            "auc_delta": fmean(a[-1][1] - b[-1][1] for a, b in zip(found, curves[NONE], strict=True)),
            "whole_run": median(b[-1][0] / a[-1][0] for a, b in zip(found, curves[NONE], strict=True)),
        }
    return result


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"{result['data']}, {result['seeds']} seeds; the target is stock's last AUC less {result['below']:g}",
        f"{'provider':<15}{'to target':>11}{'speedup':>13}{'reached':>9}{'last AUC':>10}{'delta':>9}{'whole run':>11}",
    ]
    for name, one in result["providers"].items():
        found = [seconds for seconds in one["seconds"] if seconds is not None]
        time = f"{median(found):.1f} s" if found else "never"
        ratio = f"{one['ratio']:.2f}" if one["ratio"] is not None else "-"
        lines.append(
            f"{name:<15}{time:>11}{ratio:>13}{one['reached']:>7}/{result['seeds']}{one['final_auc']:>10.4f}"
            f"{one['auc_delta']:>+9.4f}{one['whole_run']:>11.2f}"
        )
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("time_to_auc", "Training time until a target AUC, by what is left out.")
    parser.add_argument("--data", default="synthetic", help="a Criteo-format file, or 'synthetic'")
    parser.add_argument("--seeds", type=int, default=3, help="paired runs")
    parser.add_argument("--share", type=share, default=0.5, help="of look-ups, to be left out")
    parser.add_argument("--below", type=share, default=0.001, help="the target is stock's last AUC less this")
    parser.add_argument("--evaluations", type=int, default=12, help="tests in a run")
    known = [*PROVIDERS, *INPUT_PROVIDERS]
    parser.add_argument("--providers", nargs="+", choices=known, default=["ours", "random_lookups", *INPUT_PROVIDERS])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--job", nargs=argparse.REMAINDER, default=[], help="the rest is for examples/train_dlrm.py")
    args = parser.parse_args(argv)
    harness.check_least(parser, args, seeds=1, evaluations=1)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, compare, record and print; the result that is printed."""
    args = parse_arguments(argv)
    quiet()
    harness.keep_freed_memory()
    try:
        curves = measure(args)
    except ValueError as error:
        raise SystemExit(f"benchmarks.time_to_auc: {error}") from error
    providers = summarise(curves, args.below)
    names = ("data", "seeds", "below", "share", "evaluations", "job")
    parameters = {name: getattr(args, name) for name in names}
    result = {**parameters, "providers": providers}
    rows = [
        Row(
            question="time_to_auc",
            provider="torchrec_fused" if name == NONE else name,
            parameters=parameters,
            timing=Timing(tuple(curve[-1][0] for curve in curves[name])),
            unit="s",
            quality={**one, "curves": [[(round(s, 3), round(auc, 5)) for s, auc in curve] for curve in curves[name]]},
            device=args.device,
        )
        for name, one in providers.items()
    ]
    print(show(result))
    return harness.finish(args, result, rows)


if __name__ == "__main__":
    main()
