"""TorchRec's golden DLRM training, and what Slipstream costs in it: the five lines that end in a numbered comment.

    python examples/golden_dlrm.py                                            # one process, CPU or GPU
    torchrun --nproc-per-node 2 examples/golden_dlrm.py --slipstream          # gloo on CPUs, nccl on GPUs

Without those lines it is stock TorchRec: DLRM on random clicks, its tables on the meta device until they are sharded,
row-wise Adagrad fused into the backward, a plan, DistributedModelParallel and TrainPipelineSparseDist. On a busy CPU
set OMP_NUM_THREADS=1, as torchrun does.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.datasets.criteo import DEFAULT_CAT_NAMES, DEFAULT_INT_NAMES
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel, TrainPipelineSparseDist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from torchrec_slipstream import AccessProfile, Slipstream, SlipstreamPlanner  # +1


class RandomClicks:
    """Random batches in Criteo's shape, the same on every pass. Few rows take most look-ups, as in real traffic: with
    uniform ids all rows would be alike. The label depends on the dense features and on the first id."""

    def __init__(self, batches: int, batch_size: int, rows: int, skew: float, seed: int) -> None:
        self.batches, self.batch_size, self.rows, self.skew, self.seed = batches, batch_size, rows, skew, seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        features = len(DEFAULT_CAT_NAMES)
        for _ in range(self.batches):
            dense = torch.rand(self.batch_size, len(DEFAULT_INT_NAMES), generator=generator)
            rank = self.rows * torch.rand(features, self.batch_size, generator=generator) ** self.skew
            ids = rank.long() * 7919 % self.rows  # the popular rows lie all over the table
            logits = 6 * dense.mean(dim=1) - 3 + 2 * (ids[0] % 2) - 1
            yield Batch(
                dense_features=dense,
                sparse_features=KeyedJaggedTensor(
                    keys=DEFAULT_CAT_NAMES,
                    values=ids.flatten(),
                    lengths=torch.ones(ids.numel(), dtype=torch.int32),
                ),
                labels=torch.bernoulli(logits.sigmoid(), generator=generator),
            )


@record
def train(args: argparse.Namespace, device: torch.device) -> None:
    """Plan, shard and train. Every rank runs this; rank 0 prints."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda *_: None
    torch.manual_seed(rank)  # rows differ between ranks; the dense part is rank 0's on all of them
    data = RandomClicks(args.steps, args.batch_size, args.rows, args.skew, seed=rank)

    # On the meta device, so that a table is made only once, sharded, where the plan puts it.
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=args.dim, num_embeddings=args.rows, feature_names=[name])
        for name in DEFAULT_CAT_NAMES
    ]
    dlrm = DLRM(
        embedding_bag_collection=EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        dense_in_features=len(DEFAULT_INT_NAMES),
        dense_arch_layer_sizes=[64, args.dim],
        over_arch_layer_sizes=[64, 1],
        dense_device=device,
    )
    model = DLRMTrain(dlrm)
    apply_optimizer_in_backward(RowWiseAdagrad, dlrm.sparse_arch.parameters(), {"lr": args.learning_rate})

    # Half the bytes between GPUs; gloo lacks these types.
    half = QCommsConfig(forward_precision=CommType.FP16, backward_precision=CommType.BF16)
    codecs = get_qcomm_codecs_registry(half) if device.type == "cuda" else None
    sharders = [EmbeddingBagCollectionSharder(qcomm_codecs_registry=codecs)]
    # Any sharding but data parallel, which has no fused optimizer.
    kinds = ["table_wise", "row_wise", "column_wise", "table_row_wise"]
    constraints = {table.name: ParameterConstraints(sharding_types=kinds) for table in tables}
    how = {"batch_size": args.batch_size, "constraints": constraints}
    planner = EmbeddingShardingPlanner(**how)
    planner = SlipstreamPlanner(profile=AccessProfile.measure(data, model), **how) if args.slip else planner  # +2
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)

    model = DistributedModelParallel(model, device=device, plan=plan, sharders=sharders)
    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(model.named_parameters())),
        lambda parameters: torch.optim.Adagrad(parameters, lr=args.learning_rate),
    )
    pipeline = TrainPipelineSparseDist(model, dense, device)
    slip = Slipstream(model) if args.slip else None  # +3

    batches, losses, warm = iter(data), [], args.steps // 10
    for step in range(args.steps):
        if step == warm:
            began = time.perf_counter()
        loss, _, _ = pipeline.progress(batches)
        slip.step() if slip else None  # +4
        losses.append(loss.detach())
    final = float(torch.stack(losses[-max(1, warm) :]).mean())  # waits for the device
    speed = (args.steps - warm) * args.batch_size * world_size / (time.perf_counter() - began)
    say(slip.report() if slip else "stock TorchRec")  # +5
    say(f"{world_size} rank(s) on {device.type}: {speed:,.0f} samples/s, final loss {final:.4f}")


def main(argv: list[str] | None = None) -> None:
    """One process by itself, or one of torchrun's ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each of the 26 tables (default: 100,000)")
    parser.add_argument("--dim", type=int, default=64, help="embedding dimension (default: 64)")
    parser.add_argument("--skew", type=float, default=8.0, help="of the ids; 1 is uniform (default: 8)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples a step and rank (default: 256)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of all optimizers (default: 0.1)")
    parser.add_argument("--slipstream", dest="slip", action="store_true", help="plan rows, and skip stale updates")
    args = parser.parse_args(argv)

    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "nccl"
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    try:
        train(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
