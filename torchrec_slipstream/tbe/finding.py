"""Find the TBEs of a model, and say of which the updates can be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    DenseTableBatchedEmbeddingBagsCodegen,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.optim.fused import FusedOptimizerModule
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.tbe.versions import (
    check_collection,
    check_kernel,
    check_parallel,
    check_specs,
    check_tbe,
)

TBE: TypeAlias = SplitTableBatchedEmbeddingBagsCodegen

_WHY_REFUSED = {
    EmbOptimType.NONE: "it returns gradients instead of updating rows, so there is no update to leave out",
    EmbOptimType.ENSEMBLE_ROWWISE_ADAGRAD: "it swaps weights with its running average, which is no movement",
    EmbOptimType.EMAINPLACE_ROWWISE_ADAGRAD: "it moves rows towards their average outside of the update",
}


# After what was found wrong, where it helps.
_SHARD_FUSED = "Shard such tables with a fused compute kernel, or leave them alone with exclude_tables=(...)."
_LEAVE_ALONE = "Leave such tables alone with exclude_tables=(...)."


class Attached:
    """Marks the class of a TBE that a session is attached to."""


ATTACHED_ALREADY = (
    "a Slipstream session is attached already; detach() it first, or call torchrec_slipstream.detach(model) if nobody "
    "has the session any more"
)


@dataclass(frozen=True)
class TableShard:
    """One table's part in one TBE on this rank.

    ``rows`` and ``dim`` are local; ``row_offset`` and ``col_offset`` place the shard in the logical table of
    ``table_rows`` x ``table_dim``. Its rows are ``[row_begin, row_begin + rows)`` of the filter's row space; all are
    ``row_begin`` where they are not ``counted`` one by one.
    """

    table: str
    collection: str
    rows: int
    dim: int
    row_begin: int
    row_offset: int = 0
    col_offset: int = 0
    table_rows: int = 0
    table_dim: int = 0
    counted: bool = True

    @property
    def slots(self) -> slice:
        """Its part of the filter's row space: a slot a row, or one for all."""
        return slice(self.row_begin, self.row_begin + (self.rows if self.counted else 1))

    @property
    def fqn(self) -> str:
        """The table as a plan calls it: the path of its collection in the model, and its name."""
        return f"{self.collection}.{self.table}" if self.collection else self.table

    @property
    def key(self) -> str:
        """Name that is unique in the whole model and the same in every run with the same sharding."""
        return f"{self.collection}.{self.table}@{self.row_offset}:{self.col_offset}"


@dataclass(frozen=True)
class FoundTbe:
    """A TBE of the model with the shards that it holds, in its own order of tables.

    ``owner`` is the sharded collection that it is part of and ``optimizer`` its fused optimizer; None of a TBE that
    TorchRec did not build.
    """

    tbe: TBE
    shards: tuple[TableShard, ...]
    owner: nn.Module | None = None
    optimizer: KeyedOptimizer | None = None

    def counting(self, wanted: Callable[[TableShard], bool]) -> FoundTbe:
        """The same with slots only for the rows of shards that are ``wanted``; the others have one slot each."""
        shards, begin = [], 0
        for shard in self.shards:
            shards.append(replace(shard, row_begin=begin, counted=wanted(shard)))
            begin = shards[-1].slots.stop
        return replace(self, shards=tuple(shards))


def find_tbes(
    model: nn.Module,
    exclude_tables: frozenset[str] = frozenset(),
    *,
    sketch_tables: frozenset[str] = frozenset(),
    skips: bool = True,
) -> list[FoundTbe]:
    """All TBEs below ``model`` whose updates can be filtered, in a stable order. Changes nothing.

    ``model`` is a DistributedModelParallel or any module tree that contains TBEs. A rank to which a sharded model gave
    no table has none, which is no error: it still takes part in decisions. TBEs of which every table is in
    ``exclude_tables`` are left out. Without ``skips`` no update will be, and no TBE is refused for what the update
    filter alone cannot follow.

    Raises:
        AttachError: no module, or one without any TBE; a table without a fused update (data parallel, dense,
            key-value); an optimizer for which a skipped update would be wrong; a TBE that is attached already; a name
            in ``exclude_tables`` or ``sketch_tables`` that is not in the model; a version of FBGEMM or TorchRec that
            lacks something this room relies on (``versions.py``).
    """
    found: list[FoundTbe] = []
    problems: list[str] = []
    remedies: list[str] = []
    names: set[str] = set()
    owned: set[int] = set()
    collections: dict[str, nn.Module] = {}
    root = model.module if isinstance(model, DistributedModelParallel) else model
    for path, module in modules_of(root):
        owner, optimizer = None, None
        # A sharded collection's plan names its tables on all ranks; the look-ups here hold this rank's only.
        if (plan := getattr(module, "module_sharding_plan", None)) is not None:
            names |= set(plan)
            collections[path] = module
        if isinstance(module, BaseEmbedding):
            check_kernel(module)
        if isinstance(module, BaseEmbedding) and hasattr(module, "emb_module"):
            tbe, shards = module.emb_module, _kernel_shards(module, path)
            owned.add(id(tbe))
            owner = collections.get(_collection_of(path))
            check_collection(path, owner is not None)
            optimizer = module.fused_optimizer if isinstance(module, FusedOptimizerModule) else None
        elif (
            isinstance(module, (SplitTableBatchedEmbeddingBagsCodegen, DenseTableBatchedEmbeddingBagsCodegen))
            and id(module) not in owned
        ):
            tbe, shards = module, shards_of_bare(module, path)
        else:
            continue
        tables = {shard.table for shard in shards}
        names |= tables
        if tables <= exclude_tables:
            continue
        if (refused := _why_not(tbe, skips=skips)) is not None:
            why, remedy = refused
            problems.append(f"table(s) {', '.join(sorted(tables))}: {why}")
            remedies += [remedy] if remedy and remedy not in remedies else []
        else:
            found.append(FoundTbe(tbe, shards, owner, optimizer))
    for option, given in (("exclude_tables", exclude_tables), ("sketch_tables", sketch_tables)):
        if unknown := given - names:
            problems.append(f"{option} names {sorted(unknown)}, which the model does not have; it has {sorted(names)}")
    if problems:
        if _SHARD_FUSED in remedies:
            remedies = [_SHARD_FUSED]  # which has the other in it
        raise AttachError("\n".join(["cannot attach to this model:", *(f"  {one}" for one in problems), *remedies]))
    if not found and not names:
        raise AttachError(
            f"{type(model).__name__} contains no table-batched embedding. Shard its embedding collections first "
            "(DistributedModelParallel with a fused compute kernel), then attach."
        )
    if len({shard.key for one in found for shard in one.shards}) < sum(len(one.shards) for one in found):
        raise AttachError("two TBEs hold the same shard of one table; give the tables different names")
    return found


def process_group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that share a model: the group that a DistributedModelParallel was given, else the default group; None
    where ``torch.distributed`` is not initialized, and this process is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    check_parallel(model)
    environment: Any = getattr(model, "_env", None)
    return environment.process_group if environment is not None else dist.group.WORLD


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` which also looks into plain lists: sharded modules keep their look-ups in one.

    Raises:
        AttachError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    return _walk(model, "", set())


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    hidden = [
        (name, child)
        for name, value in vars(module).items()
        if isinstance(value, (list, tuple))
        for child in value
        if isinstance(child, nn.Module)
    ]
    for name, child in [*module.named_children(), *hidden]:
        yield from _walk(child, f"{path}.{name}" if path else name, seen)


def _collection_of(path: str) -> str:
    """Of the path of a kernel, that of the sharded collection it is part of."""
    return path.split("._lookups")[0].split("._emb_modules")[0]


def _kernel_shards(kernel: BaseEmbedding, path: str) -> tuple[TableShard, ...]:
    """Shards of a TorchRec kernel (``BatchedFusedEmbeddingBag`` and its kin), from its sharding metadata."""
    shards, begin = [], 0
    for table in kernel.config.embedding_tables:
        at = table.local_metadata.shard_offsets if table.local_metadata is not None else []
        shards.append(
            TableShard(
                table=table.name,
                collection=_collection_of(path),
                rows=table.local_rows,
                dim=table.local_cols,
                row_begin=begin,
                row_offset=at[0] if len(at) > 0 else 0,
                col_offset=at[1] if len(at) > 1 else 0,
                table_rows=table.num_embeddings,
                table_dim=table.embedding_dim,
            )
        )
        begin += table.local_rows
    return tuple(shards)


def shards_of_bare(tbe: nn.Module, path: str) -> tuple[TableShard, ...]:
    """Shards of a TBE that somebody built by hand: its tables are whole."""
    check_specs(tbe)
    embedding_specs: Any = tbe.embedding_specs
    specs = [(spec[0], spec[1]) for spec in embedding_specs]
    names = getattr(tbe, "table_names", None) or [f"table_{i}" for i in range(len(specs))]
    shards, begin = [], 0
    for name, (rows, dim) in zip(names, specs, strict=True):
        shards.append(TableShard(name, path, rows, dim, begin, table_rows=rows, table_dim=dim))
        begin += rows
    return tuple(shards)


def _why_not(tbe: nn.Module, *, skips: bool) -> tuple[str, str] | None:
    """Why this TBE's updates cannot be filtered, and what helps if that does not say so ("" if it does); None if they
    can. AttachError: its version lacks something."""
    if isinstance(tbe, Attached):
        return ATTACHED_ALREADY, ""
    if isinstance(tbe, DenseTableBatchedEmbeddingBagsCodegen):
        return "it is dense or data parallel, its update is not fused into FBGEMM's backward", _SHARD_FUSED
    if not isinstance(tbe, SplitTableBatchedEmbeddingBagsCodegen):
        return f"{type(tbe).__name__} is not FBGEMM's SplitTableBatchedEmbeddingBagsCodegen", _SHARD_FUSED
    check_tbe(tbe)
    if (why := _WHY_REFUSED.get(tbe.optimizer)) is not None:
        return f"optimizer {tbe.optimizer} cannot be filtered: {why}", _LEAVE_ALONE
    # FBGEMM's hook before the backward overwrites lxu_cache_locations with those of the batch's *distinct* rows, sorted
    # (_update_cache_counter_and_locations), and the kernels take them by the run of a row (use_uniq_cache_locations in
    # embedding_backward_split_template.cu). Cut down look-up by look-up they would name other rows' cache slots.
    if skips and tbe.use_uniq_cache_locations_bwd and int(tbe.total_cache_hash_size) > 0:
        return (
            "prefetch_pipeline=True on a UVM-cached table orders cache locations in a way the filter cannot follow; "
            "counting and hot rows work with StalenessConfig(target_share=0)",
            _LEAVE_ALONE,
        )
    # Both keep a count of every row's updates and decay rows by it: a popular row left out would look rare.
    if tbe._used_rowwise_adagrad_with_counter:
        return (
            "counter-based regularisation counts updates a row; left-out ones would make a row look rare",
            _LEAVE_ALONE,
        )
    if tbe._used_rowwise_adagrad_with_global_weight_decay:
        return "global weight decay moves rows that are not updated, so a stale row would still move", _LEAVE_ALONE
    return None
