"""Signals: how far each row is from having settled.

A signal looks at the rows of one table shard that may be stale, and gives each a number; smaller is staler, NaN says
"not known". Rows are compared by it within a run only, so its unit does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowView:
    """What a signal may see of ``n`` rows of one shard.

    ``weights`` and ``before`` are float32 ``[n, dim]``, now and at the last decision (``before`` has NaN rows where
    there is no snapshot, and both are empty for a signal that needs none); ``updates`` float32 ``[n]``, look-ups
    that were live since the first step; ``new_updates`` those since the last decision; ``state`` float32 ``[n]``, the
    mean over the dims of the optimizer's sum of squared gradients (empty where the optimizer keeps none);
    ``state_before`` the same at the last decision.
    """

    weights: Tensor
    before: Tensor
    updates: Tensor
    new_updates: Tensor
    state: Tensor
    state_before: Tensor


class Signal(Protocol):
    """A measure of what is still to be gained from training a row."""

    needs_snapshot: bool
    """Whether it wants ``weights`` and ``before``: they cost memory and time."""
    needs_state: bool
    """Whether it wants ``state``: only the Adagrad family has one."""

    def score(self, rows: RowView) -> Tensor:
        """float32 ``[n]``, at least 0, NaN where this interval says nothing about the row."""
        ...


class Gain:
    """What the optimizer has gained a look-up of the row: ``sqrt(sum of squared gradients) / look-ups``.

    Adagrad's step on gradient ``g`` is ``lr * g / sqrt(G)``, ``G`` the sum of squares so far, and to first order it
    lowers the loss by ``lr * g^2 / sqrt(G)``; summed over a row's life that is ``2 * lr * sqrt(G)``. Divided by the
    look-ups it cost, it ranks rows by what one more update is worth. It needs no snapshot at all.
    """

    needs_snapshot = False
    needs_state = True

    def score(self, rows: RowView) -> Tensor:
        return rows.state.sqrt() / rows.updates.clamp(min=1)


class Movement:
    """Slipstream's: the largest movement of any dimension since the last snapshot, a touch.

    arXiv 2404.04270, step 4 of the artefact, divided by the touches so that a row is not stale for being rare.
    """

    needs_snapshot = True
    needs_state = False

    def score(self, rows: RowView) -> Tensor:
        moved = (rows.weights - rows.before).abs().amax(dim=1)
        return _where_updated(moved / rows.new_updates.clamp(min=1), rows)


class Drift:
    """Displacement since the last snapshot over that of a random walk with the same steps.

    A row that still goes somewhere has a ratio near the root of the number of its steps; one that trembles round its
    place has 1 or less.
    """

    needs_snapshot = True
    needs_state = True

    def score(self, rows: RowView) -> Tensor:
        displaced = (rows.weights - rows.before).norm(dim=1)
        walked = ((rows.state - rows.state_before).clamp(min=0) / rows.state.clamp(min=1e-30)).sqrt()
        return _where_updated(displaced / walked.clamp(min=1e-30), rows)


SIGNALS: dict[str, type[Signal]] = {"gain": Gain, "movement": Movement, "drift": Drift}


def _where_updated(score: Tensor, rows: RowView) -> Tensor:
    """A row that had no update has not shown whether it would move."""
    return torch.where(rows.new_updates > 0, score, torch.nan)
