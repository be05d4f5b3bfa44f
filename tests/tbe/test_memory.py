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
from torchrec import EmbeddingBagConfig, optim
from torchrec.distributed.types import CacheAlgorithm, CacheParams
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.types import DataType

from torchrec_slipstream.tbe.memory import OPTIMIZERS, Cache, cache_of, optimizer_of, optimizer_state, row_bytes

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
    lru, lfu = row_bytes(DIM, 4, state, "caching"), row_bytes(DIM, 4, state, "caching", Cache(lfu=True))
    assert (lfu.fixed - lru.fixed, lru.hot - lfu.hot) == (8, 8)


def test_a_cache_is_what_the_table_or_else_its_sharder_asks_for() -> None:
    state = optimizer_state("adam")
    plain = row_bytes(DIM, 4, state, "caching")
    assert cache_of(CacheParams(), {}) == Cache()
    sharder = {"cache_algorithm": CacheAlgorithm.LFU, "cache_precision": SparseType.FP16, "prefetch_pipeline": True}
    asked = cache_of(CacheParams(), sharder)
    assert asked == Cache(element_size=2, lfu=True, prefetch=True)
    assert row_bytes(DIM, 4, state, "caching", asked).hot == plain.hot - 2 * DIM - 8 + 4
    own = CacheParams(algorithm=CacheAlgorithm.LRU, precision=DataType.FP32, prefetch_pipeline=False)
    assert cache_of(own, sharder) == Cache(element_size=4)


def test_the_optimizer_is_found_where_torchrec_looks() -> None:
    weights, module = torch.nn.Parameter(torch.empty(2, DIM)), torch.nn.Module()
    assert optimizer_of(module, weights, {}).name == "exact_sgd"
    assert optimizer_of(module, weights, {"optimizer": EmbOptimType.ADAM}).row_bytes(DIM) == 8 * DIM
    fused = FusedEmbeddingBagCollection(
        tables=[EmbeddingBagConfig(name="t", num_embeddings=2, embedding_dim=DIM, feature_names=["f"])],
        optimizer_type=torch.optim.Adagrad,
        optimizer_kwargs={"lr": 0.1},
        device=torch.device("meta"),
    )
    assert optimizer_of(fused, weights, {}).row_bytes(DIM) == 4 * DIM
    weights._optimizer_classes = [optim.RowWiseAdagrad]  # type: ignore[attr-defined]
    assert optimizer_of(module, weights, {"optimizer": EmbOptimType.ADAM}).row_bytes(DIM) == 4

    class Unknown(torch.optim.SGD):
        pass

    weights._optimizer_classes = [Unknown]  # type: ignore[attr-defined]
    assert optimizer_of(module, weights, {}).row_bytes(DIM) == 8 * DIM, "the largest, where we do not know it"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer 'adamw' is not known; give one of sgd, rowwise_adagrad"):
        optimizer_state("adamw")
