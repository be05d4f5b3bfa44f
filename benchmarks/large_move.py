"""One large move between a table and its overlay, against plain copies of as many rows: where bytes are what counts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn

from benchmarks.harness import Timing, interleaved
from torchrec_slipstream.placement.migration import migrate
from torchrec_slipstream.tbe import find_tbes
from torchrec_slipstream.tbe.overlay import Overlay

_CHUNK_BYTES = 16 << 20


def time_large_move(
    rows: int = 1_000_000, slots: int = 100_000, moved: int = 40_000, dim: int = 64, rounds: int = 15
) -> tuple[dict[str, Timing], int]:
    """Exchange ``moved`` of the ``slots`` hot rows for as many cold ones, with their row-wise Adagrad state, on a CPU.

    ``migrate`` is what moves rows; ``index_copy`` reads the same rows by ``index_select`` and writes them by
    ``index_copy_``; ``write_alone`` leaves the reading out.

    Returns:
        Times by provider; and the bytes of the rows, each counted once.
    """
    generator = torch.Generator().manual_seed(0)
    tbe = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD
    )
    overlay = Overlay(find_tbes(nn.ModuleList([tbe]))[0], {dim: slots})
    order = torch.randperm(rows, generator=generator)
    stay, there, here = order[: slots - moved], order[slots - moved : slots], order[slots : slots + moved]
    sets = [torch.cat([stay, part]).sort().values for part in (there, here)]
    migrate(overlay, {0: sets[0]}, _CHUNK_BYTES)
    # The plain copies have memory of their own: the overlay's rows stay whole.
    cold = [torch.zeros(rows, dim), torch.zeros(rows)]
    hot = [torch.zeros(slots, dim), torch.zeros(slots)]
    places = torch.randperm(slots, generator=generator)[:moved]
    values = [tensor.index_select(0, here) for tensor in cold]

    def exchange(turn: int) -> None:
        migrate(overlay, {0: sets[(turn + 1) % 2]}, _CHUNK_BYTES)

    def copies(turn: int, *, reads: bool) -> None:
        for theirs, ours, ready in zip(cold, hot, values, strict=True):
            for to, where, source, origin in ((theirs, there, ours, places), (ours, places, theirs, here)):
                to.index_copy_(0, where, source.index_select(0, origin) if reads else ready)

    providers: dict[str, Callable[[int], None]] = {
        "migrate": exchange,
        "index_copy": partial(copies, reads=True),
        "write_alone": partial(copies, reads=False),
    }
    row_bytes = sum(_bytes(tensor) for tensor in values)
    return interleaved(providers, rounds, 2, title="a large move"), 2 * row_bytes


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
