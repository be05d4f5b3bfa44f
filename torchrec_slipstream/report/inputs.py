"""The report on inputs: how many were read, trained on and dropped, and what of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class DropCount:
    """``dropped`` of the ``read`` samples (of a label) or look-ups (of a feature)."""

    read: int
    dropped: int

    def __add__(self, other: DropCount) -> DropCount:
        return DropCount(self.read + other.read, self.dropped + other.dropped)

    @property
    def share(self) -> float:
        """Share that was dropped."""
        return self.dropped / max(1, self.read)


@dataclass(frozen=True)
class InputReport:
    """What became of the samples of all input batches, over all ranks. ``str()`` is for people, :meth:`to_dict` for
    programs.

    ``read == used + dropped + left_over + waiting``, in samples.

    Attributes:
        method: ``InputsConfig.method``.
        epochs: whose end was reached.
        read: from the loaders.
        used: in batches that were handed out.
        dropped: left out of training by the method.
        left_over: kept, but too few at an epoch's end to give every rank one more; or an epoch was broken off.
        waiting: kept, for a batch to come.
        kept_weight: sum of the kept samples' weights (1 each for a method that does not weigh); where they are inverse
            probabilities, near ``read``.
        labels: by label value; empty where labels are missing, several a sample, or of more than 16 values.
        features: by KJT key, in look-ups.
    """

    method: str
    epochs: int
    read: int
    used: int
    dropped: int
    left_over: int
    waiting: int
    kept_weight: float
    labels: Mapping[str, DropCount] = field(default_factory=dict, repr=False)
    features: Mapping[str, DropCount] = field(default_factory=dict, repr=False)

    def __add__(self, other: InputReport) -> InputReport:
        """Of two ranks together."""
        summed = {name: getattr(self, name) + getattr(other, name) for name in _SAMPLES}
        return InputReport(
            method=self.method,
            epochs=max(self.epochs, other.epochs),
            labels=_merged(self.labels, other.labels),
            features=_merged(self.features, other.features),
            **summed,
        )

    @property
    def dropped_share(self) -> float:
        """Share of the samples read that was dropped; compare ``InputsConfig.drop_share``."""
        return self.dropped / max(1, self.read)

    @property
    def logit_shift(self) -> float:
        """What to add to the trained model's logits, so that they are log-odds among all samples again.

        Where negatives were dropped and the kept ones count once (``"thinning"``; ``"negatives"`` without weights) the
        model learnt odds that are too high by a factor: the share of the positives that was kept over that of the
        negatives. 0 for other methods, and before both labels were seen.
        """
        of_label = [self.labels.get(label, DropCount(0, 0)) for label in ("0", "1")]
        if self.method not in ("thinning", "negatives") or self.kept_weight != self.read - self.dropped:
            return 0.0
        if any(one.read == one.dropped for one in of_label):
            return 0.0
        negatives, positives = (1.0 - one.share for one in of_label)
        return math.log(negatives / positives)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for JSON."""
        return asdict(self) | {"dropped_share": self.dropped_share, "logit_shift": self.logit_shift}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> InputReport:
        """The report that :meth:`to_dict` wrote."""
        plain = [one.name for one in fields(InputReport) if one.name not in ("labels", "features")]
        return InputReport(
            labels={key: DropCount(**one) for key, one in values["labels"].items()},
            features={key: DropCount(**one) for key, one in values["features"].items()},
            **{name: values[name] for name in plain},
        )

    def __str__(self) -> str:
        lines = [
            f"method {self.method!r}, {self.epochs} epochs over: {self.read:,} samples read, {self.used:,} trained on, "
            f"{self.dropped:,} dropped ({self.dropped_share:.1%}), {self.left_over:,} left over, "
            f"{self.waiting:,} waiting"
        ]
        if self.kept_weight != self.read - self.dropped:
            lines.append(f"the kept samples' weights sum to {self.kept_weight:,.0f}")
        if self.labels:
            shares = ", ".join(f"{one.share:.1%} of label {value}" for value, one in self.labels.items())
            lines.append(f"dropped: {shares}")
        if self.features:
            least, *_, most = sorted([*self.features.items()] * 2, key=lambda one: one[1].share)
            lines.append(
                f"look-ups dropped with them: {sum(self.features.values(), DropCount(0, 0)).share:.1%}; "
                f"from {least[1].share:.1%} ({least[0]}) to {most[1].share:.1%} ({most[0]})"
            )
        return "\n".join(lines)


_SAMPLES = ("read", "used", "dropped", "left_over", "waiting", "kept_weight")


def _merged(some: Mapping[str, DropCount], more: Mapping[str, DropCount]) -> dict[str, DropCount]:
    nothing = DropCount(0, 0)
    return {key: some.get(key, nothing) + more.get(key, nothing) for key in {**some, **more}}
