"""A DLRM that trains on a trace under a real session which re-plans its hot rows, timed step by step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionArch, OverArch
from tqdm import tqdm

from benchmarks.harness import Timing, interleaved
from benchmarks.traces import Trace
from examples.samples import DENSE_NAMES
from torchrec_slipstream import AccessConfig, PlacementConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.placement.migration import migrate
from torchrec_slipstream.tbe.overlay import Overlay

Bools = npt.NDArray[np.bool_]
HotRows = dict[int, Tensor]


class Model(nn.Module):
    """TorchRec's DLRM over one TBE with all tables of a trace on the CPU: row-wise Adagrad inside, Adagrad outside."""

    def __init__(self, trace: Trace, dense_sizes: Sequence[int], over_sizes: Sequence[int], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        dims = {table.dim for table in trace.tables}
        if len(dims) != 1:
            raise ValueError(f"tables of dims {sorted(dims)}; DLRM takes one dim")
        (self.dim,) = dims
        self.tables = len(trace.tables)
        self.tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(table.rows, table.dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for table in trace.tables],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=0.01,
            eps=1e-8,
            pooling_mode=PoolingMode.SUM,
            device=torch.device("cpu"),
        )
        for weights in self.tbe.split_embedding_weights():
            weights.uniform_(-0.1, 0.1)
        self.dense = DenseArch(len(DENSE_NAMES), [*dense_sizes, self.dim])
        self.interaction = InteractionArch(self.tables)
        pairs = (self.tables + 1) * self.tables // 2
        self.over = OverArch(self.dim + pairs, [*over_sizes, 1])
        self.optimizer = torch.optim.Adagrad([*self.dense.parameters(), *self.over.parameters()], lr=0.01)

    def train_step(self, indices: Tensor, offsets: Tensor, dense: Tensor, labels: Tensor) -> None:
        rows = self.tbe(indices, offsets).view(-1, self.tables, self.dim)
        logits = self.over(self.interaction(self.dense(dense), rows)).squeeze(1)
        self.optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        self.optimizer.step()


def lookups_of(trace: Trace, last: int, seed: int) -> Iterator[Tensor]:
    """The look-ups of the batches 0 .. last-1, table-major: int64 ``[tables * batch]``, rows of each table.

    A trace knows how often a batch looks a row up, not for which of its samples: that is drawn.
    """
    generator = np.random.default_rng(seed)
    shape = (len(trace.tables), trace.batch_size)
    for batch in range(last):
        part = slice(trace.batches[batch], trace.batches[batch + 1])
        rows = np.repeat(trace.rows[part].astype(np.int64), trace.lookups[part])
        if rows.size != shape[0] * shape[1]:
            raise ValueError(f"batch {batch} has {rows.size} look-ups; give a trace with one a table and sample")
        local = rows.reshape(shape) - trace.starts[:-1, None]
        yield torch.from_numpy(generator.permuted(local, axis=1).ravel())


@dataclass(frozen=True)
class Run:
    """A run of ``len(train)`` steps.

    Attributes:
        slots: rows that can be hot.
        hits: share of the look-ups that hit, by interval of ``every`` steps.
        hot: the hot rows after each interval, by table.
        moved_at: steps after which rows were moved.
        moved_rows: by interval, as the session reports; 0 where its limit left the re-plan out.
        replans: how many re-plans the session reports, by interval: 0 or 1.
        train, session: seconds of each step, and of the session's ``step()`` after it.
    """

    every: int
    slots: int
    hits: npt.NDArray[np.float64]
    hot: list[HotRows]
    moved_at: list[int]
    moved_rows: npt.NDArray[np.int64]
    replans: npt.NDArray[np.int64]
    train: npt.NDArray[np.float64]
    session: npt.NDArray[np.float64]
    overlay: Overlay
    chunk_bytes: int

    @property
    def replan_seconds(self) -> npt.NDArray[np.float64]:
        """By interval, all that training waits for at its end: looking at the counts, deciding, and moving."""
        is_replan = (np.arange(len(self.session)) + 1) % self.every == 0
        plain = float(np.median(self.session[~is_replan])) if (~is_replan).any() else 0.0
        return np.maximum(self.session[is_replan] - plain, 0.0)

    def mask(self, interval: int, starts: npt.NDArray[np.int64]) -> Bools:
        """bool ``[total rows]``, the rows that are hot after an interval."""
        hot = np.zeros(starts[-1], dtype=bool)
        for table, rows in self.hot[interval].items():
            hot[starts[table] + rows.numpy()] = True
        return hot


def train(
    trace: Trace,
    slots: int,
    every: int,
    last: int,
    *,
    dense_sizes: Sequence[int],
    over_sizes: Sequence[int],
    max_stall_share: float | None,
    min_gain: float,
    seed: int,
) -> Run:
    """Train on the batches 0 .. last-1, with a re-plan after every ``every`` of them; all rows are cold at first."""
    model = Model(trace, dense_sizes, over_sizes, seed)
    # The budget of the slots; a word a row comes besides, as FBGEMM's cache has an index entry a row besides.
    budget = slots * trace.tables[0].row_bytes + 4 * trace.total_rows
    placement = PlacementConfig(
        hbm_budget=budget,
        replan_every=every,
        record_every=every,
        max_stall_share=max_stall_share,
        min_gain=min_gain,
    )
    config = SlipstreamConfig(
        staleness=StalenessConfig(target_share=0.0), access=AccessConfig(counter="exact"), placement=placement
    )
    session = Slipstream(model, config)
    (overlay,) = session._hot.overlays
    assert overlay is not None
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(trace.batch_size, len(DENSE_NAMES), generator=generator)
    labels = (torch.rand(trace.batch_size, generator=generator) < 0.2).float()
    offsets = torch.arange(len(trace.tables) * trace.batch_size + 1)
    seconds = np.zeros((2, last))
    hot: list[HotRows] = []
    batches = lookups_of(trace, last, seed)
    for step, indices in enumerate(tqdm(batches, total=last, desc="training", unit="step", file=sys.stderr)):
        began = time.perf_counter()
        model.train_step(indices, offsets, dense, labels)
        trained = time.perf_counter()
        session.step()
        seconds[:, step] = trained - began, time.perf_counter() - trained
        if (step + 1) % every == 0:
            hot.append({place: overlay.hot_rows(place) for place in range(len(trace.tables))})
    report = session.report().placement
    assert report is not None
    moved_rows, replans = np.zeros((2, last // every), dtype=np.int64)
    for one in report.replans:
        moved_rows[one.step // every - 1] = one.demoted + one.promoted
        replans[one.step // every - 1] = 1
    return Run(
        every=every,
        slots=sum(pool.slots for pool in overlay.pools),
        hits=np.array([rate for _, rate in report.hit_rates()]),
        hot=hot,
        moved_at=[one.step for one in report.replans if one.moved],
        moved_rows=moved_rows,
        replans=replans,
        train=seconds[0],
        session=seconds[1],
        overlay=overlay,
        chunk_bytes=int(placement.chunk_bytes),
    )


def time_moves(run: Run, intervals: Sequence[int], rounds: int) -> tuple[dict[str, Timing], int]:
    """Repeat the moves that were made after some ``intervals``, in turns with plain copies of the same rows.

    Each row is its weights and its state. ``migrate`` is what moves rows; ``index_copy`` copies the same rows between
    the same places, table by table, ``index_select`` from the one and ``index_copy_`` into the other; ``write_alone``
    leaves the reading out: its values lie ready.

    Returns:
        Times of all moves together, by provider, one a round; and the bytes of the rows.
    """
    overlay = run.overlay
    overlay.hold()
    # The plain copies have memory of their own: the run's rows stay whole.
    cold = {place: [tensor.clone() for tensor in overlay.backing.of(place)] for place in run.hot[0]}
    hot = {pool.dim: [tensor.clone() for tensor in pool.tensors] for pool in overlay.pools}
    moves = [_Move(run, interval, cold, hot) for interval in intervals]

    def reset(name: str, turn: int) -> None:
        if name == "migrate":
            moves[turn % len(moves)].reset()

    providers = {"migrate": _Move.migrate, "index_copy": _Move.copy, "write_alone": _Move.write}

    def turn_of(do: Callable[[_Move], None], turn: int) -> None:
        do(moves[turn % len(moves)])

    timings = interleaved(
        {name: partial(turn_of, do) for name, do in providers.items()},
        rounds * len(moves),
        len(moves),
        title="moves again",
        before=reset,
    )
    by_move = {name: np.reshape(timing.samples, (rounds, len(moves))) for name, timing in timings.items()}
    whole = {name: Timing(tuple(seconds.sum(axis=1).tolist())) for name, seconds in by_move.items()}
    return whole, sum(move.bytes for move in moves)


class _Move:
    """What was moved after one interval."""

    def __init__(self, run: Run, interval: int, cold: dict[int, list[Tensor]], hot: dict[int, list[Tensor]]) -> None:
        self.run = run
        self.before, self.after = run.hot[interval - 1], run.hot[interval]
        self.reset()
        overlay = run.overlay
        rows = {
            place: (_without(self.before[place], self.after[place]), _without(self.after[place], self.before[place]))
            for place in self.after
        }
        leaving = {place: overlay.slots_of(place, out) for place, (out, _) in rows.items()}
        self.migrate()
        # By tensor: to, where to, from, where from, and the values.
        self.copies: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        for place, (out, coming) in rows.items():
            slots = overlay.slots_of(place, coming)
            for theirs, ours in zip(cold[place], hot[overlay.pool_of[place].dim], strict=True):
                for to, where, source, origin in ((theirs, out, ours, leaving[place]), (ours, slots, theirs, coming)):
                    if where.numel():
                        self.copies.append((to, where, source, origin, source.index_select(0, origin)))
        self.bytes = sum(values.nbytes for *_, values in self.copies)

    def reset(self) -> None:
        migrate(self.run.overlay, self.before, self.run.chunk_bytes)

    def migrate(self) -> None:
        migrate(self.run.overlay, self.after, self.run.chunk_bytes)

    def copy(self) -> None:
        for to, where, source, origin, _ in self.copies:
            to.index_copy_(0, where, source.index_select(0, origin))

    def write(self) -> None:
        for to, where, _, _, values in self.copies:
            to.index_copy_(0, where, values)


def _without(rows: Tensor, others: Tensor) -> Tensor:
    """Of ``rows`` (distinct), those that are not among the ``others``."""
    return rows[~torch.isin(rows, others, assume_unique=True)]
