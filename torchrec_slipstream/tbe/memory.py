"""What FBGEMM allocates for a table, a row: the bytes that a plan has to count.

Read from FBGEMM's ``construct_split_state`` and ``_apply_cache_state`` (the same from 1.6 to 1.8). TorchRec's own
storage estimate leaves three of them out, and runs out of memory where tables are large: row-wise optimizer state is in
HBM for *every* row of a UVM table (4 bytes a row); so is the cache's map from rows to tables (another 4); an optimizer
that is set through ``fused_params`` is not counted at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import optim
from torchrec.distributed.types import CacheAlgorithm, CacheParams
from torchrec.modules.embedding_configs import DataType, data_type_to_sparse_type

# Bytes a slot of FBGEMM's cache needs besides the row: which row it holds (int64).
CACHE_TAG_BYTES = 8
# Bytes a row of a cached table needs in HBM whether it is in the cache or not: cache_index_table_map (int32).
CACHE_MAP_BYTES = 4
# FBGEMM keeps optimizer state in this many bytes a value.
_STATE_BYTES = 4


@dataclass(frozen=True)
class OptimizerState:
    """State that a fused optimizer keeps a row: values a row, and values a dimension of the row."""

    name: str
    a_row: int
    a_dim: int

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row's state."""
        return _STATE_BYTES * (self.a_row + self.a_dim * dim)

    @property
    def rowwise_bytes(self) -> int:
        """Bytes of the part that FBGEMM keeps in HBM for every row of a UVM table."""
        return _STATE_BYTES * self.a_row


_STATES: dict[EmbOptimType, tuple[int, int]] = {
    EmbOptimType.EXACT_SGD: (0, 0),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (1, 0),
    EmbOptimType.EXACT_ADAGRAD: (0, 1),
    EmbOptimType.ADAM: (0, 2),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: (1, 1),
    EmbOptimType.LAMB: (0, 2),
    EmbOptimType.PARTIAL_ROWWISE_LAMB: (1, 1),
    EmbOptimType.LARS_SGD: (0, 1),
}
_BY_NAME = {
    "sgd": EmbOptimType.EXACT_SGD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "lamb": EmbOptimType.LAMB,
    "partial_rowwise_lamb": EmbOptimType.PARTIAL_ROWWISE_LAMB,
    "lars_sgd": EmbOptimType.LARS_SGD,
}
OPTIMIZERS = tuple(_BY_NAME)
_BY_CLASS: dict[type, EmbOptimType] = {
    torch.optim.SGD: EmbOptimType.EXACT_SGD,
    optim.SGD: EmbOptimType.EXACT_SGD,
    torch.optim.Adagrad: EmbOptimType.EXACT_ADAGRAD,
    optim.Adagrad: EmbOptimType.EXACT_ADAGRAD,
    optim.RowWiseAdagrad: EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    torch.optim.Adam: EmbOptimType.ADAM,
    optim.Adam: EmbOptimType.ADAM,
    optim.PartialRowWiseAdam: EmbOptimType.PARTIAL_ROWWISE_ADAM,
    optim.LAMB: EmbOptimType.LAMB,
    optim.PartialRowWiseLAMB: EmbOptimType.PARTIAL_ROWWISE_LAMB,
    optim.LarsSGD: EmbOptimType.LARS_SGD,
}


def optimizer_state(optimizer: str | EmbOptimType) -> OptimizerState:
    """The state of an optimizer by its name (one of ``OPTIMIZERS``) or FBGEMM type.

    Raises:
        ValueError: it is neither.
    """
    kind = optimizer if isinstance(optimizer, EmbOptimType) else _BY_NAME.get(optimizer)
    if kind is None or kind not in _STATES:
        raise ValueError(f"optimizer {optimizer!r} is not known; give one of {', '.join(OPTIMIZERS)}")
    return OptimizerState(kind.name.lower(), *_STATES[kind])


def optimizer_of(module: nn.Module, weights: Tensor, fused_params: Mapping[str, Any]) -> OptimizerState:
    """The optimizer that TorchRec will fuse into a table's backward.

    The one of ``apply_optimizer_in_backward``, else that of a fused collection, else ``fused_params["optimizer"]``,
    else FBGEMM's own default, SGD. One that we do not know is taken for Adam, which keeps the most.
    """
    classes = getattr(weights, "_optimizer_classes", None)
    if not classes and callable(fused := getattr(module, "optimizer_type", None)):
        classes = [fused()]
    if classes:
        kind = _BY_CLASS.get(classes[0], EmbOptimType.ADAM)
    else:
        kind = fused_params.get("optimizer", EmbOptimType.EXACT_SGD)
    return optimizer_state(kind if kind in _STATES else EmbOptimType.ADAM)


def cache_of(params: CacheParams, fused_params: Mapping[str, Any]) -> Cache:
    """What a table's cache will be: the parameters of its own before those of its sharder, as TorchRec has it."""
    algorithm = params.algorithm if params.algorithm is not None else fused_params.get("cache_algorithm")
    precision = params.precision if params.precision is not None else fused_params.get("cache_precision")
    prefetch = (
        params.prefetch_pipeline if params.prefetch_pipeline is not None else fused_params.get("prefetch_pipeline")
    )
    if isinstance(precision, DataType):
        precision = data_type_to_sparse_type(precision)
    return Cache(
        element_size=max(1, precision.bit_rate() // 8) if precision is not None else None,
        lfu=algorithm == CacheAlgorithm.LFU,
        prefetch=bool(prefetch),
    )


# Bytes a row that an attached session keeps on the table's device: its step pattern (uint8) and its touches (int32).
SESSION_BYTES = 5
# Bytes a row of a table with an overlay: the word that says which slot holds it (int32).
SLOT_WORD_BYTES = 4
# FBGEMM's cache has sets of this many slots, and takes whole sets.
CACHE_SET_SLOTS = 32


@dataclass(frozen=True)
class Cache:
    """What FBGEMM's cache of a table is asked to be.

    Attributes:
        element_size: bytes of a weight in the cache; None: as in the table.
        lfu: it counts accesses (8 bytes for every row of the table) instead of keeping times (8 bytes a slot).
        prefetch: rows are fetched ahead, and locked until they are used (4 bytes a slot).
    """

    element_size: int | None = None
    lfu: bool = False
    prefetch: bool = False


@dataclass(frozen=True)
class RowBytes:
    """Bytes that one row of a shard takes, by where the table lives.

    Attributes:
        whole: HBM, where the whole table is in HBM (compute kernel FUSED): weights and optimizer state.
        hot: HBM, of a hot row of a table in host memory: its slot in the overlay, or in FBGEMM's cache.
        fixed: HBM, of every row of a table in host memory that has hot rows.
        cold: HBM, of every row of a table in host memory that has none (compute kernel FUSED_UVM).
        host: host memory, of every row of a table in host memory.
        state_moved: bytes of optimizer state that an update of a row which is not hot reads and writes over the bus.
    """

    whole: int
    hot: int
    fixed: int
    cold: int
    host: int
    state_moved: int


@cache
def row_bytes(dim: int, element_size: int, state: OptimizerState, backing: str, cache: Cache = Cache()) -> RowBytes:
    """What a row of ``dim`` weights of ``element_size`` bytes takes.

    Args:
        backing: ``"caching"`` (FUSED_UVM_CACHING: FBGEMM's cache holds hot rows, without any state that is not
            row-wise) or ``"uvm"`` (FUSED_UVM below an overlay, which holds hot rows with all their state).
        cache: of ``"caching"``.
    """
    weights, all_state = dim * element_size, state.row_bytes(dim)
    managed_state = all_state - state.rowwise_bytes
    if backing == "caching":
        times, counts = (0, 8) if cache.lfu else (8, 0)
        locks = 4 if cache.prefetch else 0
        hot = dim * (cache.element_size or element_size) + CACHE_TAG_BYTES + times + locks
        fixed = state.rowwise_bytes + CACHE_MAP_BYTES + counts
    else:
        hot, fixed = weights + all_state, state.rowwise_bytes + SLOT_WORD_BYTES
    return RowBytes(
        whole=weights + all_state,
        hot=hot,
        fixed=fixed,
        cold=state.rowwise_bytes,
        host=weights + managed_state,
        state_moved=2 * managed_state,
    )
