"""Tables, look-ups and stale rows for the speed benchmarks: a bare TBE under Zipf-distributed traffic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn

from torchrec_slipstream.tbe import UpdateFilter, find_tbes


@dataclass(frozen=True)
class Sizes:
    """How much there is to look up.

    ``tables`` of ``rows`` x ``dim`` float32; ``batch`` bags a table and step, one look-up each; ``zipf`` the exponent
    of the ids' popularity; ``batches`` different ones, prepared ahead.
    """

    tables: int = 26
    rows: int = 200_000
    dim: int = 16
    batch: int = 4096
    zipf: float = 1.2
    batches: int = 32
    seed: int = 0


def make_tbe(sizes: Sizes, device: str = "cpu") -> SplitTableBatchedEmbeddingBagsCodegen:
    """A TBE with row-wise Adagrad, its weights seeded: two calls give equal ones."""
    on_cpu = device == "cpu"
    location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
    compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(sizes.rows, sizes.dim, location, compute)] * sizes.tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        eps=1e-8,
        pooling_mode=PoolingMode.SUM,
        output_dtype=SparseType.FP32,
        device=torch.device(device),
    )
    torch.manual_seed(sizes.seed)
    for weights in tbe.split_embedding_weights():
        weights.uniform_(-0.1, 0.1)
    for (momentum,) in tbe.split_optimizer_states():
        momentum.fill_(0.01)  # written to, so that no page of it is faulted in while something is timed
    return tbe


def make_batches(sizes: Sizes, device: str = "cpu") -> tuple[list[Tensor], Tensor]:
    """(int64 ``[tables * batch]`` a batch, table-major; the offsets that all share).

    Ids follow a Zipf law without an end and are hashed into the tables, as a production job's are. A row's popularity
    has nothing to do with its place: every table has its own permutation.
    """
    generator = np.random.default_rng(sizes.seed)
    indices = np.empty((sizes.batches, sizes.tables, sizes.batch), dtype=np.int64)
    for table in range(sizes.tables):
        ids = generator.zipf(sizes.zipf, (sizes.batches, sizes.batch)) - 1
        indices[:, table] = generator.permutation(sizes.rows)[ids % sizes.rows]
    offsets = torch.arange(sizes.tables * sizes.batch + 1, device=device)
    return [torch.from_numpy(batch.ravel()).to(device) for batch in indices], offsets


def count_lookups(sizes: Sizes, batches: list[Tensor]) -> Tensor:
    """int64 ``[tables * rows]``: look-ups of every row of the TBE's row space over all batches."""
    begins = torch.arange(sizes.tables).repeat_interleave(sizes.batch) * sizes.rows
    counts = torch.zeros(sizes.tables * sizes.rows, dtype=torch.int64)
    for indices in batches:
        counts += torch.bincount(indices.cpu() + begins, minlength=counts.numel())
    return counts


def choose_stale(counts: Tensor, share: float, order_by: str, *, seed: int = 0) -> Tensor:
    """bool ``[rows]``: rows with at most ``share`` of the look-ups, as near to it as whole rows allow.

    ``order_by`` says which come first: "popular", "rare" or "random".
    """
    if order_by != "random":
        order = counts.argsort(descending=order_by == "popular")
    else:
        order = torch.randperm(counts.numel(), generator=torch.Generator().manual_seed(seed))
    fits = counts[order].cumsum(0) <= share * float(counts.sum())
    stale = torch.zeros(counts.numel(), dtype=torch.bool)
    stale[order[fits]] = True
    return stale


def make_filter(tbe: SplitTableBatchedEmbeddingBagsCodegen, stale: Tensor) -> UpdateFilter:
    """A filter for which the ``stale`` (bool, all rows of the TBE) are so at every step; not attached yet."""
    update_filter = UpdateFilter(find_tbes(nn.ModuleList([tbe]))[0])
    rows = stale.nonzero().squeeze(1).to(update_filter.device)
    never = torch.zeros(rows.numel(), dtype=torch.uint8, device=rows.device)
    update_filter.set_patterns(rows, never)
    return update_filter


def find_difference(
    tbe: SplitTableBatchedEmbeddingBagsCodegen,
    twin: SplitTableBatchedEmbeddingBagsCodegen,
    update_filter: UpdateFilter,
    indices: Tensor,
    offsets: Tensor,
    gradient: Tensor,
) -> str | None:
    """Run one step of ``tbe`` with the filter and of its equal ``twin`` without; what is not as promised, or None.

    Promised: equal outputs; live rows, with their optimizer state, bit-equal to the twin's; stale rows untouched.
    Afterwards the twin equals ``tbe`` again, so that the next step can be compared too.
    """
    shard_rows = update_filter.shards[0].rows
    stale = update_filter.patterns == 0
    touched = torch.zeros_like(stale)
    begins = torch.tensor([s.row_begin for s in update_filter.shards], device=indices.device)
    touched[indices + begins.repeat_interleave(indices.numel() // begins.numel())] = True
    parts = list(zip(_states(tbe), _states(twin), (stale & touched).split(shard_rows), strict=True))
    before = [[state[rows].clone() for state in ours] for ours, _, rows in parts]
    update_filter.attach()
    try:
        output = tbe(indices, offsets)
        output.backward(gradient)
    finally:
        update_filter.detach()
    stock_output = twin(indices, offsets)
    stock_output.backward(gradient)
    if not _same_bits(output.detach(), stock_output.detach()):
        return "the outputs differ"
    problem = None
    stock_moved = False
    for (ours, stock, rows), old in zip(parts, before, strict=True):
        for mine, theirs, was in zip(ours, stock, old, strict=True):
            if not _same_bits(mine[rows], was):
                problem = "a stale row or its optimizer state changed"
            stock_moved |= not _same_bits(theirs[rows], was)
            theirs[rows] = was
            # All rows, looked up or not: with the stale ones put back, stock and ours must be one.
            if not _same_bits(mine, theirs):
                problem = problem or "a live row or its optimizer state is not stock's"
    if problem is None and bool(stale.any()) and not stock_moved:
        return "stock moved no stale row either, so nothing was shown"
    return problem


def _states(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> list[list[Tensor]]:
    """Views of the weights and the optimizer state of every table."""
    return [
        [weights.detach(), *states]
        for weights, states in zip(tbe.split_embedding_weights(), tbe.split_optimizer_states(), strict=True)
    ]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))
