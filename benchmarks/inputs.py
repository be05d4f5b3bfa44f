"""What does it cost in AUC, and save in time, to leave inputs out of training, by method?

    python -m benchmarks.inputs --data day_0.parquet --seeds 5 --json
    python -m benchmarks.inputs --samples 200000 --rows-per-table 300 --epochs 3 --seeds 5 --json

Trains examples/train_dlrm.py's model on all inputs, and with each method of benchmarks/input_methods.py for each share
to be dropped. Runs of one seed start from the same weights and read the same samples in the same order, so their
differences to nothing dropped are paired. The JSON has, by share and method, means over the seeds (``_sd``: standard
deviations):

``auc_delta``       higher is better.
``logloss_delta``   in nats; lower is better.
``vs_negatives``    AUC above that of plain negative down-sampling on the same seed, and its standard error.
``calibration``     mean prediction over the share of positives among the test samples; 1 is right.
``dropped_share``   of all inputs; ``dropped_positives``: of the positive ones.
``trained``         samples trained on.
``time``            whole run's seconds over those without dropping.

``undropped`` has the same for what drops nothing: ``balanced``, all inputs with ours' weight of positives, to tell what
of ours is due to that; and with the share of the inputs that were hot, FAE's order of pure hot and cold batches, and
Hotline's two micro-batches a step.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import torch
from torchrec.datasets.utils import Batch
from tqdm import tqdm

from benchmarks import harness
from benchmarks.harness import Row, Timing
from benchmarks.input_methods import DROPPING, Method
from benchmarks.input_orders import REORDERING, Fae, HotlineSteps
from benchmarks.jobs import JOB_OPTIONS, add_job_options, job
from examples.metrics import Evaluation
from examples.runtime import pick_device, process_group, quiet
from examples.samples import batches, count_batches
from examples.train_dlrm import Data, load_data, model_of

Result = dict[str, Any]


def train(arguments: argparse.Namespace, data: Data, name: str, share: float) -> dict[str, float]:
    """One training; "none" is stock TorchRec without a session."""
    device = pick_device(arguments.device)
    model, optimizer, _ = model_of(arguments, data, device)
    steps = count_batches(len(data.train), arguments.batch_size) * arguments.epochs
    method: Method | Fae | HotlineSteps | None = None
    if name in (*DROPPING, "balanced"):
        method = Method(name, model, data.train, share, arguments.seed, steps)
    elif name in REORDERING:
        method = REORDERING[name](model, data, arguments)
    backward: Callable[[Batch], object] = lambda batch: model(batch)[0].backward()  # noqa: E731
    if isinstance(method, HotlineSteps):
        backward = method.backward
    epochs: Iterable[Iterable[Batch]] = (
        batches(data.train, arguments.batch_size, seed=arguments.seed, epoch=epoch) for epoch in range(arguments.epochs)
    )
    trained, began = 0, time.perf_counter()
    model.train()
    for epoch in epochs:
        for batch in method.inputs(epoch) if method is not None else epoch:
            optimizer.zero_grad()
            backward(batch.to(device))
            optimizer.step()
            if method is not None:
                method.step()
            trained += batch.labels.numel()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    found = {"dropped_share": 0.0, "dropped_positives": 0.0, "hot_share": 0.0}
    shift = 0.0
    if isinstance(method, Method):
        report = method.report()
        shift = report.logit_shift
        found |= {"dropped_share": report.dropped_share, "dropped_positives": report.labels["1"].share}
    elif method is not None:
        found["hot_share"] = method.hot_share()
    return {**found, **evaluate(model, data, arguments, shift), "trained": float(trained), "seconds": seconds}


def evaluate(model: torch.nn.Module, data: Data, arguments: argparse.Namespace, shift: float) -> dict[str, float]:
    """AUC, log-loss and calibration on the test samples; ends the training."""
    device = pick_device(arguments.device)
    evaluation, predicted = Evaluation(device), 0.0
    model.eval()
    with torch.no_grad():
        for batch in batches(data.test, 4 * arguments.batch_size, shuffle=False, drop_last=False):
            _, (_, logits, labels) = model(batch.to(device))
            evaluation.update(logits + shift, labels)
            predicted += float((logits + shift).double().sigmoid().sum())
    result = evaluation.compute()
    calibration = predicted / (result["ctr"] * result["samples"])
    return {"auc": result["auc"], "log_loss": result["log_loss"], "calibration": calibration}


def compare(args: argparse.Namespace) -> dict[tuple[str, str], list[Result]]:
    """All runs by share ("0" of those that drop nothing) and method, one a seed."""
    todo = [(f"{share:g}", name) for share in args.share for name in args.methods] + [("0", n) for n in args.undropped]
    results: dict[tuple[str, str], list[Result]] = {one: [] for one in todo}
    data: Data | None = None
    with (
        process_group(pick_device(args.device)),
        tqdm(total=args.seeds * (1 + len(todo)), unit="run", file=sys.stderr) as bar,
    ):
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            arguments = job(args, seed)
            if data is None or args.data == "synthetic":  # which is other data for every seed
                data = load_data(arguments)
            if seed == args.first_seed:  # thrown away: a process's first run pays for what is made once
                train(argparse.Namespace(**{**vars(arguments), "epochs": 1}), _beginning(data, arguments), "none", 0.0)
            none = train(arguments, data, "none", 0.0)
            bar.update()
            for share, name in todo:
                bar.set_description(f"seed {seed}, {name} {share}")
                gc.collect()  # of the run before, whose models hold each other, or it would take time from this one
                one = train(arguments, data, name, float(share))
                deltas = {"auc_delta": one["auc"] - none["auc"], "logloss_delta": one["log_loss"] - none["log_loss"]}
                results[share, name].append(
                    {"seed": seed, **deltas, "time": one["seconds"] / none["seconds"], "auc_none": none["auc"], **one}
                )
                bar.update()
    return results


def _beginning(data: Data, arguments: argparse.Namespace) -> Data:
    """The first 20 batches' samples."""
    return replace(data, train=data.train.slice(0, min(len(data.train), 20 * arguments.batch_size)))


def summarise(runs: list[Result], negatives: list[Result] | None) -> dict[str, float]:
    """Means over the seeds, with the spread of what is compared (0 of a single seed)."""
    found = {name: fmean(run[name] for run in runs) for name in runs[0] if name not in ("seed", "auc_none", "seconds")}
    for name in ("auc_delta", "logloss_delta"):
        found[f"{name}_sd"] = stdev(run[name] for run in runs) if len(runs) > 1 else 0.0
    if negatives:
        above = [run["auc"] - other["auc"] for run, other in zip(runs, negatives, strict=True)]
        found["vs_negatives"] = fmean(above)
        found["vs_negatives_se"] = stdev(above) / len(above) ** 0.5 if len(above) > 1 else 0.0
    return found


def show(result: Result) -> str:
    """The result for people."""
    lines = [
        f"differences to no dropping, mean of {result['seeds']} paired seeds, {result['data']}",
        f"{'share':<7}{'method':<22}{'AUC':>9}{'sd':>8}{'log-loss':>11}{'sd':>8}{'calibr.':>9}{'dropped':>9}"
        f"{'time':>7}{'vs negatives':>14}{'se':>8}",
    ]
    for share, methods in [*result["share"].items(), ("0", result["undropped"])]:
        for name, one in methods.items():
            above = f"{one['vs_negatives']:>+14.4f}{one['vs_negatives_se']:>8.4f}" if "vs_negatives" in one else ""
            lines.append(
                f"{share:<7}{name:<22}{one['auc_delta']:>+9.4f}{one['auc_delta_sd']:>8.4f}{one['logloss_delta']:>+11.5f}"
                f"{one['logloss_delta_sd']:>8.5f}{one['calibration']:>9.3f}{one['dropped_share']:>9.1%}"
                f"{one['time']:>7.2f}{above}"
            )
    return "\n".join(lines)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("inputs", "AUC, log-loss and time of leaving inputs out, against blind controls.")
    add_job_options(parser)
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.3, 0.5], help="of the inputs, to be dropped")
    parser.add_argument("--methods", nargs="*", choices=DROPPING, default=list(DROPPING))
    undropped = ["balanced", *REORDERING]
    parser.add_argument("--undropped", nargs="*", choices=undropped, default=undropped, help="what drops nothing")
    args = parser.parse_args(argv)
    harness.check_least(parser, args, seeds=1, first_seed=0)
    if bad := [share for share in args.share if not 0.0 < share < 1.0]:
        parser.error(f"--share {bad[0]:g}: give a share above 0 and below 1")
    return args


def main(argv: list[str] | None = None) -> Result:
    """Train, compare, record and print; the result that is printed."""
    args = parse_arguments(argv)
    quiet()
    try:
        runs = compare(args)
    except ValueError as error:
        raise SystemExit(f"benchmarks.inputs: {error}") from error
    found = {one: summarise(results, runs.get((one[0], "negatives"))) for one, results in runs.items()}
    result: Result = {
        "seeds": args.seeds,
        "data": args.data,
        "share": {
            f"{share:g}": {name: found[f"{share:g}", name] for name in args.methods} for share in sorted(args.share)
        },
        "undropped": {name: found["0", name] for name in args.undropped},
    }
    parameters = {name: getattr(args, name) for name in (*JOB_OPTIONS, "seeds", "first_seed")}
    rows = [
        Row(
            question="inputs",
            provider=name,
            parameters={**parameters, "share": float(share)},
            timing=Timing(tuple(run["auc_delta"] for run in results)),
            unit="AUC minus AUC without dropping",
            quality={**found[share, name], "runs": results},
            device=args.device,
        )
        for (share, name), results in runs.items()
    ]
    print(show(result))
    return harness.finish(args, result, rows)


if __name__ == "__main__":
    main()
