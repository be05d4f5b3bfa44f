"""The report of a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torchrec_slipstream.report.inputs import InputReport
from torchrec_slipstream.report.octaves import Octaves
from torchrec_slipstream.report.payoff import Payoff
from torchrec_slipstream.report.placement import PlacementReport


@dataclass(frozen=True)
class Decision:
    """What one decision of the staleness tracker found and did, over all ranks but for ``seconds``.

    ``pool_rows`` may be stale, ``stale_rows`` are; ``thawed_rows`` were until now, ``refrozen_rows`` are again after
    one interval; ``measured_share`` of the look-ups offered so far were left out, ``expected_share`` will be. Offered
    are those, since skipping began, in the steps in which a TBE leaves updates out: not a trial's other steps, nor what
    is left alone after one (``StalenessConfig.where``).

    Of a long run not every decision is kept: ``before`` says how many were between the kept one before and this, and
    ``thawed_before`` and ``refrozen_before`` sum up their rows.
    """

    step: int
    pool_rows: int
    stale_rows: int
    thawed_rows: int
    refrozen_rows: int
    measured_share: float
    expected_share: float
    seconds: float
    before: int = 0
    thawed_before: int = 0
    refrozen_before: int = 0

    def join(self, later: Decision) -> Decision:
        """The later one, standing for this one as well."""
        return replace(
            later,
            before=self.before + 1 + later.before,
            thawed_before=self.thawed_before + self.thawed_rows + later.thawed_before,
            refrozen_before=self.refrozen_before + self.refrozen_rows + later.refrozen_before,
        )


@dataclass(frozen=True)
class TableReport:
    """One logical table, over all its shards and ranks. Column shards each count the rows and look-ups they see.

    ``touched_rows`` had a look-up in a counted step (see ``AccessConfig``; of a table with a sketch, only the rows that
    it lists; none where nothing is counted), ``stale_rows`` may have look-ups left out, ``skipped`` of the ``lookups``
    were.
    """

    rows: int
    stale_rows: int
    touched_rows: int
    lookups: int
    skipped: int

    def __add__(self, other: TableReport) -> TableReport:
        return TableReport(**{name: value + getattr(other, name) for name, value in asdict(self).items()})

    @property
    def skipped_share(self) -> float:
        """Share of the look-ups whose update was left out, from attach on."""
        return self.skipped / max(1, self.lookups)


@dataclass(frozen=True)
class Report:
    """What a session did. ``str()`` is a table for people, :meth:`to_dict` the same for programs.

    ``placement`` is what became of the hot rows; None where none had an overlay. ``inputs`` is what became of the
    samples; None where the session chose none. ``payoffs`` are the TBEs of all ranks of which was measured whether
    leaving updates out makes them faster (``StalenessConfig.where``).

    ``seconds`` is wall time since attach, or since a state was loaded; ``tracker_seconds`` the part of it spent in
    decisions (snapshots, counts, search and collectives; on this rank).

    ``decisions`` are all of them up to 1,000, else some, the first and the last among them.

    ``config`` is the session's :class:`SlipstreamConfig` as plain values, empty where it is not known; ``spread`` how
    rows and samples differ in what the choice goes by, over all ranks:

    - ``"lookups"``: of each row with a count, its look-ups so far (as they fade; column shards each count the row);
    - ``"gradient"``: of each sample in the watched steps before the last decision, the size of the gradient, over its
      batch's mean (``selection="sampling"``);
    - ``"movement"``, ``"gain"`` or ``"drift"``: of each row that may be stale, the signal (other selections).
    """

    tables: dict[str, TableReport]
    steps: int
    seconds: float
    tracker_seconds: float
    target_share: float
    decisions: list[Decision] = field(repr=False)
    placement: PlacementReport | None = field(default=None, repr=False)
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    spread: Mapping[str, Octaves] = field(default_factory=dict, repr=False)
    inputs: InputReport | None = field(default=None, repr=False)
    payoffs: list[Payoff] = field(default_factory=list, repr=False)

    @property
    def total(self) -> TableReport:
        """All tables together."""
        return sum(self.tables.values(), TableReport(0, 0, 0, 0, 0))

    @property
    def measured_share(self) -> float:
        """Of the look-ups offered since skipping began (see :class:`Decision`) the share left out, as of the last
        decision; compare ``target_share``. Of all look-ups: ``total.skipped_share``."""
        return self.decisions[-1].measured_share if self.decisions else 0.0

    @property
    def decisions_made(self) -> int:
        """Decisions so far, with those that ``decisions`` does not list any more."""
        return sum(1 + one.before for one in self.decisions)

    @property
    def refreeze_rate(self) -> float | None:
        """Of the rows that were thawed as a whole, the share found stale again at the next decision.

        None where none was thawed (rows under a duty cycle are live now and then without being thawed as a whole).
        """
        thawed = sum(d.thawed_before + d.thawed_rows for d in self.decisions)
        thawed -= self.decisions[-1].thawed_rows if self.decisions else 0  # of these the next decision tells
        refrozen = sum(d.refrozen_before + d.refrozen_rows for d in self.decisions[1:])
        return refrozen / thawed if thawed else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, fit for JSON."""
        total = self.total
        return {
            "steps": self.steps,
            "seconds": self.seconds,
            "tracker_seconds": self.tracker_seconds,
            "tracker_share": self.tracker_seconds / max(self.seconds, 1e-9),
            "target_share": self.target_share,
            "measured_share": self.measured_share,
            "skipped_share": total.skipped_share,
            "refreeze_rate": self.refreeze_rate,
            "tables": {name: asdict(t) | {"skipped_share": t.skipped_share} for name, t in self.tables.items()},
            "decisions": [asdict(d) for d in self.decisions],
            "placement": self.placement.to_dict() if self.placement is not None else None,
            "config": self.config,
            "spread": {name: octaves.to_dict() for name, octaves in self.spread.items()},
            "inputs": self.inputs.to_dict() if self.inputs is not None else None,
            "payoffs": [one.to_dict() for one in self.payoffs],
        }

    def save(
        self,
        path: str | Path,
        *,
        history: Sequence[Mapping[str, float]] = (),
        step_ms: Mapping[str, float] | None = None,
    ) -> None:
        """Write the record of this run, which ``slipstream report`` makes a page of. One rank's is enough.

        Args:
            path: of the JSON file; it appears whole or not at all.
            history: metrics over time, each a ``step`` and what was measured then:
                ``{"step": 500, "auc": 0.78, "log_loss": 0.45}``. Other names are drawn as well.
            step_ms: milliseconds of a step by part, in the order to draw them, with names of your own; ``median``,
                ``p20`` and ``p80`` are those of whole steps.

        Raises:
            ConfigError: a history entry has no step, or is no number; or the path cannot be written.
        """
        from torchrec_slipstream.report.record import RunRecord

        RunRecord(report=self, history=list(history), step_ms=dict(step_ms or {})).save(path)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Report:
        """The report that :meth:`to_dict` wrote."""
        names = [f.name for f in fields(TableReport)]
        return Report(
            tables={key: TableReport(**{n: table[n] for n in names}) for key, table in values["tables"].items()},
            decisions=[Decision(**decision) for decision in values["decisions"]],
            placement=PlacementReport.from_dict(values["placement"]) if values.get("placement") else None,
            config=values.get("config", {}),
            spread={name: Octaves.from_dict(one) for name, one in values.get("spread", {}).items()},
            inputs=InputReport.from_dict(values["inputs"]) if values.get("inputs") else None,
            payoffs=[Payoff.from_dict(one) for one in values.get("payoffs", [])],
            **{name: values[name] for name in ("steps", "seconds", "tracker_seconds", "target_share")},
        )

    def _left_out(self) -> str:
        if self.payoffs and not self.total.stale_rows and not any(one.pays for one in self.payoffs):
            return "leaving updates out was tried and saved no time, so all are made"
        where = " where that saves time" if self.payoffs else ""
        return f"since skipping began {self.measured_share:.1%} of look-ups had their update left out{where}"

    def __str__(self) -> str:
        width = max([len(name) for name in self.tables] + [len("all tables")])
        head = f"{'table':<{width}}  {'rows':>11}  {'touched':>11}  {'stale':>11}  {'look-ups':>13}  {'skipped':>8}"
        of_inputs = dict(self.inputs.tables) if self.inputs is not None else {}
        if self.inputs is not None and of_inputs:  # look-ups that were dropped with their samples
            head += f"  {'dropped':>8}"
            of_inputs["all tables"] = self.inputs.lookups
        lines = [head, "-" * len(head)]
        for name, t in [*self.tables.items(), ("all tables", self.total)]:
            lines.append(
                f"{name:<{width}}  {t.rows:>11,}  {t.touched_rows:>11,}  {t.stale_rows:>11,}  "
                f"{t.lookups:>13,}  {t.skipped_share:>8.1%}"
                + (f"  {of_inputs[name].share:>8.1%}" if name in of_inputs else "")
            )
        lines.append("")
        lines.append(f"{self.steps:,} steps; {self._left_out()} (target {self.target_share:.0%})")
        lines += [str(one) for one in self.payoffs]
        if self.refreeze_rate is not None:
            lines.append(f"of the rows thawed, {self.refreeze_rate:.0%} froze again at the next decision")
        lines.append(
            f"tracker: {self.tracker_seconds:.2f} s of {self.seconds:.2f} s "
            f"({self.tracker_seconds / max(self.seconds, 1e-9):.1%}), {self.decisions_made:,} decisions"
        )
        if self.placement is not None:
            lines += ["", "hot rows", str(self.placement)]
        if self.inputs is not None:
            lines += ["", "inputs", str(self.inputs)]
        return "\n".join(lines)
