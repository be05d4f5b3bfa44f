"""How do stock TorchRec and a session scale from one rank to two?

    python -m benchmarks.ranks --json
    python -m benchmarks.ranks --device cuda --ranks 1 2 4 8 --batch 8192 --json

Real processes (gloo, or nccl on GPUs) train DLRM under DistributedModelParallel, with as many samples a rank whatever
the number of ranks (weak scaling) and one OpenMP thread each. In the same processes the providers take turns, step by
step on equal batches:

``torchrec_fused``  stock;
``ours_counting``   a session that counts look-ups and leaves nothing out;
``ours``            a session that leaves half of the look-ups' updates out.

A step takes as long as on its slowest rank. The JSON, by sharding, provider and number of ranks:

``ms``                  median step.
``samples_per_second``  of all ranks together.
``scaling``             those over as many times one rank's of the same provider.
``auc``, ``log_loss``   of unseen samples, after training.
``skipped_share``       share of the look-ups whose update was left out, over the whole run.
``exact``               by sharding and number of ranks: whether ``ours_counting`` ended with stock's weights and
                        optimizer state, bit for bit on every rank.
``cores``, ``enough_cores``  cores of this machine, and by number of ranks whether each has one of its own; where not,
                             ``scaling`` says more about the machine than about anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import KeyedOptimizer

from benchmarks import harness
from benchmarks.configurations import CONFIGURATIONS, make_batches
from benchmarks.harness import Row, Timing, interleaved
from examples.metrics import Evaluation
from examples.model import build_model
from examples.runtime import quiet
from torchrec_slipstream import Slipstream, SlipstreamConfig, StalenessConfig

# Share of the look-ups whose update is left out; None: no session.
PROVIDERS = {"torchrec_fused": None, "ours_counting": 0.0, "ours": 0.5}
SHARDINGS = ("table_wise", "row_wise")
# Steps before the first decision, and between two: the defaults are for longer runs.
_INTERVAL = 20


class Trainee:
    """One provider's model on one rank, in training."""

    def __init__(self, share: float | None, batches: list[Batch], sharding: str, args: argparse.Namespace) -> None:
        made = CONFIGURATIONS[args.configuration].hashed(args.max_rows)
        self.batches, self.device = batches, _device(args.device, dist.get_rank())
        self.model, self.optimizer, _ = build_model(
            made.table_rows,
            embedding_dim=made.dim,
            dense_sizes=list(made.dense_sizes),
            over_sizes=list(made.over_sizes),
            learning_rate=made.table_rate,
            dense_learning_rate=0.02,
            batch_size=args.batch,
            sharding=sharding,
            seed=args.seed,
            device=self.device,
        )
        self.session = None
        if share is not None:
            staleness = StalenessConfig(
                target_share=share, where="everywhere", warmup_steps=_INTERVAL, interval=_INTERVAL
            )
            self.session = Slipstream(self.model, SlipstreamConfig(staleness=staleness))

    def step(self, number: int) -> None:
        loss, _ = self.model(self.batches[number].to(self.device))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.session is not None:
            self.session.step()

    def quality(self, test: list[Batch]) -> dict[str, float]:
        """Over all ranks: collective. Ends the training."""
        evaluation = Evaluation(self.device)
        self.model.eval()
        with torch.no_grad():
            for batch in test:
                _, (_, logits, labels) = self.model(batch.to(self.device))
                evaluation.update(logits, labels)
        found = evaluation.compute()
        tables = self.session.report().tables.values() if self.session is not None else ()
        share = sum(one.skipped for one in tables) / max(1, sum(one.lookups for one in tables))
        return {"auc": found["auc"], "log_loss": found["log_loss"], "skipped_share": share}


def state_of(model: DistributedModelParallel, optimizer: KeyedOptimizer) -> dict[str, Tensor]:
    """This rank's part of the weights, dense ones included, and of the optimizers' state, by name and place."""
    state: dict[str, Tensor] = {}
    entries = list(model.state_dict().items())
    for key, values in optimizer.state_dict()["state"].items():
        entries += [(f"{key}/{name}", value) for name, value in values.items()]
    for name, value in entries:
        if isinstance(value, Tensor) and not hasattr(value, "local_shards"):
            state[name] = value
        for shard in value.local_shards() if hasattr(value, "local_shards") else ():
            state[f"{name}@{shard.metadata.shard_offsets}"] = shard.tensor
    return state


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both have the same entries with equal bits. False of nothing at all."""
    return bool(one) and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def train(rank: int, ranks: int, folder: str, args: argparse.Namespace) -> None:
    """One rank's process; rank 0 leaves the results in ``folder``."""
    torch.set_num_threads(1)
    quiet()
    device = _device(args.device, rank)
    if args.device == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    harness.keep_freed_memory()
    made = replace(CONFIGURATIONS[args.configuration].hashed(args.max_rows), batch=args.batch)
    steps = args.warmup + args.rounds
    # Every rank makes all batches and takes its own; the last are for the test.
    batches, _ = make_batches(made, (steps + args.test) * ranks, 1, seed=args.seed)
    mine = batches[rank::ranks]
    results = {sharding: _compare(sharding, mine[:steps], mine[steps:], args) for sharding in args.shardings}
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def _compare(sharding: str, batches: list[Batch], test: list[Batch], args: argparse.Namespace) -> dict[str, Any]:
    trainees = {name: Trainee(share, batches, sharding, args) for name, share in PROVIDERS.items()}
    device = trainees["torchrec_fused"].device

    def together(name: str, turn: int) -> None:
        dist.barrier()

    steps: dict[str, Callable[[int], None]] = {name: one.step for name, one in trainees.items()}
    timings = interleaved(steps, args.rounds, args.warmup, device=args.device, before=together)
    slowest = torch.tensor([timing.samples for timing in timings.values()], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    stock, counting, _ = (state_of(one.model, one.optimizer) for one in trainees.values())
    exact = torch.tensor(int(same_state(stock, counting)), device=device)
    dist.all_reduce(exact, dist.ReduceOp.MIN)
    return {
        "exact": bool(exact),
        "seconds": dict(zip(timings, slowest.tolist(), strict=True)),
        "quality": {name: one.quality(test) for name, one in trainees.items()},
    }


def _device(name: str, rank: int) -> torch.device:
    return torch.device("cpu") if name == "cpu" else torch.device("cuda", rank % torch.cuda.device_count())


def run(ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """By sharding, what so many ranks found.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank failed; its traceback is in the message.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # of the ranks, which inherit them
    try:
        with tempfile.TemporaryDirectory(prefix="slipstream-") as folder:
            spawn(train, (ranks, folder, args), nprocs=ranks)
            return dict(json.loads((Path(folder) / "results.json").read_text()))
    finally:
        del os.environ["TQDM_DISABLE"]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("ranks", "Samples a second of stock TorchRec and of a session, over ranks.")
    with_names = [name for name, one in CONFIGURATIONS.items() if len(one.table_rows) == 26]  # as examples.model has
    parser.add_argument("--configuration", choices=with_names, default="kaggle")
    parser.add_argument("--max-rows", type=int, default=200_000, help="of a table; larger ones are hashed")
    parser.add_argument("--batch", type=int, default=1024, help="samples a rank")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="1 is always run, to compare with")
    parser.add_argument("--shardings", nargs="+", choices=SHARDINGS, default=list(SHARDINGS))
    parser.add_argument("--rounds", type=int, default=60, help="measured steps")
    parser.add_argument(
        "--warmup", type=int, default=2 * _INTERVAL + 2, help="steps before them; 20 before any decision"
    )
    parser.add_argument("--test", type=int, default=8, help="batches a rank for the test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    args.ranks = sorted({1, *args.ranks})
    if args.ranks[0] < 1:
        parser.error(f"--ranks {args.ranks[0]}: give 1 or more")
    if args.device == "cuda" and args.ranks[-1] > torch.cuda.device_count():
        parser.error(
            f"--ranks {args.ranks[-1]}: torch sees {torch.cuda.device_count()} CUDA devices, and each rank needs one; "
            "give fewer ranks, or --device cpu"
        )
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record and print; the result that is printed."""
    args = parse_arguments(argv)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    result: dict[str, Any] = {sharding: {} for sharding in args.shardings}
    result |= {"cores": cores, "enough_cores": {str(ranks): ranks <= cores for ranks in args.ranks}}
    shared = {key: getattr(args, key) for key in ("configuration", "max_rows", "batch", "warmup", "rounds", "seed")}
    records: list[Row] = []
    for ranks in args.ranks:
        for sharding, found in run(ranks, args).items():
            of_sharding = result[sharding]
            of_sharding.setdefault("exact", {})[str(ranks)] = found["exact"]
            for name, seconds in found["seconds"].items():
                timing = Timing(tuple(1e3 * one for one in seconds))
                speed = 1e3 * ranks * args.batch / timing.p50
                alone = of_sharding.get(name, {}).get("1", {}).get("samples_per_second", speed)
                one = {"ms": timing.p50, "samples_per_second": speed, "scaling": speed / (ranks * alone)}
                one |= found["quality"][name]
                of_sharding.setdefault(name, {})[str(ranks)] = one
                quality = {key: value for key, value in one.items() if key != "ms"}
                quality |= {"exact": found["exact"], "cores": cores, "enough_cores": ranks <= cores}
                parameters = shared | {"ranks": ranks, "sharding": sharding}
                records.append(Row("ranks", name, parameters, timing, "ms", quality, args.device))
    print(show(result, args))
    return harness.finish(args, result, records)


def show(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The result for people."""
    titles = f"{'ms':>8}{'samples/s':>11}{'scaling':>9}{'log-loss':>10}{'AUC':>8}{'left out':>10}"
    lines = [f"{'':<12}{'ranks':>6} {'':<16}{titles}"]
    for sharding in args.shardings:
        for ranks in map(str, args.ranks):
            for name in PROVIDERS:
                one = result[sharding][name][ranks]
                lines.append(
                    f"{sharding:<12}{ranks:>6} {name:<16}{one['ms']:>8.2f}{one['samples_per_second']:>11,.0f}"
                    f"{one['scaling']:>9.2f}{one['log_loss']:>10.4f}{one['auc']:>8.4f}{one['skipped_share']:>10.1%}"
                )
    exact = all(all(result[sharding]["exact"].values()) for sharding in args.shardings)
    lines.append(f"a session that only counts ends with stock's bits: {'yes' if exact else 'NO'}")
    if not all(result["enough_cores"].values()):
        lines.append(
            f"only {result['cores']} cores for {args.ranks[-1]} ranks: scaling is not that of separate machines"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
