"""Which samples still teach?"""

from __future__ import annotations

from dataclasses import dataclass, field

from torchrec_slipstream.config.checks import boolean, finite, instance, memory, one_of, within
from torchrec_slipstream.errors import ConfigError

MOVEMENTS = ("plain", "per_touch", "relative")
INPUT_METHODS = ("off", "random", "negatives", "thinning", "slipstream", "fae")


@dataclass(frozen=True, kw_only=True)
class SlipstreamInputs:
    """What ``method="slipstream"`` goes by (arXiv 2404.04270). Defaults are the published artefact's, where it has any.

    Raises:
        ConfigError: a value is out of its range or of another type; the message names field, value and range.
    """

    hot_bytes: int | str | None = None
    """Bytes for hot rows with their optimizer state, such as ``"256MiB"`` (the artefact's): those of most look-ups a
    byte in the ``profile`` given to ``Slipstream.inputs``, or else in the session's own counts when the first snapshot
    is taken. None: all rows are hot."""

    start: int = 0
    """The training step before which the first snapshot is taken, counted from the first batch. The artefact's runs:
    1000."""

    snapshot_steps: int = 100
    """Steps from the first snapshot to the second, after which the search is; at least 1."""

    snapshot_share: float | None = None
    """The same as a share of an epoch's input batches (of the rank that has least), in ``(0, 1]``, instead of
    ``snapshot_steps``; for loaders with a length. It is the artefact's p, which is of its hot batches, pure ones: ours
    are mixed, and so many of them hold as many hot samples."""

    again: int = 0
    """Steps from a first snapshot to the next, which thaws all rows; 0: once a run, as published; else more than
    ``snapshot_steps``."""

    sample_share: float = 0.01
    """Share of the samples read that are kept for the search, in ``(0, 1]``."""

    search_window: float = 0.08
    """Accepted distance from ``InputsConfig.drop_share``, which there is of the hot samples, in ``[0, 1]``. Dropping
    none is not accepted, however wide it is, unless ``drop_share`` is 0."""

    stale_lookups: int | None = None
    """Stale look-ups that a sample needs to be dropped (alpha), at least 1; None: all that it has (26 of 26)."""

    each_table: bool = False
    """``stale_lookups`` counts in every table (the artefact's Taobao run), not over all."""

    min_touches: int = 5
    """Look-ups between the snapshots that a row needs to be stale, at least 1. The artefact takes untouched rows for
    stale."""

    max_threshold: float | None = 0.1
    """Upper end of the search, above 0; None: the largest movement. With ``per_table`` it has none."""

    movement: str = "plain"
    """How far a row moved, ``"plain"`` (as published), over its touches (``"per_touch"``), or over its size
    (``"relative"``)."""

    per_table: bool = False
    """A threshold for each table, below which the same share of its look-ups is."""

    def __post_init__(self) -> None:
        if self.hot_bytes is not None:
            object.__setattr__(self, "hot_bytes", memory("hot_bytes", self.hot_bytes))
        for name in ("start", "again"):
            within(name, getattr(self, name), 0)
        for name in ("snapshot_steps", "min_touches"):
            within(name, getattr(self, name), 1)
        for name in ("sample_share", "search_window"):
            within(name, getattr(self, name), 0.0, 1.0)
        if self.stale_lookups is not None:
            within("stale_lookups", self.stale_lookups, 1)
        for name in ("each_table", "per_table"):
            boolean(name, getattr(self, name))
        one_of("movement", self.movement, MOVEMENTS)
        if self.sample_share == 0.0:
            raise ConfigError("sample_share=0 keeps no sample for the search; give more than 0")
        if self.max_threshold is not None:
            finite("max_threshold", self.max_threshold, 0.0, open_start=True, otherwise=", or None for no end")
        if self.snapshot_share is not None:
            within("snapshot_share", self.snapshot_share, 0.0, 1.0)
            if self.snapshot_share == 0.0:
                raise ConfigError("snapshot_share=0 leaves no step between the snapshots; give more than 0")
        elif 0 < self.again <= self.snapshot_steps:
            raise ConfigError(f"again={self.again} must be 0, or more than snapshot_steps={self.snapshot_steps}")


@dataclass(frozen=True, kw_only=True)
class FaeInputs:
    """What ``method="fae"`` goes by (arXiv 2103.00686).

    Raises:
        ConfigError: a value is out of its range or of another type; the message names field, value and range.
    """

    hot_bytes: int | str | None = None
    """Bytes for hot rows with their optimizer state, such as ``"256MiB"`` (the artefact's): those of most look-ups a
    byte in the ``profile`` given to ``Slipstream.inputs``. None: the hot rows are those of the ``calibration`` given
    there, or of the session's overlays, which they then follow through re-plans."""

    window: int = 100
    """Input batches a rank that are read, and held in memory, before the first of them go out, at least 1. FAE's is an
    epoch."""

    rate: float = 50.0
    """Percent of a window's batches of a kind that go out at a turn, at first, in ``[1, 100]``."""

    patience: int = 4
    """Falls of the test loss in a row that double the rate, at least 1; it is halved when the loss does not fall.
    Without a ``test_loss`` it stays."""

    def __post_init__(self) -> None:
        if self.hot_bytes is not None:
            object.__setattr__(self, "hot_bytes", memory("hot_bytes", self.hot_bytes))
        within("window", self.window, 1)
        within("rate", self.rate, 1.0, 100.0)
        within("patience", self.patience, 1)


@dataclass(frozen=True, kw_only=True)
class InputsConfig:
    """Which samples are trained on, and in which order. For batches that come through ``Slipstream.inputs``.

    Raises:
        ConfigError: a value is out of its range or of another type; the message names field, value and range.
    """

    method: str = "off"
    """What becomes of the samples. What each method costs in quality and saves in time: ``benchmarks/inputs.py``. All
    are experimental but ``"thinning"``, which is measured to beat its controls on data with few positives.

    * ``"off"``: all samples, in the loader's own batches.
    * ``"thinning"`` (ours): negatives (labels up to 0.5) are dropped at random and those kept count once; add
      ``InputReport.logit_shift`` to the logits afterwards. For one label a sample, as it is the shift of one task. See
      ``positive_weight`` as well. It puts together what is known of rare events: G. King and L. Zeng, Logistic
      Regression in Rare Events Data, 2001, and X. He et al., Practical Lessons from Predicting Clicks on Ads at
      Facebook, 2014, section 6.3.
    * ``"negatives"``, a control: the same, but each kept negative counts for those dropped.
    * ``"random"``, a control that a method must beat: samples are dropped by chance.
    * ``"slipstream"`` (Slipstream's): hot samples that look up nothing but stale rows are dropped. Best with
      ``StalenessConfig(target_share=0)``: a row whose update was left out has not moved, and so looks stale.
    * ``"fae"`` (FAE's): none are dropped; those that look up nothing but hot rows go into batches of their own.
      ``Slipstream.inputs`` takes a ``test_loss`` for it."""

    drop_share: float = 0.3
    """Share of the samples that a dropping method drops, in ``[0, 1)``. The papers' artefact has 0.3."""

    seed: int = 0
    """Of what is drawn. Ranks and epochs draw differently by themselves."""

    weigh: bool | None = None
    """Of ``"random"`` and ``"negatives"``: whether a kept sample counts for the dropped ones like it. Batches then come
    as ``WeightedBatch``, and the loss of sample i has to be multiplied by ``batch.weights[i]``. None: as the method has
    it (``"negatives"`` does, ``"random"`` does not)."""

    min_probability: float = 0.1
    """Of ``"thinning"`` and ``"negatives"``: least probability of a negative to be kept, in ``(0, 1]``; its inverse
    bounds the weights, or the factor between the odds learnt and the true ones."""

    positive_weight: float | str = 1.0
    """Of ``"thinning"``: what the loss of a positive counts for, at least 1 and finite; or ``"auto"``: up to 4, as far
    as the positives then have at most a sixth of the kept samples' weight, and else 1. Other than 1, batches come as
    ``WeightedBatch``, and ``logit_shift`` takes it off the logits again: rare positives have their say early, as
    dropping yet more negatives would give them. It helps where positives are few (3% of the Criteo impressions, with
    nothing dropped as well), and not where they are many: ``benchmarks/inputs.py``."""

    slipstream: SlipstreamInputs = field(default_factory=SlipstreamInputs)
    """What ``"slipstream"`` goes by besides."""

    fae: FaeInputs = field(default_factory=FaeInputs)
    """What ``"fae"`` goes by."""

    def __post_init__(self) -> None:
        one_of("method", self.method, INPUT_METHODS)
        instance("slipstream", self.slipstream, SlipstreamInputs)
        instance("fae", self.fae, FaeInputs)
        within("drop_share", self.drop_share, 0.0, 1.0, open_end=True)
        within("seed", self.seed, 0)
        within("min_probability", self.min_probability, 0.0, 1.0)
        if self.min_probability == 0.0:
            raise ConfigError("min_probability=0 would let a kept sample stand for infinitely many; give more than 0")
        weight = self.positive_weight
        if weight != "auto":
            finite("positive_weight", weight, 1.0, otherwise=", or 'auto'")
        if weight != 1.0 and self.method not in ("off", "thinning"):
            raise ConfigError(
                f"positive_weight={weight!r} is of method='thinning', not of {self.method!r}; leave it at 1"
            )
        if self.weigh is not None:
            boolean("weigh", self.weigh)
        if self.weigh and self.method not in ("off", "random", "negatives"):
            raise ConfigError(
                f"weigh=True with method={self.method!r}, which weighs no sample; weighed thinning is "
                "method='negatives'"
            )
