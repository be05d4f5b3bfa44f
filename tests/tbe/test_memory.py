"""The bytes that we count, against those that a real FBGEMM TBE allocates."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torchrec import optim

from torchrec_slipstream.tbe.memory import OPTIMIZERS, optimizer_of, optimizer_state, row_bytes

ROWS, DIM = 50, 24


@pytest.mark.parametrize(
    "kind", [EmbOptimType.EXACT_SGD, EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD]
)
@pytest.mark.parametrize("precision", [SparseType.FP32, SparseType.FP16])
def test_a_whole_row_takes_what_fbgemm_allocates(kind: EmbOptimType, precision: SparseType) -> None:
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=kind, weights_precision=precision
    )
    (weights,) = tbe.split_embedding_weights()
    allocated = weights.numel() * weights.element_size()
    for states in tbe.split_optimizer_states():
        allocated += sum(state.numel() * state.element_size() for state in states)
    state = optimizer_state(kind)
    assert ROWS * row_bytes(DIM, weights.element_size(), state, "uvm").whole == allocated


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("backing", ["caching", "uvm"])
def test_nothing_of_a_row_is_lost_between_hbm_and_host(name: str, backing: str) -> None:
    state = optimizer_state(name)
    a_row = row_bytes(DIM, 4, state, backing)
    # Weights and state are in host memory but for the row-wise part, which is in HBM for every row.
    assert a_row.host + state.rowwise_bytes == a_row.whole == DIM * 4 + state.row_bytes(DIM)
    assert a_row.fixed == state.rowwise_bytes + 4
    assert a_row.hot == (DIM * 4 + 16 if backing == "caching" else a_row.whole)
    assert a_row.state_moved == 2 * (state.row_bytes(DIM) - state.rowwise_bytes)


def test_an_lfu_cache_counts_every_row() -> None:
    state = optimizer_state("rowwise_adagrad")
    lru, lfu = row_bytes(DIM, 4, state, "caching"), row_bytes(DIM, 4, state, "caching", lfu=True)
    assert (lfu.fixed - lru.fixed, lru.hot - lfu.hot) == (8, 8)


def test_the_optimizer_is_found_where_torchrec_looks() -> None:
    weights = torch.nn.Parameter(torch.empty(2, DIM))
    assert optimizer_of(weights, None).name == "exact_sgd"
    assert optimizer_of(weights, {"optimizer": EmbOptimType.ADAM}).row_bytes(DIM) == 8 * DIM
    weights._optimizer_classes = [optim.RowWiseAdagrad]  # type: ignore[attr-defined]
    assert optimizer_of(weights, {"optimizer": EmbOptimType.ADAM}).row_bytes(DIM) == 4

    class Unknown(torch.optim.SGD):
        pass

    weights._optimizer_classes = [Unknown]  # type: ignore[attr-defined]
    assert optimizer_of(weights, None).row_bytes(DIM) == 8 * DIM, "one that we do not know is taken for the largest"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer 'adamw' is not known; give one of sgd, rowwise_adagrad"):
        optimizer_state("adamw")
