"""Which tables the features of a batch look up in: from a model, on every rank the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.distributed.mc_modules import ShardedManagedCollisionCollection
from torchrec.distributed.types import ShardingType
from torchrec.modules.mc_modules import ManagedCollisionCollection

from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.tbe.finding import modules_of, shards_of_bare
from torchrec_slipstream.tbe.versions import lacking_message


@dataclass(frozen=True)
class ModelTable:
    """One logical table.

    Attributes:
        fqn: the table as a plan calls it: the path of its collection in the model, and its name.
        name: without the path.
        features: keys of a ``KeyedJaggedTensor`` whose look-ups are of this table.
        rows, dim: of the whole table.
        replicated: every rank has all rows of it (data parallel, or not sharded at all).
    """

    fqn: str
    name: str
    features: tuple[str, ...]
    rows: int
    dim: int
    replicated: bool = False


def model_tables(model: nn.Module) -> tuple[ModelTable, ...]:
    """All tables below ``model``, in the order of the model, whichever rank holds them.

    ``model`` is a DistributedModelParallel, or any module tree with collections or bare TBEs (whose tables are taken
    for whole). A bare TBE has no names for its features; they are called as their table's ``fqn`` is, with ``:0``,
    ``:1`` ... behind where a table has several.

    Raises:
        AttachError: no table at all; a managed-collision module, which looks up other rows than the batch names; or a
            version of TorchRec whose sharded collections do not say what they were made of.
    """
    tables: list[ModelTable] = []
    owned: set[int] = set()
    root = model.module if isinstance(model, DistributedModelParallel) else model
    for path, module in modules_of(root):
        if isinstance(module, (ShardedManagedCollisionCollection, ManagedCollisionCollection)):
            raise AttachError(
                f"{path or type(module).__name__}: a managed-collision module gives ids other rows than the batch "
                "names, so samples cannot be told by their rows; remap the ids before, or choose samples otherwise"
            )
        if isinstance(module, BaseEmbedding):
            owned.add(id(getattr(module, "emb_module", None)))
        if (plan := getattr(module, "module_sharding_plan", None)) is not None:
            replicated = {name for name, one in plan.items() if one.sharding_type == ShardingType.DATA_PARALLEL.value}
            tables += _of_configs(path, _configs_of_sharded(module, path), replicated)
        elif isinstance(module, EmbeddingBagCollection):
            configs = {one.name: one for one in module.embedding_bag_configs()}
            tables += _of_configs(path, configs, set(configs))
        elif isinstance(module, EmbeddingCollection):
            sequences = {one.name: one for one in module.embedding_configs()}
            tables += _of_configs(path, sequences, set(sequences))
        elif isinstance(module, SplitTableBatchedEmbeddingBagsCodegen) and id(module) not in owned:
            tables += _of_bare(module, path)
    if not tables:
        raise AttachError(f"{type(model).__name__} has no embedding collection and no TBE, so samples look up no rows")
    return tuple(tables)


def _configs_of_sharded(module: nn.Module, path: str) -> Mapping[str, Any]:
    """The ``EmbeddingBagConfig`` or ``EmbeddingConfig`` of each table of a sharded collection, all ranks' alike."""
    for public in ("embedding_bag_configs", "embedding_configs"):
        if callable(configs := getattr(module, public, None)):
            return {one.name: one for one in configs()}
    private: Mapping[str, Any] | None = getattr(module, "_table_name_to_config", None)
    if private is None:
        raise AttachError(
            f"{path}: cannot attach: " + lacking_message([f"{type(module).__name__}._table_name_to_config"])
        )
    return private


def _of_configs(path: str, configs: Mapping[str, Any], replicated: set[str]) -> list[ModelTable]:
    return [
        ModelTable(
            fqn=f"{path}.{name}" if path else name,
            name=name,
            features=tuple(config.feature_names),
            rows=config.num_embeddings,
            dim=config.embedding_dim,
            replicated=name in replicated,
        )
        for name, config in configs.items()
    ]


def _of_bare(tbe: SplitTableBatchedEmbeddingBagsCodegen, path: str) -> list[ModelTable]:
    tables = []
    feature_table = list(tbe.feature_table_map)
    for place, shard in enumerate(shards_of_bare(tbe, path)):
        number = feature_table.count(place)
        features = (shard.fqn,) if number == 1 else tuple(f"{shard.fqn}:{i}" for i in range(number))
        tables.append(ModelTable(shard.fqn, shard.table, features, shard.rows, shard.dim))
    return tables
