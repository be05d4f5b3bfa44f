"""Building the TBE that an overlay keeps its slots in."""

from __future__ import annotations

from itertools import pairwise
from math import log2
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
    UserEnabledConfigDefinition,
)

from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.tbe.backing import BackingRows
from torchrec_slipstream.tbe.finding import TBE, FoundTbe, TableShard
from torchrec_slipstream.tbe.versions import check_overlay

_WEIGHTS = (SparseType.FP32, SparseType.FP16, SparseType.BF16)


def check_can_have_overlay(found: FoundTbe) -> None:
    """Raises AttachError where the TBE's weights, outputs or options are such that an overlay would not be exact,
    and where its version lacks what an overlay relies on."""
    tbe = found.tbe
    check_overlay(tbe, found.optimizer)
    tables = ", ".join(sorted({shard.table for shard in found.shards}))
    if list(tbe.feature_table_map) != sorted(tbe.feature_table_map):
        # FBGEMM's CPU backward goes wrong there without an overlay as well; ours numbers slots by runs of features.
        raise AttachError(
            f"table(s) {tables}: the features of one table stand apart in this TBE's feature_table_map "
            f"{tbe.feature_table_map}; list them in the tables' order, as TorchRec does, or leave these tables out of "
            "the placement"
        )
    if tbe.use_writeback_bwd_prehook or tbe.enable_raw_embedding_streaming:
        raise AttachError(
            f"table(s) {tables}: FBGEMM's write-back hook and its streaming of rows look at the backing TBE's batch "
            "alone, and would miss the hot rows; switch them off, or leave these tables out of the placement"
        )
    if tbe.weights_precision not in _WEIGHTS:
        raise AttachError(
            f"table(s) {tables}: weights of {tbe.weights_precision} carry their scale in the row, which an overlay "
            "does not; use FP32, FP16 or BF16, or leave these tables out of the placement"
        )
    if SparseType.from_int(tbe.output_dtype) not in _WEIGHTS:
        raise AttachError(
            f"table(s) {tables}: outputs of {SparseType.from_int(tbe.output_dtype)} cannot be added up; use FP32, FP16 "
            "or BF16, or leave these tables out of the placement"
        )


def overlay_tbe(backing: TBE, tables: list[tuple[int, int]], shards: tuple[TableShard, ...]) -> TBE:
    """A TBE in fast memory with ``tables`` (rows, dim), and the features and optimizer of the backing one."""
    on_cpu = backing.use_cpu
    location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
    compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    dims = [dim for _, dim in tables]
    feature_table = [dims.index(shards[table].dim) for table in backing.feature_table_map]
    more: dict[str, Any] = {}
    if backing.use_rowwise_bias_correction:
        more["extra_optimizer_config"] = UserEnabledConfigDefinition(use_rowwise_bias_correction=True)
    state_types = {
        f"momentum{i + 1}": SparseType.from_dtype(state.dtype)
        for i, state in enumerate(BackingRows(backing).of(0)[1:])
        if backing.optimizer == EmbOptimType.PARTIAL_ROWWISE_ADAM
    }
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, location, compute) for rows, dim in tables],
        feature_table_map=feature_table,
        optimizer=backing.optimizer,
        weight_decay_mode=backing.weight_decay_mode,
        optimizer_state_dtypes=state_types or None,
        weights_precision=backing.weights_precision,
        output_dtype=SparseType.from_int(backing.output_dtype),
        pooling_mode=PoolingMode(backing.pooling_mode),
        bounds_check_mode=BoundsCheckMode.NONE,  # slots are ours
        device=backing.current_device,
        **more,
    )
    _number_by_table(tbe, [tables[table][0] for table in feature_table], list(backing.feature_table_map))
    return tbe


def _number_by_table(tbe: TBE, slots: list[int], tables: list[int]) -> None:
    """Let every backing table number the slots that it shares for itself: two tables never have one slot at a time.

    FBGEMM numbers the rows of a batch by ``hash_size_cumsum``. Its CPU backward wants that to ascend with the features,
    and adds a row's gradients up in another order where several features have one table: so the overlay's tables have
    to look to it as the backing ones do for their sums to be equal bit for bit. Its CUDA backward only takes the number
    of a feature's first row off again (``transpose_embedding_input.cu`` and the warp and block kernels, 1.6.0 and
    1.8.0), so that any numbers will do which are distinct for distinct rows.

    Args:
        slots: for each feature, how many its table has in the overlay.
        tables: for each feature, its backing table.
    """
    begins, total = [0], slots[0]
    for (before, table), count in zip(pairwise(tables), slots[1:], strict=True):
        begins.append(begins[-1] if table == before else total)
        total += 0 if table == before else count
    tbe.hash_size_cumsum.copy_(torch.tensor([*begins, total]))
    tbe.total_hash_size = total
    tbe.total_hash_size_bits = int(log2(total) + 1)
