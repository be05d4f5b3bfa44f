"""The report on inputs: how many were read, trained on and dropped, and what of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any


@dataclass(frozen=True)
class DropCount:
    """``dropped`` of the ``read`` samples (of a label) or look-ups (of a table or feature)."""

    read: int
    dropped: int

    def __add__(self, other: DropCount) -> DropCount:
        return DropCount(self.read + other.read, self.dropped + other.dropped)

    @property
    def share(self) -> float:
        """Share that was dropped."""
        return self.dropped / max(1, self.read)


@dataclass(frozen=True)
class ClassCount:
    """``dropped`` of the ``read`` negative or positive samples, and the sum of the kept ones' weights."""

    read: int
    dropped: int
    kept_weight: float

    def __add__(self, other: ClassCount) -> ClassCount:
        return ClassCount(self.read + other.read, self.dropped + other.dropped, self.kept_weight + other.kept_weight)

    @property
    def weighs(self) -> bool:
        """Whether kept samples count for other than one each."""
        return self.kept_weight != self.read - self.dropped


@dataclass(frozen=True)
class LaneCount:
    """Batches of one kind that were handed out to each rank, as many to all, and the samples in all of them."""

    samples: int
    batches: int

    def __add__(self, other: LaneCount) -> LaneCount:
        """Of two ranks together."""
        return LaneCount(self.samples + other.samples, max(self.batches, other.batches))


@dataclass(frozen=True)
class SearchReport:
    """One search for the threshold below which a row is stale (method "slipstream"); the same on every rank.

    Attributes:
        step: after which training step.
        threshold: movement; with a threshold a table, the share of each table's look-ups that moved less.
        share: of the sampled hot inputs, that the threshold drops; the search aims at ``InputsConfig.drop_share``.
        met: whether that is within ``SlipstreamInputs.search_window``, and not 0 unless that was asked for.
        samples: sampled hot inputs, over all ranks.
        stale_rows: of all tables, over all ranks.
    """

    step: int
    threshold: float
    share: float
    met: bool
    samples: int
    stale_rows: int


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
        classes: "negative" (no label above 0.5) and "positive" samples, as the methods that read labels tell them
            apart; empty where labels are missing.
        labels: by label value; empty where labels are missing, several a sample, or of more than 16 values.
        features: by KJT key, in look-ups.
        tables: by table, in look-ups of all its features; empty where batches do not name the model's features.
        lanes: by kind of batch, where the method has several ("fae": "cold" and "hot").
        searches: of the method "slipstream", in their order.
        classified: samples read while there were stale rows to tell them by (method "slipstream").
        hot: of those, the ones whose look-ups are all of hot rows.
    """

    method: str
    epochs: int
    read: int
    used: int
    dropped: int
    left_over: int
    waiting: int
    kept_weight: float
    classes: Mapping[str, ClassCount] = field(default_factory=dict, repr=False)
    labels: Mapping[str, DropCount] = field(default_factory=dict, repr=False)
    features: Mapping[str, DropCount] = field(default_factory=dict, repr=False)
    tables: Mapping[str, DropCount] = field(default_factory=dict, repr=False)
    lanes: Mapping[str, LaneCount] = field(default_factory=dict, repr=False)
    searches: Sequence[SearchReport] = field(default_factory=list, repr=False)
    classified: int = 0
    hot: int = 0

    def __add__(self, other: InputReport) -> InputReport:
        """Of two ranks together."""
        summed: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        merged: dict[str, Any] = {name: _merged(getattr(self, name), getattr(other, name)) for name in _COUNTED}
        return replace(self, epochs=max(self.epochs, other.epochs), **summed, **merged)

    @property
    def dropped_share(self) -> float:
        """Share of the samples read that was dropped; compare ``InputsConfig.drop_share``."""
        return self.dropped / max(1, self.read)

    @property
    def lookups(self) -> DropCount:
        """Look-ups of all features, and how many of them were dropped with their samples."""
        return sum(self.features.values(), DropCount(0, 0))

    @property
    def logit_shift(self) -> float:
        """What to add to the trained model's logits, so that they are log-odds among all samples again.

        Where negatives were dropped and the kept ones count once (``"thinning"``; ``"negatives"`` without weights) the
        model learnt odds that are too high by a factor: the weight of the positives over all that were read, over the
        share of the negatives that was kept. 0 for other methods, and before samples of both classes were kept.
        """
        if self.method not in ("thinning", "negatives"):
            return 0.0
        negative, positive = (self.classes.get(name, ClassCount(0, 0, 0.0)) for name in ("negative", "positive"))
        known = min(negative.read, positive.read, negative.kept_weight, positive.kept_weight) > 0
        if negative.weighs or not known:
            return 0.0
        kept = math.log(negative.kept_weight) - math.log(positive.kept_weight)
        return kept - math.log(negative.read) + math.log(positive.read)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for JSON."""
        return asdict(self) | {"dropped_share": self.dropped_share, "logit_shift": self.logit_shift}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> InputReport:
        """The report that :meth:`to_dict` wrote, of this release or before it."""
        plain = {one.name: values[one.name] for one in fields(InputReport) if one.name in values}
        counted = {
            name: {key: kind(**one) for key, one in values.get(name, {}).items()} for name, kind in _COUNTED.items()
        }
        searches = [SearchReport(**one) for one in values.get("searches", ())]
        return InputReport(**{**plain, **counted, "searches": searches})

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
        if shift := self.logit_shift:
            lines.append(f"add {shift:.4f} to the model's logits, and they are log-odds among all samples")
        if of_each := self.tables or self.features:
            least, *_, most = sorted([*of_each.items()] * 2, key=lambda one: one[1].share)
            few, many = (f"{one.share:.1%} ({name.rpartition('.')[2]})" for name, one in (least, most))
            spread = f"; from {few} to {many}" if least[1].share < most[1].share else ""
            lines.append(f"look-ups dropped with them: {self.lookups.share:.1%}{spread}")
        if self.lanes:
            counts = [f"{one.batches:,} {name} ({one.samples:,} samples)" for name, one in self.lanes.items()]
            lines.append(f"batches a rank: {', '.join(counts)}")
        lines += [
            f"step {one.step:,}: threshold {one.threshold:.3g}, {one.stale_rows:,} rows stale, for {one.share:.1%} of "
            f"{one.samples:,} sampled hot inputs" + ("" if one.met else " (the share asked for was not found)")
            for one in self.searches
        ]
        if self.classified:
            lines.append(
                f"of the inputs read while stale rows were known, {self.dropped / self.classified:.1%} were dropped, "
                f"{self.dropped / max(1, self.hot):.1%} of the hot ones"
            )
        return "\n".join(lines)


_SUMMED = ("read", "used", "dropped", "left_over", "waiting", "kept_weight", "classified", "hot")
_COUNTED: Mapping[str, type[ClassCount] | type[DropCount] | type[LaneCount]] = {
    "classes": ClassCount,
    **dict.fromkeys(("labels", "features", "tables"), DropCount),
    "lanes": LaneCount,
}


def _merged(some: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = {**some, **more}
    return both | {key: some[key] + more[key] for key in some.keys() & more.keys()}
