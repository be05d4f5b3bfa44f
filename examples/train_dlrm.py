"""Trains TorchRec's DLRM on click logs, in one process or under torchrun.

    python examples/train_dlrm.py                                    # embedded synthetic data
    python examples/train_dlrm.py --data day_0.tsv.gz --json run.json && slipstream report run.json
    torchrun --nproc-per-node 2 examples/train_dlrm.py
    python examples/train_dlrm.py --compare                          # every --skip mode, side by side
    python examples/train_dlrm.py --placement planned --hbm-budget 10% --replan-every 50

Stock TorchRec: DistributedModelParallel after the planner's plan, fused row-wise Adagrad, TrainPipelineSparseDist.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

if __package__ in (None, ""):
    # Run as a file, Python puts examples/ on the path and not the repository, which `import examples` needs.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer
from tqdm import tqdm

from examples.arguments import SKIP_MODES, parse_arguments, session_config
from examples.metrics import Evaluation
from examples.model import build_model, describe_plan
from examples.runtime import pick_device, process_group, quiet
from examples.runtime import world_size as ranks
from examples.samples import Samples, batches, count_batches
from examples.show import show
from examples.tiers import SIMULATED, Tiers, budget_bytes, tiers_for
from examples.timing import StepClock
from torchrec_slipstream import Placement, Report, Slipstream
from torchrec_slipstream.errors import SlipstreamError
from torchrec_slipstream.report.record import FORMAT, VERSION, versions


@dataclass(frozen=True)
class Data:
    """Training and test samples, and what the best possible model would get on the test (synthetic data only)."""

    train: Samples
    test: Samples
    best: dict[str, float] | None


def load_data(args: Namespace) -> Data:
    """The samples that the arguments ask for, split in their order: the test follows the training in time.

    Raises ValueError for files and sizes that cannot be trained on.
    """
    if args.data == "synthetic":
        from examples.synthetic import make_synthetic

        trace = make_synthetic(args.samples or 200_000, args.rows_per_table, seed=args.seed, drift=args.drift)
        samples = trace.samples
    else:
        from examples.criteo import load_criteo  # needs pyarrow, which the synthetic data does without

        trace = None
        samples = load_criteo(args.data, args.rows_per_table, args.samples)
    n_train = round(len(samples) * args.train_share)
    train, test = samples.split(n_train)
    # Said here, before a model is built: too few for one batch on every rank.
    count_batches(len(train), args.batch_size, world_size=ranks())
    count_batches(len(test), args.batch_size, world_size=ranks(), drop_last=False)
    best = {"auc": trace.bayes_auc(n_train), "log_loss": trace.bayes_log_loss(n_train)} if trace else None
    return Data(train, test, best)


def model_of(
    args: Namespace, data: Data, device: torch.device, tiers: Tiers | None = None
) -> tuple[DistributedModelParallel, KeyedOptimizer, Placement | None]:
    """The model that the arguments ask for, as `build_model` gives it."""
    return build_model(
        data.train.table_rows,
        embedding_dim=args.embedding_dim,
        dense_sizes=args.dense_mlp,
        over_sizes=args.over_mlp,
        learning_rate=args.learning_rate,
        dense_learning_rate=args.dense_learning_rate or args.learning_rate,
        batch_size=args.batch_size,
        sharding=args.sharding,
        seed=args.seed,
        device=device,
        tiers=tiers,
    )


class Session(Protocol):
    """What `train` asks of a session: Slipstream's, or a control's in its place."""

    def step(self) -> None: ...

    def report(self) -> Report: ...


Attach = Callable[[DistributedModelParallel, int, Placement | None], Session | None]


def train(args: Namespace, data: Data | None = None, attach: Attach | None = None) -> dict[str, Any]:
    """One complete training: builds the model, trains it, tests it. Needs a default process group.

    The same arguments give the same model and the same order of samples, so runs that differ in one of them compare.
    `data` saves loading it again; `attach(model, steps)` puts another session in the place of the one that
    `args.skip` asks for.

    Returns what the run was and did, ready for JSON; every rank the same metrics, and its own times.
    """
    data = data or load_data(args)
    device = pick_device(args.device)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tiers = None
    if args.placement == "planned":
        tiers = tiers_for(
            data.train, args.profile, args.hbm_budget, embedding_dim=args.embedding_dim, world_size=world_size
        )
    model, optimizer, placement = model_of(args, data, device, tiers)
    epoch_steps = count_batches(len(data.train), args.batch_size, world_size=world_size)
    steps = epoch_steps * args.epochs
    slip = (attach or attach_slipstream(args, data))(model, steps, placement)
    if args.inputs != "off":  # about; how many are kept shows as they are read
        steps = max(1, round(steps * (1 - args.drop_share)))
    epochs = (
        batches(data.train, args.batch_size, seed=args.seed, epoch=epoch, rank=rank, world_size=world_size)
        for epoch in range(args.epochs)
    )
    # The pipeline reads ahead, so it gets all epochs as one stream and is filled and drained once.
    clock = StepClock(model, optimizer)
    stream = clock.reading(chain.from_iterable(map(slip.inputs, epochs) if isinstance(slip, Slipstream) else epochs))
    pipeline = TrainPipelineSparseDist(model, optimizer, device)
    test_at = {round(steps * i / args.evaluations) for i in range(1, args.evaluations + 1)}
    history: list[dict[str, float]] = []
    tested_at: list[float] = []

    def test(step: int) -> None:
        report = slip.report() if slip is not None and args.inputs != "off" else None
        shift = report.inputs.logit_shift if report is not None and report.inputs is not None else 0.0
        found = evaluate(pipeline, data.test, args.batch_size, device, shift)
        seen = step * args.batch_size * world_size
        history.append({"step": step, "samples_seen": seen, **found})
        tested_at.append(sum(clock.steps))
        if rank == 0:
            bar.write(_line(f"skip {args.skip}, step {step} of {steps}", found))

    model.train()
    with tqdm(total=steps, unit="step", desc=f"skip {args.skip}", disable=None if rank == 0 else True) as bar:
        for step in count(1):
            try:
                with clock.step():
                    loss, _, _ = pipeline.progress(stream)
                    if slip is not None:
                        with clock.part("session"):
                            slip.step()
                    if device.type == "cuda" and step % 50 == 0:
                        torch.cuda.synchronize()  # now and then, so that host times add up to the device's
            except StopIteration:
                break
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)
            if step in test_at:
                test(step)
        steps = step - 1
        if not history or history[-1]["step"] != steps:
            test(steps)

    seconds = sum(clock.steps)
    report = slip.report() if slip is not None else None
    if report is not None and report.placement is not None and args.plot and rank == 0:
        report.placement.plot(args.plot)
    return {
        # What makes this a run's record, of which `slipstream report` makes a page.
        "format": FORMAT,
        "version": VERSION,
        "name": f"skip {args.skip}" + (f", inputs {args.inputs}" if args.inputs != "off" else ""),
        "versions": versions(device),
        "skip": args.skip,
        "inputs": args.inputs,
        "data": str(args.data),
        "seed": args.seed,
        "device": str(device.type),
        "world_size": world_size,
        "train_samples": len(data.train),
        "test_samples": len(data.test),
        "batch_size": args.batch_size,
        "embedding_dim": args.embedding_dim,
        "rows": sum(data.train.table_rows),
        "steps": steps,
        "test": history[-1],
        "best_possible": data.best,
        "history": history,
        "tested_at_seconds": tested_at,
        "seconds": seconds,
        "samples_per_second": steps * args.batch_size * world_size / seconds,
        "step_ms": clock.milliseconds(),
        "tracker_share": report.tracker_seconds / seconds if report else 0.0,
        "plan": describe_plan(model),
        "slipstream": report.to_dict() if report else None,
    }


def attach_slipstream(args: Namespace, data: Data) -> Attach:
    """Attaches what `args.skip` and `args.placement` ask for."""

    def attach(model: DistributedModelParallel, steps: int, placement: Placement | None) -> Session | None:
        if args.skip == "off" and args.placement == "off" and args.inputs == "off":
            return None
        budget = None
        if args.placement == "live":
            ranks = torch.distributed.get_world_size()
            budget = budget_bytes(args.hbm_budget, data.train.table_rows, 4 * args.embedding_dim + 4, ranks)
        return Slipstream(model, session_config(args, steps, budget), placement=placement)

    return attach


def evaluate(
    pipeline: TrainPipelineSparseDist,
    samples: Samples,
    batch_size: int,
    device: torch.device,
    logit_shift: float = 0.0,
) -> dict[str, float]:
    """Test metrics over all ranks (see Evaluation.compute), in the middle of training. Collective.

    `logit_shift` is what dropping inputs has made the logits too low by (see InputReport).
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # The pipeline has rewritten the model's forward to take its read-ahead batches; those wait while the model, put
    # back, runs over the test samples.
    model = pipeline.detach()
    model.eval()
    evaluation = Evaluation(device)
    with torch.no_grad():
        # Four times the batch: without a backward there is room, and it is quicker.
        for batch in batches(samples, 4 * batch_size, shuffle=False, drop_last=False, rank=rank, world_size=world_size):
            _, (_, logits, labels) = model(batch.to(device))
            evaluation.update(logits + logit_shift, labels)
    model.train()
    pipeline.attach(model)
    return evaluation.compute()


def _line(head: str, test: dict[str, float]) -> str:
    return (
        f"{head}: test AUC {test['auc']:.4f}, normalised entropy {test['normalized_entropy']:.4f}, "
        f"log-loss {test['log_loss']:.4f}"
    )


def main(argv: list[str] | None = None) -> None:
    """Run what the command line asks for; bad arguments and bad data end it with a message, before training."""
    args = parse_arguments(argv)
    quiet()
    try:
        device = pick_device(args.device)
        # Its own checks, before data are loaded and a model is built.
        session_config(Namespace(**{**vars(args), "skip": "rows"}) if args.compare else args, steps=0)
        data = load_data(args)
    except ValueError as error:
        raise SystemExit(f"train_dlrm: {error}") from error
    with process_group(device) as (rank, _):
        if args.placement != "off" and device.type == "cpu" and rank == 0:
            print(SIMULATED, file=sys.stderr)
        modes = SKIP_MODES if args.compare else (args.skip,)
        try:
            runs = {mode: train(Namespace(**{**vars(args), "skip": mode}), data) for mode in modes}
        except SlipstreamError as error:  # a profile or a budget that does not fit
            raise SystemExit(f"train_dlrm: {error}") from error
        if rank == 0:
            print(show(runs))
            if args.json:
                result = runs if args.compare else runs[args.skip]
                args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
