"""Every knob, with its unit, its default and where it comes from. One frozen dataclass a room."""

from __future__ import annotations

from dataclasses import dataclass, field

from torchrec_slipstream.budget import parse_bytes
from torchrec_slipstream.errors import ConfigError

SIGNALS = ("auto", "gain", "movement", "drift")
SELECTIONS = ("sampling", "duty", "threshold")
COUNTERS = ("exact", "sampled", "sketch", "off")
MOVEMENTS = ("plain", "per_touch", "relative")
INPUT_METHODS = ("off", "random", "negatives", "thinning", "slipstream", "fae")
_SEARCHES = ("quantile", "bisection")
_DTYPES = ("float32", "float16")


@dataclass(frozen=True, kw_only=True)
class StalenessConfig:
    """Which rows have stopped moving, and how much of their updating is left out.

    Raises:
        ConfigError: a value is out of its range; the message names the field, the value and the range.
    """

    target_share: float = 0.5
    """Share of all look-ups whose update is left out after the warm-up, in ``[0, 1)``. The papers' artefact aims at
    0.3 of the inputs; see ``benchmarks/convergence.py`` for what each share costs."""

    warmup_steps: int = 100
    """Steps before the first update is left out, counted from attach. Rows must have trained to be stale."""

    interval: int = 50
    """Steps between two decisions. Everything is decided here; between two decisions a step only gathers."""

    selection: str = "sampling"
    """Which look-ups of trained rows are left out. ``"sampling"`` (ours): each is kept with a probability
    proportional to the size of the gradient that reaches it, and then counts for its inverse, so that the expected
    update is the full one. ``"duty"`` (ours): a row is live in a fraction of the steps proportional to its signal, so
    the settled ones are thawed rarely. ``"threshold"`` (Slipstream's): rows whose signal is below a threshold are
    stale through the interval, and thaw in turn. What each costs in quality: ``benchmarks/convergence.py``."""

    min_probability: float = 0.02
    """Under ``"sampling"``, the least probability of a look-up to be kept, in ``(0, 1]``; its inverse bounds how
    many look-ups a kept one may stand for."""

    tail_share: float = 0.0
    """Under ``"sampling"``, prefer look-ups that cost more time. The look-ups of a popular row share one row update in
    a batch, those of a rare row have one each, so the least popular trained rows are sampled first, with up to this
    share of their look-ups left out, and the popular ones stay live as far as the target allows. In ``[0, 1)``; 0
    samples the look-ups of all trained rows alike. On Criteo 0.75 cost nothing, and half of the look-ups saved 34% of
    an embedding-bound step instead of 20%; on synthetic data whose rare rows were still learning it cost 0.005 AUC,
    hence the default."""

    signal: str = "auto"
    """Under ``"duty"`` and ``"threshold"``, how far a row is from having settled, smaller is staler: ``"gain"`` (what
    the optimizer gained a look-up, ours, needs the Adagrad family), ``"movement"`` (largest movement of a dimension a
    touch, Slipstream's), ``"drift"`` (displacement over a random walk of the same steps, needs the Adagrad family),
    or ``"auto"`` ("gain" where the optimizer allows it, else "movement")."""

    min_touches: int = 5
    """Look-ups that a row needs before it can be stale. Guards against the artefact's trap of calling rows stale that
    were never trained. At least 1."""

    min_duty: float = 0.0
    """Smallest fraction of steps in which a stale row is live under ``"duty"``, in ``[0, 1)``."""

    max_table_share: float = 0.9
    """Largest share of one table's look-ups that may be left out, in ``(0, 1]``: no table is skipped whole."""

    normalise_tables: bool = False
    """Divide each table's signal by its mean over the table's look-ups, so that tables give alike and none is
    starved. Off: rows of all tables compete by their signal alone."""

    search: str = "quantile"
    """How ``"threshold"`` finds its threshold: ``"quantile"`` (exact, by radix selection) or ``"bisection"`` (the
    artefact's: at most 25 halvings, stop within ``search_window`` of the target)."""

    search_window: float = 0.02
    """Half width of the accepted share round the target for ``"bisection"``. The artefact has 0.08 for Criteo and
    0.02 for Taobao."""

    thaw_every: int = 4
    """Under ``"threshold"``, a stale row is thawed for one interval in this many, a different part of the rows each
    interval. At least 2."""

    rate_decay: float = 0.5
    """Weight of the past in a row's look-up rate at each decision, in ``[0, 1)``."""

    memory_bytes: int = 256 * 2**20
    """Bytes for the state of rows that may be stale (34 a row, plus a snapshot of its weights where the signal needs
    one). The most-touched rows come first; the others stay live. Besides, 1 byte for every row of every counted table
    (and 4 for its count, see :class:`AccessConfig`)."""

    snapshot_dtype: str = "float32"
    """``"float32"`` or ``"float16"``: in which dtype snapshots are kept."""

    exclude_tables: tuple[str, ...] = ()
    """Names of tables whose updates are never left out; data-parallel tables must be named here. A TBE that holds no
    other table is not attached to at all, so its look-ups are not counted either."""

    def __post_init__(self) -> None:
        _within("target_share", self.target_share, 0.0, 1.0, open_end=True)
        _within("warmup_steps", self.warmup_steps, 0)
        _within("interval", self.interval, 1)
        _within("min_touches", self.min_touches, 1)
        _within("min_probability", self.min_probability, 0.0, 1.0)
        _within("tail_share", self.tail_share, 0.0, 1.0, open_end=True)
        _within("min_duty", self.min_duty, 0.0, 1.0, open_end=True)
        _within("max_table_share", self.max_table_share, 0.0, 1.0)
        _within("search_window", self.search_window, 0.0, 1.0)
        _within("thaw_every", self.thaw_every, 2)
        _within("rate_decay", self.rate_decay, 0.0, 1.0, open_end=True)
        _within("memory_bytes", self.memory_bytes, 0)
        _one_of("signal", self.signal, SIGNALS)
        _one_of("selection", self.selection, SELECTIONS)
        _one_of("search", self.search, _SEARCHES)
        _one_of("snapshot_dtype", self.snapshot_dtype, _DTYPES)
        object.__setattr__(self, "exclude_tables", _names("exclude_tables", self.exclude_tables))
        if self.min_probability == 0.0:
            raise ConfigError("min_probability=0 would let a kept look-up stand for infinitely many; give more than 0")
        if self.max_table_share == 0.0:
            raise ConfigError("max_table_share=0 leaves nothing to skip; set target_share=0 to switch skipping off")


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """How the look-ups of training steps are counted. One count serves the access profile and staleness.

    Raises:
        ConfigError: a value is out of its range; the message names the field, the value and the range.
    """

    counter: str = "sampled"
    """``"exact"``: every look-up, one int32 a row. ``"sampled"``: the same of one step in ``every``, taken
    ``every``-fold, which is right on average. ``"sketch"``: of those steps, a bounded list of the most looked-up rows a
    table, for tables that are too large for an int32 a row; staleness needs the count of every row, so it leaves
    sketched tables alone. ``"off"``: nothing is counted. What each costs and finds: ``benchmarks/profiler.py``."""

    every: int = 8
    """Steps of which one is counted, drawn anew in each block of so many steps (a fixed stride could move in step with
    the data) and alike on all ranks; at least 1. ``"exact"`` counts every step. To count costs some 10 ns a look-up on
    a CPU, a sketch some 300 ns a distinct row."""

    half_life: int | None = None
    """Steps after which all counts are halved, so that yesterday fades; None: never. Costs another int32 a row. Odd
    counts are rounded up or down at random, so that rare rows keep what is theirs on average."""

    sketch_tables: tuple[str, ...] = ()
    """Names of tables that get a sketch, whatever ``counter`` is (but "off"); none of their updates is left out. Needs
    ``pip install torchrec-slipstream[sketch]``. On a GPU a sketch reads the look-ups of counted steps on the host, for
    which these steps wait."""

    max_counted_rows: int | None = None
    """Tables of more rows than this (over all ranks) get a sketch as well; None: no table for its size."""

    sketch_rows: int = 12_288
    """Rows that a sketch lists at most, a table and rank; at least 768, of which it makes a multiple. A row is missed,
    and a listed one's count too small, by at most some ``2.7 / sketch_rows`` of the look-ups. Some 60 bytes each."""

    def __post_init__(self) -> None:
        _one_of("counter", self.counter, COUNTERS)
        _within("every", self.every, 1)
        if self.half_life is not None:
            _within("half_life", self.half_life, 1)
        if self.max_counted_rows is not None:
            _within("max_counted_rows", self.max_counted_rows, 0)
        _within("sketch_rows", self.sketch_rows, 768)
        object.__setattr__(self, "sketch_tables", _names("sketch_tables", self.sketch_tables))

    @property
    def scale(self) -> int:
        """Look-ups that a counted one stands for."""
        return 1 if self.counter == "exact" else self.every


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Which rows are hot, and when that changes. For tables in host memory; nothing here concerns those in HBM.

    Raises:
        ConfigError: a value is out of its range; the message names the field, the value and the range.
    """

    hbm_budget: int | str | None = None
    """Fast memory a rank for hot rows with their optimizer state, and 4 bytes for every row that could be hot: bytes,
    or a string such as ``"8GiB"``. All rows are cold at first, and the first re-plan finds the hot ones. None: hot rows
    are those of the session's ``placement``, and so is their memory; without one, there are none. Besides come 8 bytes
    of book-keeping for every row that is hot, and 12 more with re-plans. A CPU has no faster memory than its own: there
    a budget only serves to try things out."""

    replan_every: int = 0
    """Steps between two looks at the access counts, to move rows that have become hot or cold; 0: never. Needs the
    counts of all rows (``AccessConfig.counter``): best "exact" ones, as sampling one step in 8 cost one to three points
    of hit rate. Costs 8 bytes of the device's memory, besides the budget, for every row that can be hot, and some
    0.1 µs on a CPU thread for every row that was ever looked up. ``benchmarks/replan.py`` shows what is best where; a
    few thousand samples a re-plan are a good start."""

    min_gain: float = 0.0003
    """Least gain in hit rate, as a share of all look-ups, that a re-plan must promise before rows are moved at all, in
    ``[0, 1]``."""

    hysteresis: float = 1.1
    """A cold row takes a hot one's place only if it is worth so many times as much, at least 1: this keeps rows of
    almost equal traffic from changing places for ever. 1.25 moved a quarter fewer rows, for at most 0.0005 of hit
    rate."""

    move_cost: float = 2.0
    """What moving a row costs, in look-ups of a cold row: they have to be made good in the time that a row stays hot,
    which is taken for 16 re-plans. (Training on a cold row reads and writes it over the bus; moving does one of them.)
    """

    min_age: int = 1
    """Re-plans that a row which became hot stays so, whatever its traffic; at least 1: it may go at the next."""

    max_stall_share: float | None = 0.01
    """Largest share of run time that re-plans may take, in ``(0, 1]``, to decide and to move, by measured costs: one
    moves the rows of most gain first and leaves the others to the next, and one that has not been saved up for is left
    out. (Of the first, to decide is free.) None: no limit, and runs repeat exactly, since no clock has a say."""

    chunk_bytes: int | str = "16MiB"
    """Rows are moved in parts of so many bytes, which bounds the memory that a move takes besides."""

    record_every: int = 50
    """Steps between two points of the report's hit rate over time; at least 1."""

    def __post_init__(self) -> None:
        for name in ("hbm_budget", "chunk_bytes"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_bytes(value))
        _within("replan_every", self.replan_every, 0)
        _within("min_gain", self.min_gain, 0.0, 1.0)
        _within("min_age", self.min_age, 1)
        _within("record_every", self.record_every, 1)
        for name, least in (("hysteresis", 1.0), ("move_cost", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
                raise ConfigError(f"{name}={value!r} must be a number of at least {least:g}")
        if self.max_stall_share is not None:
            _within("max_stall_share", self.max_stall_share, 0.0, 1.0)
            if self.max_stall_share == 0.0:
                raise ConfigError(
                    "max_stall_share=0 lets no row move; set replan_every=0 to move none, or None: no limit"
                )
        if self.chunk_bytes == 0:
            raise ConfigError("chunk_bytes=0 moves nothing; give the bytes of some rows at least, such as '16MiB'")
        if self.hbm_budget is not None and self.replan_every == 0:
            raise ConfigError(
                f"hbm_budget={self.hbm_budget} without replan_every: no row would ever become hot. Give replan_every, "
                "or give the session a placement instead of a budget"
            )


@dataclass(frozen=True, kw_only=True)
class InputsConfig:
    """Which samples are trained on, and in which order. For batches that come through ``Slipstream.inputs``.

    Raises:
        ConfigError: a value is out of its range; the message names the field, the value and the range.
    """

    method: str = "off"
    """``"off"``: all samples, in the loader's own batches. ``"random"``: drop samples by chance, the control that a
    method must beat. ``"negatives"``: drop negatives (labels up to 0.5) by chance, and let the kept ones count for
    them. ``"slipstream"`` (Slipstream's): drop inputs that look up nothing but stale rows. ``"fae"`` (FAE's): drop
    none, and deal those that look up nothing but hot rows into batches of their own; the hot rows are the session's
    placement's, or ``hot_bytes`` of the ``profile`` given to ``Slipstream.inputs``, which takes a ``test_loss`` too.
    What each costs in quality: ``benchmarks/convergence.py``."""

    drop_share: float = 0.3
    """Share of the samples that a dropping method drops, in ``[0, 1)``. The papers' artefact has 0.3."""

    seed: int = 0
    """Of what is drawn. Ranks and epochs draw differently by themselves."""

    weigh: bool | None = None
    """Whether a kept sample counts for the dropped ones like it: batches then come as ``WeightedBatch``, and the loss
    of sample i has to be multiplied by ``batch.weights[i]``. None: as the method has it (``"negatives"`` does,
    ``"random"`` does not)."""

    min_probability: float = 0.1
    """Least probability of a sample to be kept where methods weigh, in ``(0, 1]``; its inverse bounds the weights."""

    hot_bytes: int | str | None = None
    """Of ``"slipstream"`` and ``"fae"``: bytes for hot rows with their optimizer state, such as ``"256MiB"`` (the
    artefacts'), by the ``profile`` given to ``Slipstream.inputs``; without one, ``"slipstream"`` goes by the session's
    own counts. None: ``"slipstream"`` has all rows hot."""

    search_window: float = 0.08
    """Of ``"slipstream"``: accepted distance from ``drop_share``, which there is of the hot inputs, in ``[0, 1]``."""

    stale_lookups: int | None = None
    """Of ``"slipstream"``: stale look-ups that an input needs to be dropped, at least 1; None: all that it has."""

    each_table: bool = False
    """Of ``"slipstream"``: ``stale_lookups`` counts in every table (the artefact's Taobao run), not over all."""

    sample_share: float = 0.01
    """Of ``"slipstream"``: share of the inputs that are kept for the search, in ``(0, 1]``."""

    start: int = 0
    """Of ``"slipstream"``: the training step before which the first snapshot is taken. The artefact's runs: 1000."""

    snapshot_steps: int = 100
    """Of ``"slipstream"``: steps from the first snapshot to the second, after which the search is, at least 1."""

    again: int = 0
    """Of ``"slipstream"``: steps from a first snapshot to the next, which thaws all rows; 0: once a run, as published;
    else more than ``snapshot_steps``."""

    min_touches: int = 5
    """Of ``"slipstream"``: look-ups between the snapshots that a row needs to be stale, at least 1."""

    max_threshold: float | None = 0.1
    """Of ``"slipstream"``: upper end of the search, above 0; None: the largest movement."""

    movement: str = "plain"
    """Of ``"slipstream"``: how far a row moved, ``"plain"`` (as published), over its touches (``"per_touch"``), or over
    its size (``"relative"``)."""

    per_table: bool = False
    """Of ``"slipstream"``: a threshold for each table, below which the same share of its look-ups is."""

    window: int = 100
    """Of ``"fae"``: input batches a rank that are read, and held in memory, before the first of them go out; FAE's is
    an epoch."""

    rate: float = 50.0
    """Of ``"fae"``: percent of a window's batches of a kind that go out at a turn, at first, in ``[1, 100]``."""

    patience: int = 4
    """Of ``"fae"``: falls of the test loss in a row that double the rate, at least 1; it is halved when the loss does
    not fall. Without a ``test_loss`` it stays."""

    def __post_init__(self) -> None:
        if self.hot_bytes is not None:
            object.__setattr__(self, "hot_bytes", parse_bytes(self.hot_bytes))
        for name in ("snapshot_steps", "min_touches", "window", "patience"):
            _within(name, getattr(self, name), 1)
        _within("start", self.start, 0)
        _within("again", self.again, 0)
        _within("search_window", self.search_window, 0.0, 1.0)
        _within("sample_share", self.sample_share, 0.0, 1.0)
        _within("rate", self.rate, 1.0, 100.0)
        _one_of("movement", self.movement, MOVEMENTS)
        if self.stale_lookups is not None:
            _within("stale_lookups", self.stale_lookups, 1)
        if self.sample_share == 0.0 or (self.max_threshold is not None and not self.max_threshold > 0.0):
            raise ConfigError(
                f"sample_share={self.sample_share!r} and max_threshold={self.max_threshold!r} must be above 0"
            )
        if 0 < self.again <= self.snapshot_steps:
            raise ConfigError(f"again={self.again} must be 0, or more than snapshot_steps={self.snapshot_steps}")
        _one_of("method", self.method, INPUT_METHODS)
        _within("drop_share", self.drop_share, 0.0, 1.0, open_end=True)
        _within("seed", self.seed, 0)
        _within("min_probability", self.min_probability, 0.0, 1.0)
        if self.min_probability == 0.0:
            raise ConfigError("min_probability=0 would let a kept sample stand for infinitely many; give more than 0")
        if self.weigh not in (True, False, None):
            raise ConfigError(f"weigh={self.weigh!r} must be True, False or None (the method's own way)")


@dataclass(frozen=True, kw_only=True)
class SlipstreamConfig:
    """Configuration of a session: one part a room."""

    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    """Which updates are left out."""

    access: AccessConfig = field(default_factory=AccessConfig)
    """How look-ups are counted."""

    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Which rows are hot, and when that changes."""

    inputs: InputsConfig = field(default_factory=InputsConfig)
    """Which samples are trained on."""

    def __post_init__(self) -> None:
        if self.placement.replan_every and self.access.counter in ("sketch", "off"):
            raise ConfigError(
                f"replan_every={self.placement.replan_every} needs every row's access count, which "
                f"counter={self.access.counter!r} does not give; use counter='sampled' or 'exact'"
            )
        if self.access.counter in ("sketch", "off") and self.staleness.target_share > 0.0:
            raise ConfigError(
                f"counter={self.access.counter!r} does not count every row's look-ups, by which "
                f"target_share={self.staleness.target_share} chooses the updates to leave out. Use counter='sampled' "
                "or 'exact' (with sketch_tables for those too large), or StalenessConfig(target_share=0)."
            )


def _within(name: str, value: float, low: float, high: float | None = None, *, open_end: bool = False) -> None:
    if isinstance(low, int) and high is None:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name}={value!r} must be an integer of at least {low}")
        return
    assert high is not None
    fits = isinstance(value, (int, float)) and low <= value and (value < high if open_end else value <= high)
    if not fits or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be a number in [{low}, {high}{')' if open_end else ']'}")


def _names(name: str, value: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ConfigError(f"{name}={value!r} is a string; give a tuple of table names")
    return tuple(value)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
