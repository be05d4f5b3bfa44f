"""Slipstream's threshold search (arXiv 2404.04270, step 4 of the artefact), over a sample of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from torchrec_slipstream.inputs.batches import concat, select
from torchrec_slipstream.inputs.movement import TableMovement
from torchrec_slipstream.inputs.rows import RowSets, SampleLookups

HALVINGS = 25

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        threshold: inputs that are critical below it are dropped.
        share: of the sampled inputs, over all ranks, that are.
        met: whether the share is within the window, and not 0 unless that was asked for.
        samples: sampled inputs, over all ranks.
    """

    threshold: float
    share: float
    met: bool
    samples: int


@dataclass(frozen=True)
class Search:
    """One search: the step it was after, what it found, the threshold of each table, and the stale rows."""

    step: int
    found: Found
    thresholds: dict[str, float]
    stale_rows: int


@dataclass
class _Sampled:
    """A KJT as the batch that :func:`select` and :func:`concat` want."""

    features: KeyedJaggedTensor


class Sample:
    """The look-ups of the inputs that are kept for a search, on the CPU."""

    def __init__(self) -> None:
        self._batches: list[list[_Sampled]] = []

    def add(self, features: Sequence[KeyedJaggedTensor], chosen: Tensor) -> None:
        """Keep the ``chosen`` inputs (int64 ``[n]``, on the CPU) of a batch; ``features``: all its KJTs."""
        if chosen.numel():
            self._batches.append([select(_Sampled(KeyedJaggedTensor(**_packed(one))), chosen) for one in features])

    def clear(self) -> None:
        """Keep none."""
        self._batches = []

    def hot(self, rows: RowSets) -> list[KeyedJaggedTensor]:
        """The inputs all of whose look-ups are of ``rows``, as one batch's KJTs; none if none was kept."""
        if not self._batches:
            return []
        whole = [concat(list(of_kjt)) for of_kjt in zip(*self._batches, strict=True)]
        chosen = rows.samples([one.features for one in whole]).all_inside.nonzero().squeeze(1)
        return [select(one, chosen).features for one in whole]

    def state_dict(self) -> list[list[dict[str, Any]]]:
        """All KJTs, taken apart."""
        return [[_packed(one.features) for one in of_batch] for of_batch in self._batches]

    def load_state_dict(self, state: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Go on from :meth:`state_dict`."""
        self._batches = [[_Sampled(KeyedJaggedTensor(**one)) for one in of_batch] for of_batch in state]


def _packed(features: KeyedJaggedTensor) -> dict[str, Any]:
    """On the CPU, without weights, which no movement depends on."""
    values, lengths = features.values().cpu(), features.lengths().cpu()
    return {"keys": features.keys(), "values": values, "lengths": lengths, "stride": features.stride()}


def bisect(critical: Floats, target: float, window: float, highest: float, total: Callable[[Tensor], Tensor]) -> Found:
    """Halve ``[0, highest]`` at most 25 times, until the share of inputs below the threshold is within the window.

    A share of 0 is not taken for a wanted one however wide the window, or a small target would drop nothing. A search
    that fails gives the threshold, of 0 and those met, whose share came nearest (the first, where two did).

    Args:
        critical: ``[n]``, of each of this rank's sampled inputs the threshold above which it is dropped.
        target, window: the wanted share, and the accepted distance from it.
        total: sums a float64 tensor over the ranks.
    """
    samples = int(total(torch.tensor([float(len(critical))], dtype=torch.float64)))
    best = Found(0.0, 0.0, target == 0.0, samples)
    if samples == 0 or best.met:
        return best
    low, high = 0.0, highest
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        dropped = torch.tensor([float((critical < middle).sum())], dtype=torch.float64)
        share = float(total(dropped)) / samples
        met = share > 0.0 and abs(share - target) <= window
        if met or abs(share - target) < abs(best.share - target):
            best = Found(middle, share, met, samples)
        if met:
            break
        low, high = (middle, high) if share < target else (low, middle)
    return best


def rows_looked_up(sampled: Sequence[KeyedJaggedTensor], known: RowSets) -> dict[str, tuple[Ints, Ints]]:
    """By table, the distinct rows (ascending) of the inputs, and the look-ups of each; ``known``: the tables."""
    ids: dict[str, list[Ints]] = {}
    for features in sampled:
        for feature, values in _by_feature(features):
            for table in known.tables_of(feature):
                ids.setdefault(table.fqn, []).append(values)
    found = {}
    for fqn, parts in ids.items():
        rows, counts = np.unique(np.concatenate(parts), return_counts=True)
        found[fqn] = rows, counts.astype(np.int64)
    return found


def critical_movement(
    sampled: Sequence[KeyedJaggedTensor],
    movements: Mapping[str, TableMovement],
    known: RowSets,
    least: int | None,
    *,
    each_table: bool,
) -> Floats:
    """``[B]``: of each input the movement above which a threshold makes it stale; infinite where none does.

    An input is stale if ``least`` of its look-ups are (None: all, of which there is one at least): so that is the
    ``least``-th smallest of its look-ups' movements. With ``each_table`` so many in every table that the batch has
    features of. A look-up in several tables is stale if it is in all of them.

    Args:
        sampled: the KJTs of the inputs, all of one stride.
        movements: of every row that they look up, by table.
        known: the tables that count, of any rows.
    """
    size = sampled[0].stride()
    moved: dict[str, list[Floats]] = {}
    sample: dict[str, list[Ints]] = {}
    for features in sampled:
        lengths = features.lengths().long().view(len(features.keys()), size)
        for place, (feature, values) in enumerate(_by_feature(features)):
            tables = known.tables_of(feature)
            if not tables:
                continue
            of_lookup = np.full(len(values), -np.inf)
            for table in tables:
                if len(values):
                    of_table = movements[table.fqn]
                    of_lookup = np.maximum(of_lookup, of_table.moved[np.searchsorted(of_table.ids, values)])
            owner = torch.repeat_interleave(torch.arange(size), lengths[place]).numpy()
            for group in [table.fqn for table in tables] if each_table and least is not None else [""]:
                moved.setdefault(group, []).append(of_lookup)
                sample.setdefault(group, []).append(owner)
    critical = np.full(size, -np.inf if moved else np.inf)
    for group in moved:
        of_group = _kth_smallest(np.concatenate(moved[group]), np.concatenate(sample[group]), size, least)
        critical = np.maximum(critical, of_group)
    return critical


def is_stale(counts: SampleLookups, stale: RowSets, least: int | None, *, each_table: bool) -> Tensor:
    """bool ``[B]``, the inputs of which ``least`` look-ups are in ``stale`` (None: all, one at least).

    Args:
        counts: ``stale.samples(...)``.
        each_table: so many in every table that the batch has features of.
    """
    if least is None:
        return counts.all_inside & (counts.lookups.sum(dim=0) > 0)
    if not each_table:
        return counts.inside.sum(dim=0) >= least
    found = torch.ones(counts.inside.shape[1], dtype=torch.bool, device=counts.inside.device)
    by_table: dict[str, list[int]] = {}
    for place, feature in enumerate(counts.features):
        for table in stale.tables_of(feature):
            by_table.setdefault(table.fqn, []).append(place)
    for places in by_table.values():
        found &= counts.inside[places].sum(dim=0) >= least
    return found & bool(by_table)


def _by_feature(features: KeyedJaggedTensor) -> list[tuple[str, Ints]]:
    ids, bounds = features.values().long().numpy(), features.offset_per_key()
    return [(key, ids[begin:end]) for key, begin, end in zip(features.keys(), bounds[:-1], bounds[1:], strict=True)]


def _kth_smallest(values: Floats, owner: Ints, owners: int, k: int | None) -> Floats:
    """``[owners]``, the k-th smallest of each owner's values (None: the largest); infinite where it has fewer."""
    order = np.lexsort((values, owner))
    counts = np.bincount(owner, minlength=owners)
    ends = np.cumsum(counts)
    has = counts >= (1 if k is None else k)
    at = ends - 1 if k is None else ends - counts + k - 1
    found = np.full(owners, np.inf)
    found[has] = values[order][at[has]]
    return found
