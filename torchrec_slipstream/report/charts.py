"""What a page shows of runs as charts; each function gives HTML figures, none where there is nothing to show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torchrec_slipstream.budget import format_bytes
from torchrec_slipstream.report import svg
from torchrec_slipstream.report.html import figure
from torchrec_slipstream.report.placement import PlacementReport
from torchrec_slipstream.report.record import RunRecord
from torchrec_slipstream.report.report import Report

MOST_TABLES = 30
_MOST_POINTS = 600
_MOST_COLUMNS = 120
# Of a test, not about how good the model is; and the log-loss in another unit.
_NO_METRIC = ("step", "samples", "samples_seen", "seconds", "ctr", "normalized_entropy")
_WHOLE_STEP = ("p20", "median", "p80")
_TITLES = {"auc": "AUC on the test samples", "log_loss": "Log-loss on the test samples"}
_SPREADS = {
    "lookups": ("Look-ups of a row", "rows by how often each was looked up, as counted; rows without a count left out"),
    "gradient": (
        "Gradients of samples",
        "samples by the size of their gradient, in means of their batch, in the steps before the last decision; the "
        "look-ups of stale rows are kept in proportion to it",
    ),
    "movement": ("Movement of rows", "rows that may be stale, by largest movement of a dimension a touch"),
    "gain": ("What rows still gain", "rows that may be stale, by what the optimizer gained a look-up"),
    "drift": ("Drift of rows", "rows that may be stale, by displacement over a random walk of the same steps"),
}


def quality(runs: Sequence[RunRecord]) -> list[str]:
    """Metrics over steps, a line a run: AUC and log-loss first."""
    names = {name: None for run in runs for entry in run.history for name in entry if name not in _NO_METRIC}
    figures = []
    for name in sorted(names, key=lambda one: [*_TITLES, one].index(one)):
        drawn, legend = [], []
        for i, run in enumerate(runs):
            points = [(step(entry), value) for entry in run.history if (value := entry.get(name)) is not None]
            if points:
                drawn.append(svg.Line(run.name, _thin(points), i))
                legend.append((run.name, svg.COLOURS[i % len(svg.COLOURS)]))
        best = {run.best_possible[name] for run in runs if name in run.best_possible}
        if drawn and len(best) == 1:
            steps = [x for line in drawn for x, _ in line.points]
            drawn.append(svg.Line("best possible", [(min(steps), level := best.pop()), (max(steps), level)], 0, True))
            legend.append(("best possible on these data", svg.GREY))
        if drawn:
            title = _TITLES.get(name, name)
            chart = svg.lines(title, drawn, bounds=(None, None))
            figures.append(figure(title, chart, legend, "the axis does not begin at 0"))
    return figures


def over_time(runs: Sequence[RunRecord]) -> list[str]:
    """Hit rate, and share of the look-ups left out, over steps, a line a run."""
    figures = []
    hits, shares = [], []
    marks: list[tuple[float, str]] = []
    for i, run in enumerate(runs):
        if run.report is None:
            continue
        placed = run.report.placement
        if placed is not None and (rates := placed.hit_rates()):
            hits.append(svg.Line(run.name, _thin(rates), i))
            if placed.predicted_hit_rate is not None:
                planned = [(rates[0][0], placed.predicted_hit_rate), (rates[-1][0], placed.predicted_hit_rate)]
                hits.append(svg.Line(f"{run.name}, planned", planned, i, True))
            marks += [
                (one.step, f"{run.name}, step {one.step:,}: re-plan moved rows") for one in placed.replans if one.moved
            ]
        # At the first decision nothing had been left out that could be measured.
        if points := [(one.step, one.measured_share) for one in run.report.decisions[1:]]:
            shares.append(svg.Line(run.name, _thin(points), i))
            shares.append(
                svg.Line("target", [(x, run.report.target_share) for x, _ in (points[0], points[-1])], i, True)
            )
    if hits:
        title = "Hit rate over steps"
        note = "look-ups that found their row in fast memory, since the point before"
        planned_too = [("planned", svg.GREY)] if any(line.reference for line in hits) else []
        moved = [("tick: re-plan moved rows", svg.GREY)] if marks else []
        chart = svg.lines(title, hits, show=svg.percent, hover=svg.share, bounds=(0.0, 1.0), marks=marks[:_MOST_POINTS])
        figures.append(figure(title, chart, [*_legend(hits), *planned_too, *moved], note))
    if shares:
        title = "Updates left out, over steps"
        note = "share of the look-ups, since skipping began, in steps and tables that leave out, as of each decision"
        chart = svg.lines(title, shares, show=svg.percent, hover=svg.share, bounds=(0.0, None))
        figures.append(figure(title, chart, [*_legend(shares), ("target", svg.GREY)], note))
    return figures


def step_parts(runs: Sequence[RunRecord]) -> list[str]:
    """A step's time by part, a bar a run."""
    parts = {part: None for run in runs for part in run.step_ms if part not in _WHOLE_STEP}
    colours = dict(zip(parts, (svg.COLOURS[i % len(svg.COLOURS)] for i in range(len(parts))), strict=True))
    drawn = []
    for run in runs:
        mine = [(ms, colours[part], f"{part} {ms:.2f} ms") for part in parts if (ms := run.step_ms.get(part, 0.0)) > 0]
        if not mine and (whole := run.step_ms.get("median")):
            mine = [(whole, svg.GREY, f"a whole step, median {whole:.2f} ms")]
        if mine:
            drawn.append(svg.Bar(run.name, mine, f"{sum(ms for ms, *_ in mine):.2f} ms"))
    if not drawn:
        return []
    title = "A step's time by part"
    note = "medians of the parts, without warm-up: they need not add up to a median step"
    chart = svg.bars(title, drawn, show=lambda ms: f"{svg.number(ms)} ms")
    return [figure(title, chart, list(colours.items()), note)]


def skipping(report: Report) -> list[str]:
    """What was left out by table, and how many rows were stale over time."""
    figures = []
    if any(table.skipped for table in report.tables.values()):
        title = "Updates left out, by table"
        shown, note = busiest({name: table.lookups for name, table in report.tables.items()})
        drawn = [
            svg.Bar(
                label,
                [(table.skipped_share, svg.COLOURS[0], f"{table.skipped:,} of {table.lookups:,} look-ups")],
                svg.share(table.skipped_share),
            )
            for name, label in shown.items()
            for table in [report.tables[name]]
        ]
        chart = svg.bars(title, drawn)
        figures.append(figure(title, chart, [], f"share of each table's look-ups, warm-up included{note}"))
        title = "Rows: stale, live, untouched"
        kinds = (("stale", svg.COLOURS[0]), ("live, with a count", svg.COLOURS[4]), ("without a count", svg.LIGHT))
        drawn = []
        for name, label in shown.items():
            table = report.tables[name]
            live = max(0, table.touched_rows - table.stale_rows)
            rows = (table.stale_rows, live, table.rows - table.stale_rows - live)
            told = [
                (count / max(1, table.rows), colour, f"{count:,} of {table.rows:,} rows {kind}")
                for count, (kind, colour) in zip(rows, kinds, strict=True)
            ]
            drawn.append(svg.Bar(label, told, svg.number(table.rows)))
        chart = svg.bars(title, drawn, most=1.0)
        figures.append(figure(title, chart, kinds, f"at the end of the run; at the right, the table's rows{note}"))
    if any(one.pool_rows for one in report.decisions):
        title = "Stale rows over steps"
        counted = [("may be stale", "pool_rows"), ("stale", "stale_rows"), ("thawed", "thawed_rows")]
        if all(one.pool_rows == one.stale_rows for one in report.decisions):
            counted[:2] = [("stale: all that may be", "stale_rows")]
        lines = [
            svg.Line(name, _thin([(one.step, getattr(one, key)) for one in report.decisions]), i)
            for i, (name, key) in enumerate(counted)
            if any(getattr(one, key) for one in report.decisions)
        ]
        note = "rows as of each decision; a stale row has been trained, and its updates have little left to gain"
        figures.append(figure(title, svg.lines(title, lines), _legend(lines), note))
    return figures


def hot_rows(report: PlacementReport) -> list[str]:
    """Predicted against measured hit rates by table, and what re-plans moved."""
    figures = []
    held = {name: table.lookups for name, table in report.tables.items() if table.lookups}
    if held:
        title = (
            "Hit rate by table" if report.predicted_hit_rate is None else "Hit rate by table, predicted and measured"
        )
        shown, note = busiest(held)
        drawn = []
        for name, label in shown.items():
            table = report.tables[name]
            told = f"{table.hits:,} of {table.lookups:,} look-ups, {table.hot_rows:,} of {table.rows:,} rows hot"
            mark = None if table.predicted is None else (table.predicted, f"predicted {svg.share(table.predicted)}")
            drawn.append(svg.Bar(label, [(table.hit_rate, svg.COLOURS[0], told)], svg.share(table.hit_rate), mark))
        legend = [("measured", svg.COLOURS[0])]
        legend += [("tick: predicted", "#1a1a1a")] if any(bar.mark for bar in drawn) else []
        chart = svg.bars(title, drawn, most=1.0)
        figures.append(figure(title, chart, legend, f"of training's look-ups, from attach on{note}"))
    if any(one.moved for one in report.replans):
        title = "Rows moved by re-plans"
        columns = []
        size = -(-len(report.replans) // _MOST_COLUMNS)
        for begin in range(0, len(report.replans), size):
            part = report.replans[begin : begin + size]
            up, down, moved = (sum(getattr(one, key) for one in part) for key in ("promoted", "demoted", "bytes"))
            waited = sum(one.seconds for one in part)
            steps = f"step {part[0].step:,}" + (f" to {part[-1].step:,}" if size > 1 else "")
            said = f"{steps}: {up:,} promoted, {down:,} demoted, {format_bytes(moved)}, {1e3 * waited:.1f} ms"
            columns.append(svg.Column(part[-1].step, up, down, said))
        legend = [("promoted into fast memory", svg.COLOURS[0]), ("demoted", svg.COLOURS[1])]
        note = f"{len(report.replans)} looks at the counts" + (f", {size} to a column" if size > 1 else "")
        figures.append(figure(title, svg.columns(title, columns), legend, note))
    return figures


def spreads(report: Report) -> list[str]:
    """How rows and samples are spread over what the choice goes by; where nothing is chosen, over look-ups alone."""
    figures = []
    for name, octaves in report.spread.items():
        if not octaves.total or (name != "lookups" and not report.target_share):
            continue
        title, note = _SPREADS.get(name, (name, ""))
        edges = [2.0 ** (octaves.lowest + i) for i in range(len(octaves.counts) + 1)]
        columns = [
            svg.Column(i, count, 0.0, f"{edges[i]:.3g} to below {edges[i + 1]:.3g}: {count:,} of {octaves.total:,}")
            for i, count in enumerate(octaves.counts)
        ]
        names = [_octave(octaves.lowest + i) for i in range(len(octaves.counts))]
        figures.append(
            figure(
                title,
                svg.columns(title, columns, names=names),
                [],
                f"{note}; a column an octave, from the number below it",
            )
        )
    return figures


def busiest(lookups: Mapping[str, int], kind: str = "tables") -> tuple[dict[str, str], str]:
    """Of tables, or of another ``kind``, the names with the most look-ups in order of their names, each with what to
    call it; and a remark."""
    most = sorted(lookups, key=lambda name: -lookups[name])[:MOST_TABLES]
    shown = {name: label for name, label in short_names(list(lookups)).items() if name in most}
    left = len(lookups) - len(most)
    return shown, f"; the {MOST_TABLES} of {len(lookups)} {kind} with the most look-ups" if left else ""


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Without the modules that all names begin with, in natural order: t_2 before t_10."""
    prefix = 0
    if len(names) > 1:
        parts = [name.split(".")[:-1] for name in names]
        while all(len(one) > prefix and one[prefix] == parts[0][prefix] for one in parts):
            prefix += 1
    short = {name: ".".join(name.split(".")[prefix:]).lstrip(".") or name for name in names}
    return dict(sorted(short.items(), key=lambda item: _natural(item[1])))


def step(entry: Mapping[str, float | None]) -> float:
    """The step of a history entry, which the record has checked."""
    return float(entry["step"] or 0)


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.findall(r"[0-9]+|[^0-9]+", name)]


def _octave(exponent: int) -> str:
    """A power of two: 1/8, 4, 16k (which is 16,384)."""
    if exponent < 0:
        return f"1/{2**-exponent}" if exponent >= -12 else f"2^{exponent}"
    return svg.number(2**exponent)


def _legend(lines: Sequence[svg.Line]) -> list[tuple[str, str]]:
    return [(line.name, svg.COLOURS[line.colour % len(svg.COLOURS)]) for line in lines if not line.reference]


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most some hundreds of them, with the last."""
    every = -(-len(points) // _MOST_POINTS)
    return [*points[:-1:every], *points[-1:]]
