"""TorchRec's DLRM, sharded, with its optimizers: stock TorchRec from end to end."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from examples.samples import DENSE_NAMES, SPARSE_NAMES
from examples.tiers import Tiers
from torchrec_slipstream import Placement

SHARDINGS = {
    "auto": [ShardingType.TABLE_WISE, ShardingType.ROW_WISE, ShardingType.COLUMN_WISE],
    "table_wise": [ShardingType.TABLE_WISE],
    "row_wise": [ShardingType.ROW_WISE],
    "column_wise": [ShardingType.COLUMN_WISE],
}


class WeightedDLRMTrain(DLRMTrain):
    """TorchRec's DLRMTrain, whose loss weighs each sample as its batch says: a plain ``Batch`` has no ``weights``, and
    then this is DLRMTrain."""

    def forward(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        logits = self.model(batch.dense_features, batch.sparse_features).squeeze(-1)
        weights = getattr(batch, "weights", None)
        loss = F.binary_cross_entropy_with_logits(logits, batch.labels.float(), weight=weights)
        return loss, (loss.detach(), logits.detach(), batch.labels.detach())


class _Sharder(EmbeddingBagCollectionSharder):
    """Stock, but offers row-wise sharding on a CPU too: TorchRec leaves it out there from the days when gloo had no
    reduce-scatter, which it now has."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        kinds: list[str] = super().sharding_types(compute_device_type)
        row_wise = ShardingType.ROW_WISE.value
        return kinds if row_wise in kinds else [*kinds, row_wise]


def table_name(feature: str) -> str:
    """The table of a feature; one each."""
    return f"t_{feature}"


def table_configs(table_rows: tuple[int, ...], embedding_dim: int) -> list[EmbeddingBagConfig]:
    """The tables of C1 .. C26, one a feature."""
    return [
        EmbeddingBagConfig(
            name=table_name(feature), embedding_dim=embedding_dim, num_embeddings=rows, feature_names=[feature]
        )
        for feature, rows in zip(SPARSE_NAMES, table_rows, strict=True)
    ]


def build_model(
    table_rows: tuple[int, ...],
    *,
    embedding_dim: int,
    dense_sizes: list[int],
    over_sizes: list[int],
    learning_rate: float,
    dense_learning_rate: float,
    batch_size: int,
    sharding: str,
    seed: int,
    device: torch.device,
    tiers: Tiers | None = None,
) -> tuple[DistributedModelParallel, KeyedOptimizer, Placement | None]:
    """DLRM under DistributedModelParallel, and the optimizer to step.

    Needs a default process group; collective over it. The tables use row-wise Adagrad fused into the backward, the
    dense part Adagrad; the optimizer returned holds both, and stepping it steps the dense part.

    Args:
        table_rows: rows of the tables of C1 .. C26.
        embedding_dim: columns of every table, and width of the dense arch's last layer, which is added to dense_sizes.
        dense_sizes, over_sizes: hidden layer widths; over_sizes without the last layer of 1, which is added.
        batch_size: samples a step and rank, for the planner.
        sharding: a key of SHARDINGS.
        seed: of all weights; dense ones are the same on every rank.
        tiers: plan hot rows as well; the third of what is returned then says which. None: stock tables.
    """
    torch.manual_seed(seed)
    tables = table_configs(table_rows, embedding_dim)
    # On the meta device, so that a table is made only once, sharded, where the plan puts it.
    dlrm = DLRM(
        EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        dense_in_features=len(DENSE_NAMES),
        dense_arch_layer_sizes=[*dense_sizes, embedding_dim],
        over_arch_layer_sizes=[*over_sizes, 1],
        dense_device=device,
    )
    model: nn.Module = WeightedDLRMTrain(dlrm)
    # Gives the tables to FBGEMM's fused optimizer instead of an optimizer step over dense gradients.
    apply_optimizer_in_backward(RowWiseAdagrad, dlrm.sparse_arch.parameters(), {"lr": learning_rate, "eps": 1e-8})

    world_size = dist.get_world_size()
    sharders = [_Sharder()]
    sharding_types = [kind.value for kind in SHARDINGS[sharding]]
    placement = None
    if tiers is not None:
        plan, placement = tiers.plan(
            model,
            sharders,
            batch_size=batch_size,
            sharding_types=sharding_types,
            device=device,
            local_size=_local_size(world_size),
        )
    else:
        plan = _stock_plan(model, sharders, tables, sharding_types, batch_size, device)
    # Ranks own different rows: were they seeded alike, the shards would start as copies of each other.
    torch.manual_seed(seed * 1_000_003 + dist.get_rank())
    sharded = DistributedModelParallel(module=model, device=device, plan=plan, sharders=sharders)

    dense = KeyedOptimizerWrapper(
        dict(in_backward_optimizer_filter(sharded.named_parameters())),
        lambda parameters: torch.optim.Adagrad(parameters, lr=dense_learning_rate, eps=1e-8),
    )
    return sharded, CombinedOptimizer([sharded.fused_optimizer, dense]), placement


def _stock_plan(
    model: nn.Module,
    sharders: list[ModuleSharder[nn.Module]],
    tables: list[EmbeddingBagConfig],
    sharding_types: list[str],
    batch_size: int,
    device: torch.device,
) -> ShardingPlan:
    world_size = dist.get_world_size()
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=world_size, compute_device=device.type, local_world_size=_local_size(world_size)),
        batch_size=batch_size,
        constraints={
            # Fused kernels only: a data-parallel table has no fused update, so none that could be skipped.
            table.name: ParameterConstraints(
                sharding_types=sharding_types,
                compute_kernels=[EmbeddingComputeKernel.FUSED.value],
            )
            for table in tables
        },
        debug=False,
    )
    return planner.collective_plan(model, sharders, dist.GroupMember.WORLD)


def describe_plan(model: DistributedModelParallel) -> dict[str, dict[str, object]]:
    """Where each table went: its sharding type, compute kernel and ranks."""
    return {
        table: {"sharding": spec.sharding_type, "kernel": spec.compute_kernel, "ranks": spec.ranks}
        for module_plan in model.plan.plan.values()
        for table, spec in module_plan.items()
    }


def _local_size(world_size: int) -> int:
    """Ranks on this machine, as torchrun says; all of them without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
