"""The report on hot rows: what was predicted, what was measured, what was moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from math import isnan
from pathlib import Path
from typing import Any

from torchrec_slipstream.budget import format_bytes


@dataclass(frozen=True)
class TableHits:
    """One logical table over all its shards and ranks; column shards each count the rows and look-ups they see.

    ``hits`` of the ``lookups`` (of training steps) found their row in fast memory, where ``hot_rows`` of the ``rows``
    are now, in ``hot_bytes``. ``predicted`` is the placement's hit rate; None where there was none.
    """

    rows: int
    hot_rows: int
    hot_bytes: int
    lookups: int
    hits: int
    predicted: float | None

    def __add__(self, other: TableHits) -> TableHits:
        mine, theirs = asdict(self), asdict(other)
        return TableHits(**{n: mine[n] + theirs[n] for n in mine if n != "predicted"}, predicted=self.predicted)

    @property
    def hit_rate(self) -> float:
        """Share of the look-ups that found their row in fast memory, from attach on."""
        return self.hits / self.lookups if self.lookups else float("nan")


@dataclass(frozen=True)
class HitPoint:
    """Look-ups and hits from attach until ``step``."""

    step: int
    lookups: int
    hits: int

    def __add__(self, other: HitPoint) -> HitPoint:
        return HitPoint(self.step, self.lookups + other.lookups, self.hits + other.hits)


@dataclass(frozen=True)
class Replan:
    """One look at the access counts.

    ``gain`` is the promised rise of the hit rate; ``moved`` whether it was worth the moving of ``demoted`` and
    ``promoted`` rows, ``bytes`` of them; ``seconds`` to decide and to move, on the slowest rank; ``left_out`` the looks
    after this one, and before the next, that ``max_stall_share`` did not allow.
    """

    step: int
    gain: float
    moved: bool
    demoted: int
    promoted: int
    bytes: int
    seconds: float
    left_out: int = 0

    def __add__(self, other: Replan) -> Replan:
        return replace(
            self,
            demoted=self.demoted + other.demoted,
            promoted=self.promoted + other.promoted,
            bytes=self.bytes + other.bytes,
            seconds=max(self.seconds, other.seconds),
        )


@dataclass(frozen=True)
class PlacementReport:
    """What became of the hot rows. ``str()`` is for people, :meth:`to_dict` for programs.

    Attributes:
        tables: by name.
        points: the hit rate over time; of a long run not every one that was recorded.
        replans: every look at the counts.
        hbm_bytes: of the overlays and slot words, over all ranks; ``predicted_bytes`` those of the placement, ``None``
            where a budget was given instead.
        predicted_hit_rate, predicted_ms: of the placement: a step's embedding part on the slowest device. No time
            (``None``, nan is taken for it) where the memory that was planned with is only simulated, as on a CPU.
        step_ms: measured mean time of a whole step, the dense part included.
        seconds: since attach, or since a state was loaded, which was after ``first_step`` steps; ``step_ms`` and
            ``stall_share`` are of that time.
    """

    tables: Mapping[str, TableHits]
    points: Sequence[HitPoint] = field(repr=False)
    replans: Sequence[Replan] = field(repr=False)
    hbm_bytes: int
    predicted_bytes: int | None
    predicted_hit_rate: float | None
    predicted_ms: float | None
    step_ms: float
    seconds: float
    first_step: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "predicted_ms", _known(self.predicted_ms))

    @property
    def total(self) -> TableHits:
        """All tables together."""
        return reduce(TableHits.__add__, self.tables.values(), TableHits(0, 0, 0, 0, 0, self.predicted_hit_rate))

    @property
    def moved_rows(self) -> int:
        """Rows that changed places in re-plans, both ways."""
        return sum(one.demoted + one.promoted for one in self.replans)

    @property
    def left_out(self) -> int:
        """Re-plans that did not take place, as ``PlacementConfig.max_stall_share`` did not allow the time."""
        return sum(one.left_out for one in self.replans)

    @property
    def stall_share(self) -> float:
        """Share of run time for which training waited for re-plans, to decide and to move."""
        return self.stall_seconds / max(self.seconds, 1e-9)

    @property
    def stall_seconds(self) -> float:
        """For how long training waited for re-plans, in ``seconds``."""
        return sum(one.seconds for one in self.replans if one.step > self.first_step)

    def hit_rates(self) -> list[tuple[int, float]]:
        """For each recorded step, the hit rate since the one before."""
        rates, before = [], HitPoint(0, 0, 0)
        for point in self.points:
            lookups = point.lookups - before.lookups
            if lookups:
                rates.append((point.step, (point.hits - before.hits) / lookups))
            before = point
        return rates

    def plot(self, path: str | Path) -> None:
        """Draw the hit rate over steps, re-plans marked, and write it as a picture; the ending says which kind.

        Raises:
            SlipstreamError: matplotlib is missing; ``pip install matplotlib``.
        """
        from torchrec_slipstream.report.hit_rate_plot import draw

        draw(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for JSON; None where there were no look-ups to take a share of."""
        total = self.total
        return {
            "hit_rate": _known(total.hit_rate),
            "predicted_hit_rate": _known(self.predicted_hit_rate),
            "hbm_bytes": self.hbm_bytes,
            "predicted_bytes": self.predicted_bytes,
            "step_ms": self.step_ms,
            "predicted_ms": self.predicted_ms,
            "seconds": self.seconds,
            "first_step": self.first_step,
            "moved_rows": self.moved_rows,
            "left_out": self.left_out,
            "stall_share": self.stall_share,
            "tables": {
                name: asdict(table) | {"hit_rate": _known(table.hit_rate), "predicted": _known(table.predicted)}
                for name, table in self.tables.items()
            },
            "points": [asdict(point) for point in self.points],
            "replans": [asdict(one) for one in self.replans],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PlacementReport:
        """The report that :meth:`to_dict` wrote."""
        names = [one.name for one in fields(TableHits)]
        plain = [one.name for one in fields(PlacementReport) if one.name not in ("tables", "points", "replans")]
        return PlacementReport(
            tables={key: TableHits(**{n: table[n] for n in names}) for key, table in values["tables"].items()},
            points=[HitPoint(**point) for point in values["points"]],
            replans=[Replan(**one) for one in values["replans"]],
            **{name: values[name] for name in plain},
        )

    def __str__(self) -> str:
        width = max([len(name) for name in self.tables] + [len("all tables")])
        columns = f"{'rows':>11}  {'hot':>11}  {'memory':>9}  {'look-ups':>13}  {'hits':>7}  {'predicted':>9}"
        head = f"{'table':<{width}}  {columns}"
        lines = [head, "-" * len(head)]
        for name, t in [*self.tables.items(), ("all tables", self.total)]:
            hits, predicted = (_percent(_known(rate)) for rate in (t.hit_rate, t.predicted))
            lines.append(
                f"{name:<{width}}  {t.rows:>11,}  {t.hot_rows:>11,}  {format_bytes(t.hot_bytes):>9}  {t.lookups:>13,}  "
                f"{hits:>7}  {predicted:>9}"
            )
        lines.append("")
        memory = f"the overlays' fast memory for hot rows and slot words: {format_bytes(self.hbm_bytes)}"
        if self.predicted_bytes is not None:
            memory += f" (planned {format_bytes(self.predicted_bytes)})"
        lines.append(memory)
        step = f"a whole step took {self.step_ms:.2f} ms"
        if self.predicted_ms is not None:
            step += f" (planned for its embedding part: {self.predicted_ms:.3g} ms)"
        lines.append(step)
        if self.replans:
            moved = [one for one in self.replans if one.moved]
            lines.append(
                f"{len(self.replans)} re-plans, {len(moved)} of them moved rows: {self.moved_rows:,} rows, "
                f"{format_bytes(sum(one.bytes for one in moved))}, {self.stall_seconds:.2f} s "
                f"({self.stall_share:.2%} of the run)"
                + (f"; {self.left_out:,} left out by the limit max_stall_share" if self.left_out else "")
            )
        rates = self.hit_rates()
        if len(rates) > 1:
            shown = rates[:: max(1, len(rates) // 8)]
            lines.append("hit rate at step " + ", ".join(f"{step:,}: {rate:.1%}" for step, rate in shown))
        return "\n".join(lines)


def _known(rate: float | None) -> float | None:
    return None if rate is None or isnan(rate) else rate


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"
