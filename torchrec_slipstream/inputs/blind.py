"""Methods that look at no embedding row.

``"thinning"`` (ours) is :class:`NegativeSampling` without weights, its logits put right after training by
``InputReport.logit_shift``. ``"random"`` (:class:`RandomDrop`) and ``"negatives"`` (:class:`NegativeSampling` with
weights) are the controls that every method has to beat.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.errors import InputError, StateError
from torchrec_slipstream.inputs.batches import labels_of, size_of
from torchrec_slipstream.inputs.choice import Choice
from torchrec_slipstream.inputs.draws import Draws

# "auto" lets positives weigh up to so much, as far as they have so much of the kept weight.
_MOST_WEIGHT, _MOST_SHARE = 4.0, 1.0 / 6.0
_MEMORY = 0.99  # weight of the past in the share of positives, an input batch


class KeepAll:
    """Keeps every sample, in lane 0 of ``lanes``, with weight 1 if it ``weighs``."""

    def __init__(self, *, lanes: int = 1, weighs: bool = False) -> None:
        self.lanes, self.weighs = lanes, weighs

    def choose(self, batch: Any) -> Choice:
        """All of them."""
        return Choice(keep=torch.ones(size_of(batch), dtype=torch.bool))

    def step(self, steps: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing but the name."""
        return {"selector": "all"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the state is of this selector."""
        _check("all", state)


class RandomDrop:
    """Keeps every sample with probability ``1 - drop_share``.

    What is dropped depends on ``seed``, ``rank`` and the number of input batches chosen from before, so that epochs
    differ and runs repeat.

    Args:
        drop_share: in ``[0, 1)``.
        weighs: kept samples weigh ``1 / (1 - drop_share)``.
    """

    lanes = 1

    def __init__(self, drop_share: float, *, seed: int = 0, rank: int = 0, weighs: bool = False) -> None:
        self.weighs = weighs
        self._keep = 1.0 - drop_share
        self._draws = Draws(seed, rank)

    def choose(self, batch: Any) -> Choice:
        """By chance alone."""
        size = size_of(batch)
        keep = self._draws.uniform(size) < self._keep
        return Choice(keep, torch.full((size,), 1.0 / self._keep) if self.weighs else None)

    def step(self, steps: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """The number of input batches chosen from."""
        return {"selector": "random", "batches": self._draws.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the draws."""
        _check("random", state)
        self._draws.batches = state["batches"]


class NegativeSampling:
    """Keeps every positive sample (any label above 0.5), and drops negatives at random so that ``drop_share`` of all
    samples go.

    A negative is kept with probability ``p = 1 - drop_share / (share of negatives)``, that share a mean of this rank's
    input batches, the current one included, which fades over some 100 of them. Where the negatives are too few for
    ``drop_share``, p is ``min_probability``, and less is dropped. Draws as :class:`RandomDrop`.

    Args:
        drop_share: of all samples, in ``[0, 1)``.
        weighs: kept negatives weigh ``1 / p``, so that the expected gradient is the full one.
        positive_weight: what a positive counts for; "auto": see ``InputsConfig``, by the same faded shares.
        min_probability: least p, in ``(0, 1]``.
    """

    lanes = 1

    def __init__(
        self,
        drop_share: float,
        *,
        seed: int = 0,
        rank: int = 0,
        weighs: bool = True,
        positive_weight: float | str = 1.0,
        min_probability: float = 0.1,
    ) -> None:
        self.weighs = weighs or positive_weight != 1.0
        self._weighs_negatives, self._positive_weight = weighs, positive_weight
        self._drop_share, self._min_probability = drop_share, min_probability
        self._draws = Draws(seed, rank)
        self._negatives = self._samples = 0.0  # faded sums

    def choose(self, batch: Any) -> Choice:
        """By label, and by chance.

        Raises:
            InputError: the batch has no labels, or such as are not finite; or those of several tasks a sample, and no
                weights make up for what is dropped: each task's odds would then be off by another factor. Nothing was
                counted.
        """
        size, labels = size_of(batch), labels_of(batch)
        if labels is None:
            raise InputError(
                f"methods 'thinning' and 'negatives' read labels, and {type(batch).__name__} has no tensor 'labels'; "
                "name it so"
            )
        if labels.numel() > size and not self._weighs_negatives:
            raise InputError(
                f"labels {list(labels.shape)} are of several tasks a sample, whose logits no one shift puts right once "
                "negatives were dropped; use method='negatives' with its weights (weigh=None)"
            )
        labels = labels.detach().cpu()  # the one wait for a GPU
        _check_finite(labels)
        negative = negatives_of(labels)
        self._negatives = _MEMORY * self._negatives + int(negative.count_nonzero())
        self._samples = _MEMORY * self._samples + size
        probability = 1.0 - self._drop_share * self._samples / max(self._negatives, 1e-9)
        probability = max(probability, self._min_probability)
        keep = ~negative | (self._draws.uniform(size) < probability)
        if not self.weighs:
            return Choice(keep)
        weight = torch.full((size,), self._weight_of_positives(probability))
        weight[negative] = 1.0 / probability if self._weighs_negatives else 1.0
        return Choice(keep, weight)

    def _weight_of_positives(self, probability: float) -> float:
        if isinstance(self._positive_weight, float | int):
            return float(self._positive_weight)
        positives = max(self._samples - self._negatives, 1e-9)
        fits = _MOST_SHARE / (1.0 - _MOST_SHARE) * probability * self._negatives / positives
        return min(max(fits, 1.0), _MOST_WEIGHT)

    def step(self, steps: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """The number of input batches chosen from, and the faded sums."""
        return {
            "selector": "negatives",
            "batches": self._draws.batches,
            "negatives": self._negatives,
            "samples": self._samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the draws and the sums."""
        _check("negatives", state)
        self._draws.batches = state["batches"]
        self._negatives, self._samples = state["negatives"], state["samples"]


def negatives_of(labels: Tensor) -> Tensor:
    """bool [B] on the CPU, the samples none of whose labels (``[B]`` or ``[B, tasks]``) is above 0.5."""
    return (labels.detach().reshape(len(labels), -1) <= 0.5).all(dim=1).cpu()


def _check_finite(labels: Tensor) -> None:
    """Raise InputError for a label that is neither negative nor positive."""
    known = labels.reshape(len(labels), -1).isfinite().all(dim=1)
    if not bool(known.all()):
        first = int((~known).nonzero()[0])
        raise InputError(
            f"labels of {int((~known).sum())} of a batch's {len(labels)} samples are not finite, as those of sample "
            f"{first}: {labels[first].tolist()}; give them a label, or leave them out of the loader's batches"
        )


def _check(name: str, state: dict[str, Any]) -> None:
    if not isinstance(state, dict) or state.get("selector") != name:
        found = state.get("selector") if isinstance(state, dict) else state
        raise StateError(f"this is the state of selector {found!r}, not of {name!r}; resume with the same method")
