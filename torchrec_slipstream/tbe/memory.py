"""What FBGEMM allocates for a table, a row: the bytes that a plan has to count.

Read from FBGEMM's ``construct_split_state`` and ``_apply_cache_state`` (the same from 1.6 to 1.8). TorchRec's own
storage estimate leaves three of them out, and runs out of memory where tables are large: row-wise optimizer state is in
HBM for *every* row of a UVM table (4 bytes a row); so is the cache's map from rows to tables (another 4); an optimizer
that is set through ``fused_params`` is not counted at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor
from torchrec import optim

# Bytes a slot of FBGEMM's cache needs besides the row: its tag and its LRU time (int64 each).
CACHE_SLOT_BYTES = 16
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


def optimizer_of(weights: Tensor, fused_params: Mapping[str, Any] | None) -> OptimizerState:
    """The optimizer that TorchRec will fuse into a table's backward.

    The one of ``apply_optimizer_in_backward``, else ``fused_params["optimizer"]``, else FBGEMM's own default, SGD.
    One that we do not know is taken for Adam, which keeps the most.
    """
    classes = getattr(weights, "_optimizer_classes", None)
    if classes:
        kind = _BY_CLASS.get(classes[0], EmbOptimType.ADAM)
    else:
        kind = (fused_params or {}).get("optimizer", EmbOptimType.EXACT_SGD)
    return optimizer_state(kind if kind in _STATES else EmbOptimType.ADAM)


# Bytes a row that an attached session keeps on the table's device: its step pattern (uint8) and its touches (int32).
SESSION_BYTES = 5
# Bytes a row of a table with an overlay: the word that says which slot holds it (int32).
SLOT_WORD_BYTES = 4


@dataclass(frozen=True)
class RowBytes:
    """Bytes that one row of a shard takes, by where the table lives.

    Attributes:
        whole: HBM, where the whole table is in HBM (compute kernel FUSED): weights and optimizer state.
        hot: HBM, of a hot row of a table in host memory: its slot in the overlay, or in FBGEMM's cache.
        fixed: HBM, of every row of a table in host memory, hot or not.
        host: host memory, of every row of a table in host memory.
        state_moved: bytes of optimizer state that an update of a row which is not hot reads and writes over the bus.
    """

    whole: int
    hot: int
    fixed: int
    host: int
    state_moved: int


def row_bytes(dim: int, element_size: int, state: OptimizerState, backing: str, *, lfu: bool = False) -> RowBytes:
    """What a row of ``dim`` weights of ``element_size`` bytes takes.

    Args:
        backing: ``"caching"`` (FUSED_UVM_CACHING: FBGEMM's cache holds hot rows, without any state that is not
            row-wise) or ``"uvm"`` (FUSED_UVM below an overlay, which holds hot rows with all their state).
        lfu: the cache counts accesses (8 bytes for every row) instead of keeping times (8 bytes a slot).
    """
    weights, all_state = dim * element_size, state.row_bytes(dim)
    managed_state = all_state - state.rowwise_bytes
    if backing == "caching":
        hot = weights + CACHE_SLOT_BYTES - (8 if lfu else 0)
        fixed = state.rowwise_bytes + CACHE_MAP_BYTES + (8 if lfu else 0)
    else:
        hot, fixed = weights + all_state, state.rowwise_bytes + SLOT_WORD_BYTES
    return RowBytes(weights + all_state, hot, fixed, weights + managed_state, 2 * managed_state)
