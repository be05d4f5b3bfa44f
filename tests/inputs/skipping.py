"""Slipstream's input skipping: a run with a real TBE, and the method written down in plain loops."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from tests.tables import TBE, make_tbe
from torchrec_slipstream.config import SlipstreamInputs
from torchrec_slipstream.inputs.rows import RowSets
from torchrec_slipstream.inputs.slipstream import SlipstreamSelector
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe import UpdateFilter, find_tbes
from torchrec_slipstream.tbe.features import ModelTable, model_tables
from torchrec_slipstream.tbe.watched import watched_shards

ROWS, DIMS, FEATURES = (30, 12), (4, 8), (0, 0, 1)
SIZE = 16
Bags = list[list[list[int]]]  # by table's feature and sample


@dataclass
class Run:
    """A TBE that trains, a selector that follows it, and all that an oracle needs to know of both."""

    knobs: SlipstreamInputs
    hot: Callable[[Sequence[ModelTable]], RowSets] | None = None
    drop_share: float = 0.3
    seed: int = 0
    selector_seed: int = 0
    scale: int = 1
    watched: tuple[int, ...] = (0, 1)
    before: dict[int, list[np.ndarray]] = field(default_factory=dict)
    touches: list[list[Counter[int]]] = field(default_factory=list)
    seen: list[Bags] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tbe: TBE = make_tbe(ROWS, DIMS, features=FEATURES, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD)
        model = nn.ModuleList([self.tbe])
        self.tables = model_tables(model)
        self.filter = UpdateFilter(find_tbes(model)[0])
        self.filter.attach()
        self.filter.counting = True
        self.keys = [feature for table in self.tables for feature in table.features]
        self.hot_sets = RowSets.all_rows(self.tables) if self.hot is None else self.hot(self.tables)
        self.selector = self.new_selector()

    def new_selector(self) -> SlipstreamSelector:
        shards = [one for one in watched_shards([self.filter]) if one.place in self.watched]
        hot = None if self.hot is None else self.hot_sets
        return SlipstreamSelector(
            self.knobs,
            self.tables,
            shards,
            hot,
            Ranks(),
            drop_share=self.drop_share,
            seed=self.selector_seed,
            scale=self.scale,
        )

    def batch(self, number: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        lengths = torch.randint(0, 3, (len(FEATURES) * SIZE,), generator=generator)
        values = []
        for feature, part in enumerate(lengths.split(SIZE)):
            rows = ROWS[FEATURES[feature]]
            values.append((rows ** torch.rand(int(part.sum()), generator=generator)).long().clamp(max=rows) - 1)
        features = KeyedJaggedTensor(self.keys, torch.cat(values), lengths=lengths)
        return Batch(torch.zeros(SIZE, 1), features, torch.zeros(SIZE))

    def train(self, steps: range) -> list[list[bool]]:
        """What is kept of the batches of these steps."""
        kept = []
        for step in steps:
            self.before[step] = self.weights()
            batch = self.batch(step)
            kept.append(self.selector.choose(batch).keep.tolist())
            self.seen.append(_bags(batch.sparse_features))
            features = batch.sparse_features
            self.tbe(features.values(), features.offsets()).square().sum().backward()
            self.touches.append([Counter(), Counter()])
            for table, of_feature in zip(FEATURES, self.seen[-1], strict=True):
                self.touches[-1][table].update(row for bag in of_feature for row in bag)
            self.selector.step(step + 1)
        self.before[steps.stop] = self.weights()
        return kept

    def weights(self) -> list[np.ndarray]:
        return [one.detach().clone().numpy() for one in self.tbe.split_embedding_weights()]


def _bags(features: KeyedJaggedTensor) -> Bags:
    lengths, values = features.lengths().tolist(), iter(features.values().tolist())
    bags = [[next(values) for _ in range(length)] for length in lengths]
    return [bags[begin : begin + SIZE] for begin in range(0, len(bags), SIZE)]


def rows_of(one: list[list[int]], table: int) -> list[int]:
    """What an input looks up in a table."""
    return [row for of_feature, bag in zip(FEATURES, one, strict=True) if of_feature == table for row in bag]


class Oracle:
    """The method in plain loops, of a search with snapshots at ``start`` and ``end`` over all inputs ``read``."""

    def __init__(self, run: Run, start: int, end: int, read: range) -> None:
        self.run, self.knobs = run, run.knobs
        first, last = run.before[start], run.before[end]
        hot = [run.hot_sets.of(table.fqn).tolist() for table in run.tables]
        self.hot = hot
        self.moved: list[list[float]] = []
        for table, rows in enumerate(ROWS):
            self.moved.append([])
            for row in range(rows):
                touched = sum(run.touches[step][table][row] for step in range(start, end))
                moved = float(
                    max(abs(np.float32(a - b)) for a, b in zip(first[table][row], last[table][row], strict=True))
                )
                if self.knobs.movement == "per_touch" and touched:
                    moved = float(np.float32(moved) / np.float32(touched))
                if self.knobs.movement == "relative":
                    norm = torch.from_numpy(first[table][row]).square().mean().sqrt()
                    moved = float(np.float32(moved) / norm.numpy())
                tried = hot[table][row] and touched >= self.knobs.min_touches and table in run.watched
                self.moved[-1].append(moved if tried else math.inf)
        self.inputs = [[of_feature[sample] for of_feature in run.seen[step]] for step in read for sample in range(SIZE)]
        self.sampled = [one for one in self.inputs if self.is_hot(one)]
        self.scores = self.moved if not self.knobs.per_table else [self._shares(table) for table in range(len(ROWS))]

    def _shares(self, table: int) -> list[float]:
        """Of each row: the share of the table's sampled look-ups that moved less."""
        looked_up = [row for one in self.sampled for row in rows_of(one, table)]
        moved = self.moved[table]
        below = [sum(moved[other] < of_row for other in looked_up) / len(looked_up) for of_row in moved]
        return [share if of_row < math.inf else math.inf for share, of_row in zip(below, moved, strict=True)]

    def is_hot(self, one: list[list[int]]) -> bool:
        return all(self.hot[table][row] for table, bag in zip(FEATURES, one, strict=True) for row in bag)

    def is_stale(self, one: list[list[int]], threshold: float) -> bool:
        by_table: list[list[bool]] = [[] for _ in ROWS]
        for table, bag in zip(FEATURES, one, strict=True):
            if table in self.run.watched:
                by_table[table] += [self.scores[table][row] < threshold for row in bag]
        every = [is_stale for of_table in by_table for is_stale in of_table]
        if self.knobs.stale_lookups is None:
            return bool(every) and all(every)
        if self.knobs.each_table:
            return all(sum(by_table[table]) >= self.knobs.stale_lookups for table in self.run.watched)
        return sum(every) >= self.knobs.stale_lookups

    def share(self, threshold: float) -> float:
        return sum(self.is_stale(one, threshold) for one in self.sampled) / len(self.sampled)

    def search(self) -> tuple[float, bool]:
        low, high = 0.0, 1.0 if self.knobs.per_table else self.knobs.max_threshold or math.nan
        best, nearest = 0.0, abs(self.run.drop_share)
        for _ in range(25):
            middle = (low + high) / 2
            share = self.share(middle)
            if abs(share - self.run.drop_share) < nearest:
                best, nearest = middle, abs(share - self.run.drop_share)
            if share > 0 and abs(share - self.run.drop_share) <= self.knobs.search_window:
                return middle, True
            low, high = (middle, high) if share < self.run.drop_share else (low, middle)
        return best, False


def hot_half(tables: Sequence[ModelTable]) -> RowSets:
    """The most popular rows, and some at random."""
    generator = torch.Generator().manual_seed(3)
    return RowSets(
        tables,
        {t.fqn: (torch.rand(t.rows, generator=generator) < 0.5) | (torch.arange(t.rows) < 6) for t in tables},
    )
