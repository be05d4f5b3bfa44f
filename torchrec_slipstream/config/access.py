"""How often is each row used?"""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_slipstream.config.checks import names, one_of, within

COUNTERS = ("exact", "sampled", "sketch", "off")


@dataclass(frozen=True, kw_only=True)
class AccessConfig:
    """How the look-ups of training steps are counted. One count serves the access profile and staleness.

    Raises:
        ConfigError: a value is out of its range or of another type; the message names field, value and range.
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
    ``pip install datasketches``. On a GPU a sketch reads the look-ups of counted steps on the host, for
    which these steps wait."""

    max_counted_rows: int | None = None
    """Tables of more rows than this (over all ranks) get a sketch as well; None: no table for its size."""

    sketch_rows: int = 12_288
    """Rows that a sketch lists at most, a table and rank; at least 768, of which it makes a multiple. A row is missed,
    and a listed one's count too small, by at most some ``2.7 / sketch_rows`` of the look-ups. Some 60 bytes each."""

    def __post_init__(self) -> None:
        one_of("counter", self.counter, COUNTERS)
        within("every", self.every, 1)
        if self.half_life is not None:
            within("half_life", self.half_life, 1)
        if self.max_counted_rows is not None:
            within("max_counted_rows", self.max_counted_rows, 0)
        within("sketch_rows", self.sketch_rows, 768)
        object.__setattr__(self, "sketch_tables", names("sketch_tables", self.sketch_tables))

    @property
    def scale(self) -> int:
        """Look-ups that a counted one stands for."""
        return 1 if self.counter == "exact" else self.every
