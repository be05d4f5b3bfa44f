"""Real TBEs and batches for the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from torchrec_slipstream.tbe import UpdateFilter, find_tbes
from torchrec_slipstream.tbe.compaction import positions_of
from torchrec_slipstream.tbe.overlay import Overlay
from torchrec_slipstream.tbe.update_filter import ALWAYS_LIVE

TBE = SplitTableBatchedEmbeddingBagsCodegen


def make_tbe(
    rows: Sequence[int] = (50, 30),
    dims: Sequence[int] = (8, 16),
    *,
    features: Sequence[int] | None = None,
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    pooling: PoolingMode = PoolingMode.SUM,
    dtype: SparseType = SparseType.FP32,
    device: str = "cpu",
    location: EmbeddingLocation | None = None,
    output: SparseType = SparseType.FP32,
    seed: int = 0,
    **more: object,
) -> TBE:
    """A TBE with seeded weights: two calls with the same arguments give equal ones."""
    compute = ComputeDevice.CPU if device == "cpu" else ComputeDevice.CUDA
    if location is None:
        location = EmbeddingLocation.HOST if device == "cpu" else EmbeddingLocation.DEVICE
    tbe = TBE(
        [(r, d, location, compute) for r, d in zip(rows, dims, strict=True)],
        feature_table_map=list(features) if features is not None else None,
        optimizer=optimizer,
        learning_rate=0.1,
        eps=1e-8,
        pooling_mode=pooling,
        weights_precision=dtype,
        output_dtype=output,
        device=torch.device(device),
        **more,
    )
    generator = torch.Generator().manual_seed(seed)
    for weights in tbe.split_embedding_weights():
        weights.copy_(torch.rand(weights.shape, generator=generator) - 0.5)
    return tbe


@dataclass
class Lookups:
    """One batch for a TBE: indices, offsets, and optional weights and variable batch sizes."""

    indices: Tensor
    offsets: Tensor
    weights: Tensor | None = None
    batch_sizes: list[list[int]] | None = None

    def run(self, tbe: TBE) -> Tensor:
        return tbe(
            self.indices,
            self.offsets,
            per_sample_weights=self.weights,
            batch_size_per_feature_per_rank=self.batch_sizes,
        )


def make_lookups(
    feature_rows: Sequence[int],
    bags: Sequence[int],
    *,
    longest: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.int64,
    weighted: bool = False,
    device: str = "cpu",
) -> Lookups:
    """Random bags (empty ones and duplicates among them): ``bags[f]`` of them over ``feature_rows[f]`` rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths, indices = [], []
    for rows, count in zip(feature_rows, bags, strict=True):
        length = torch.randint(0, longest + 1, (count,), generator=generator)
        lengths.append(length)
        indices.append(torch.randint(0, rows, (int(length.sum()),), generator=generator))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(lengths).cumsum(0)])
    values = torch.cat(indices).to(dtype)
    weights = torch.rand(values.numel(), generator=generator) if weighted else None
    return Lookups(values.to(device), offsets.to(dtype).to(device), weights.to(device) if weights is not None else None)


def filtered(tbe: TBE, live: Tensor) -> UpdateFilter:
    """Attach a filter to the TBE that holds the rows where ``live`` (bool, all its rows) is False stale."""
    update_filter = UpdateFilter(find_tbes(nn.ModuleList([tbe]))[0])
    update_filter.attach()
    set_live(update_filter, live)
    return update_filter


def set_live(update_filter: UpdateFilter, live: Tensor) -> None:
    patterns = torch.where(live, ALWAYS_LIVE, 0).to(torch.uint8)
    rows = torch.arange(live.numel())
    device = update_filter.device
    update_filter.set_patterns(rows.to(device), patterns.to(device))


def overlaid(tbe: TBE, slots: Mapping[int, int], live: Tensor | None = None) -> UpdateFilter:
    """Attach an overlay with ``slots`` a dim to the TBE, all rows cold; ``live`` as :func:`filtered` has it."""
    found = find_tbes(nn.ModuleList([tbe]))[0]
    update_filter = UpdateFilter(found)
    update_filter.overlay = Overlay(found, slots)
    update_filter.attach()
    if live is not None:
        set_live(update_filter, live)
    return update_filter


def move_rows(overlay: Overlay, seed: int) -> None:
    """Make about half of the hot rows cold, and some random cold ones hot, in random free slots."""
    generator = torch.Generator().manual_seed(seed)
    for place, pool in overlay.pool_of.items():
        hot = overlay.hot_rows(place)
        begin = overlay.space.begins[place]
        overlay.demote(pool, hot[(torch.rand(len(hot), generator=generator) < 0.5).to(hot.device)] + begin)
        rows = torch.randperm(overlay.shards[place].rows, generator=generator).to(hot.device)
        rows = rows[overlay.slots_of(place, rows) < 0]
        free = positions_of(~overlay.taken(pool))
        free = free[torch.randperm(len(free), generator=generator).to(hot.device)]
        count = min(len(rows), 1 + len(free) // 2, len(free))
        overlay.promote(pool, rows[:count].sort().values + begin, free[:count])


def table_states(tbe: TBE) -> list[list[Tensor]]:
    """Copies of the weights and every optimizer state, ``[rows, ...]``, of every table."""
    tbe.flush()
    weights = tbe.split_embedding_weights()
    states = tbe.split_optimizer_states() if tbe.optimizer != EmbOptimType.EXACT_SGD else [[] for _ in weights]
    return [
        [w.detach().cpu().clone(), *(s.detach().cpu().clone() for s in state)]
        for w, state in zip(weights, states, strict=True)
    ]
