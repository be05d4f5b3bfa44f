"""Where should each row live?"""

from __future__ import annotations

from dataclasses import dataclass

from torchrec_slipstream.config.checks import finite, memory, within
from torchrec_slipstream.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Which rows are hot, and when that changes. For tables in host memory; nothing here concerns those in HBM.

    Raises:
        ConfigError: a value is out of its range or of another type; the message names field, value and range.
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
    """Steps between two points of the report's hit rate over time, and between two writes of the ``writer``'s scalars
    (TensorBoard's), ``skipped_share`` among them; at least 1. Of a long run, older points are thinned."""

    def __post_init__(self) -> None:
        if self.hbm_budget is not None:
            object.__setattr__(self, "hbm_budget", memory("hbm_budget", self.hbm_budget))
        object.__setattr__(self, "chunk_bytes", memory("chunk_bytes", self.chunk_bytes))
        within("replan_every", self.replan_every, 0)
        within("min_gain", self.min_gain, 0.0, 1.0)
        within("min_age", self.min_age, 1)
        within("record_every", self.record_every, 1)
        finite("hysteresis", self.hysteresis, 1.0)
        finite("move_cost", self.move_cost, 0.0)
        if self.max_stall_share is not None:
            within("max_stall_share", self.max_stall_share, 0.0, 1.0)
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
