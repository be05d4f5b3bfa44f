"""What does leaving out updates cost in AUC and log-loss, and is it less than leaving out as many blindly?

    python -m benchmarks.convergence --data day_0.parquet --seeds 8 --share 0.3 0.5 0.7 0.9 --json

Trains examples/train_dlrm.py's model with nothing left out, with Slipstream's defaults and with controls. Runs of one
seed start from the same weights and see the same samples in the same order, so their differences are paired. The
providers:

``ours``            the default StalenessConfig with this share as its target, everywhere, whether it saves time or not.
``ours_tail``       the same with ``tail_share`` 0.75: rare rows first, whose updates cost most time.
``random_rows``     as many look-ups, of random ones among the trained rows, drawn again at every decision.
``random_lookups``  every look-up with this probability, of trained rows or not.
``movement``        the paper's: rows that move least a touch, below one threshold, thawed in turn.

The JSON has for every share and provider the mean and standard deviation over the seeds of the differences to nothing
left out (``auc_delta``: higher is better; ``logloss_delta``, in nats: lower is better), the share of look-ups that was
in fact left out since skipping began, and the tracker's share of the run's time.
"""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

from benchmarks import harness
from benchmarks.controls import PROVIDERS, attach_provider
from benchmarks.harness import Row, Timing
from benchmarks.jobs import JOB_OPTIONS, add_job_options, job
from examples.arguments import session_config
from examples.runtime import pick_device, process_group, quiet
from examples.train_dlrm import Data, attach_slipstream, load_data, train
from torchrec_slipstream import Placement

# What leaves inputs out (``--drop-share`` of the main job), with and without updates of stale rows: ``--inputs`` and
# ``--skip``.
INPUT_PROVIDERS = {
    "random_inputs": ("random", "off"),
    "thinning": ("thinning", "off"),
    "thinning_ours": ("thinning", "everywhere"),
}


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = harness.make_parser("convergence", "AUC and log-loss lost to skipping updates, against blind controls.")
    parser.add_argument("--share", type=float, nargs="+", default=[0.5], help="of look-ups, to be left out")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    add_job_options(parser)
    args = parser.parse_args(argv)
    harness.check_least(parser, args, seeds=1)
    return args


def train_with(arguments: Namespace, data: Data, provider: str, share: float) -> dict[str, Any]:
    """One training with a provider, one of ``INPUT_PROVIDERS`` or "none": what the main job returns of it."""
    inputs, skip = INPUT_PROVIDERS.get(provider, ("off", "off" if provider == "none" else "everywhere"))
    arguments = Namespace(**{**vars(arguments), "skip_share": share, "skip": skip, "inputs": inputs})
    attach = attach_slipstream(arguments, data)
    if provider in PROVIDERS:

        def attach(model: Any, steps: int, placement: Placement | None) -> Any:
            return attach_provider(provider, model, session_config(arguments, steps), arguments.seed)

    with redirect_stdout(io.StringIO()):  # the job reports every evaluation there
        return train(arguments, data, attach)


def run(arguments: Namespace, data: Data, provider: str, share: float) -> dict[str, Any]:
    """One training: test AUC and log-loss, the measured share and the tracker's share of the time."""
    result = train_with(arguments, data, provider, share)
    slip = result["slipstream"]
    return {
        "auc": result["test"]["auc"],
        "log_loss": result["test"]["log_loss"],
        "measured_share": slip["measured_share"] if slip else 0.0,
        "tracker_share": result["tracker_share"],
    }


def compare(args: Namespace) -> dict[float, dict[str, list[dict[str, Any]]]]:
    """All runs: by share and provider, one result a seed, with the differences to the seed's run without skipping."""
    results: dict[float, dict[str, list[dict[str, Any]]]] = {
        share: {provider: [] for provider in args.providers} for share in args.share
    }
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    data: Data | None = None
    with (
        process_group(pick_device(args.device)),
        tqdm(total=args.seeds * (1 + len(args.share) * len(args.providers)), unit="run", file=sys.stderr) as bar,
    ):
        for seed in seeds:
            arguments = job(args, seed)
            if data is None or args.data == "synthetic":  # which is other data for every seed
                data = load_data(arguments)
            bar.set_description(f"seed {seed}, none")
            none = run(arguments, data, "none", 0.0)
            bar.update()
            for share, by_provider in results.items():
                for provider, found in by_provider.items():
                    bar.set_description(f"seed {seed}, {provider} {share:g}")
                    one = run(arguments, data, provider, share)
                    one["auc_delta"] = one["auc"] - none["auc"]
                    one["logloss_delta"] = one["log_loss"] - none["log_loss"]
                    found.append({"seed": seed, "auc_none": none["auc"], "logloss_none": none["log_loss"], **one})
                    bar.update()
    return results


def summarise(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Means, and for the differences standard deviations (0 of a single seed), over the seeds."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    return {
        "auc_delta": fmean(columns["auc_delta"]),
        "auc_delta_sd": stdev(columns["auc_delta"]) if len(runs) > 1 else 0.0,
        "logloss_delta": fmean(columns["logloss_delta"]),
        "logloss_delta_sd": stdev(columns["logloss_delta"]) if len(runs) > 1 else 0.0,
        "measured_share": fmean(columns["measured_share"]),
        "tracker_share": fmean(columns["tracker_share"]),
    }


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    head = f"{'share':<7}{'provider':<16}{'AUC':>9}{'sd':>8}{'log-loss':>11}{'sd':>8}{'left out':>10}{'tracker':>9}"
    lines = [f"differences to no skipping, mean of {result['seeds']} paired seeds, {result['data']}", head]
    for share, providers in result["share"].items():
        for name, one in providers.items():
            lines.append(
                f"{share:<7}{name:<16}{one['auc_delta']:>+9.4f}{one['auc_delta_sd']:>8.4f}"
                f"{one['logloss_delta']:>+11.4f}{one['logloss_delta_sd']:>8.4f}"
                f"{one['measured_share']:>10.1%}{one['tracker_share']:>9.1%}"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, compare, record and print; the result that is printed."""
    args = parse_arguments(argv)
    quiet()
    try:
        runs = compare(args)
    except ValueError as error:
        raise SystemExit(f"benchmarks.convergence: {error}") from error
    result = {
        "seeds": args.seeds,
        "first_seed": args.first_seed,
        "data": args.data,
        "share": {
            f"{share:g}": {provider: summarise(found) for provider, found in by_provider.items()}
            for share, by_provider in runs.items()
        },
    }
    parameters = {name: getattr(args, name) for name in (*JOB_OPTIONS, "seeds", "first_seed")}
    rows = [
        Row(
            question="convergence",
            provider=provider,
            parameters={**parameters, "share": share},
            timing=Timing(tuple(one["auc_delta"] for one in found)),
            unit="AUC minus AUC without skipping",
            quality={**result["share"][f"{share:g}"][provider], "runs": found},
            device=args.device,
        )
        for share, by_provider in runs.items()
        for provider, found in by_provider.items()
    ]
    print(show(result))
    return harness.finish(args, result, rows)


if __name__ == "__main__":
    main()
