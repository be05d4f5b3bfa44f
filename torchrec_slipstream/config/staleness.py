"""Which rows have stopped moving?"""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_slipstream.config.checks import boolean, names, one_of, within
from torchrec_slipstream.errors import ConfigError

SIGNALS = ("auto", "gain", "movement", "drift")
SELECTIONS = ("sampling", "duty", "threshold")
WHERE = ("faster", "everywhere")
_SEARCHES = ("quantile", "bisection")
_DTYPES = ("float32", "float16")


@dataclass(frozen=True, kw_only=True)
class StalenessConfig:
    """Which rows have stopped moving, and how much of their updating is left out.

    Raises:
        ConfigError: a value is out of its range or of another type; the message names field, value and range.
    """

    target_share: float = 0.5
    """Share of all look-ups whose update is left out after the warm-up, in ``[0, 1)``. The papers' artefact aims at
    0.3 of the inputs; see ``benchmarks/convergence.py`` for what each share costs."""

    warmup_steps: int = 100
    """Steps before the first update is left out, counted from attach. Rows must have trained to be stale."""

    interval: int = 50
    """Steps between two decisions. Everything is decided here; between two decisions a step only gathers. Under
    ``"sampling"`` the 16th and later ones become rarer as the run becomes longer, 8 an octave: what they would take in,
    rows that have become trained, is updated in full meanwhile."""

    where: str = "faster"
    """Of which TBEs updates are left out. ``"faster"``: of those whose forward and backward together take at least 5%
    less time so, choosing and deciding included. That is tried out in 32 steps, half of them stock, when skipping
    begins, and again after 1, 3, 7, 15 and so on further intervals, on each rank for itself; the report says what was
    measured. Until a TBE was tried, its updates are left out. What choosing costs hardly depends on the batch, what it
    saves does: small batches are left alone. As times differ from run to run, so may the model where it is a close
    call. ``"everywhere"``: of all, untimed, so that runs repeat bit for bit."""

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
    samples the look-ups of all trained rows alike. On Criteo 0.75 cost nothing, and half of the look-ups saved 26% of
    a wide embedding-bound step instead of 15%; on synthetic data whose rare rows were still learning it cost 0.005
    AUC, hence the default."""

    signal: str = "auto"
    """Under ``"duty"`` and ``"threshold"``, how far a row is from having settled, smaller is staler: ``"gain"`` (what
    the optimizer gained a look-up, ours, needs the Adagrad family), ``"movement"`` (largest movement of a dimension a
    touch, Slipstream's), ``"drift"`` (displacement over a random walk of the same steps, needs the Adagrad family),
    or ``"auto"`` ("gain" where the optimizer allows it, else "movement")."""

    min_touches: int = 5
    """Look-ups that a row needs before it can be stale. Guards against the artefact's trap of calling rows stale that
    were never trained. At least 1. A counted look-up stands for ``AccessConfig.every`` of them, so at the defaults (5,
    of 1 step in 8) a row is taken for trained once it was seen in one counted step, however rare it is otherwise; 17
    would take three counted look-ups. To have it exact, count every step (``AccessConfig(counter="exact")``)."""

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
    """Bytes for the state of rows that may be stale (33 a row, plus a snapshot of its weights where the signal needs
    one). The most-touched rows come first; the others stay live. Besides, 1 byte for every row of every counted table
    (and 4 for its count, see :class:`AccessConfig`)."""

    snapshot_dtype: str = "float32"
    """``"float32"`` or ``"float16"``: in which dtype snapshots are kept."""

    exclude_tables: tuple[str, ...] = ()
    """Names of tables whose updates are never left out; data-parallel tables must be named here. A TBE that holds no
    other table is not attached to at all, so its look-ups are not counted either."""

    def __post_init__(self) -> None:
        within("target_share", self.target_share, 0.0, 1.0, open_end=True)
        within("warmup_steps", self.warmup_steps, 0)
        within("interval", self.interval, 1)
        within("min_touches", self.min_touches, 1)
        within("min_probability", self.min_probability, 0.0, 1.0)
        within("tail_share", self.tail_share, 0.0, 1.0, open_end=True)
        within("min_duty", self.min_duty, 0.0, 1.0, open_end=True)
        within("max_table_share", self.max_table_share, 0.0, 1.0)
        within("search_window", self.search_window, 0.0, 1.0)
        within("thaw_every", self.thaw_every, 2)
        within("rate_decay", self.rate_decay, 0.0, 1.0, open_end=True)
        within("memory_bytes", self.memory_bytes, 0)
        boolean("normalise_tables", self.normalise_tables)
        one_of("where", self.where, WHERE)
        one_of("signal", self.signal, SIGNALS)
        one_of("selection", self.selection, SELECTIONS)
        one_of("search", self.search, _SEARCHES)
        one_of("snapshot_dtype", self.snapshot_dtype, _DTYPES)
        object.__setattr__(self, "exclude_tables", names("exclude_tables", self.exclude_tables))
        if self.min_probability == 0.0:
            raise ConfigError("min_probability=0 would let a kept look-up stand for infinitely many; give more than 0")
        if self.max_table_share == 0.0:
            raise ConfigError("max_table_share=0 leaves nothing to skip; set target_share=0 to switch skipping off")
