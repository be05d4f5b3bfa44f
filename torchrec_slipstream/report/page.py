"""One or several runs as one HTML page that needs nothing besides itself: no script, no network, no other file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from torchrec_slipstream.budget import format_bytes
from torchrec_slipstream.config import SlipstreamConfig
from torchrec_slipstream.report import charts, input_section
from torchrec_slipstream.report.html import table
from torchrec_slipstream.report.placement import PlacementReport
from torchrec_slipstream.report.record import RunRecord
from torchrec_slipstream.report.report import Report

_STYLE = """
body { font: 15px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1140px; margin: 24px auto; padding: 0 20px }
h1 { font-size: 25px; margin: 0 0 2px } h2 { font-size: 19px; margin: 30px 0 10px; border-bottom: 2px solid #1a1a1a }
h3 { font-size: 16px; margin: 22px 0 6px } p { margin: 4px 0 10px } .quiet, small { color: #555 }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 18px 26px }
figure { margin: 0; break-inside: avoid } figcaption small { display: block; font-size: 12.5px }
figcaption div { min-height: 20px } svg { width: 100%; height: auto; display: block }
svg text { font: 11.5px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1a1a1a }
.key { font-size: 12.5px; margin-right: 14px; white-space: nowrap }
.key i { display: inline-block; width: 11px; height: 11px; margin-right: 5px; border: 1px solid #8888 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: 2px 12px 2px 0; text-align: right; border-bottom: 1px solid #e3e6e9; vertical-align: top }
th { font-weight: 600 }
th:first-child, td:first-child, .words td, .words th { text-align: left; overflow-wrap: anywhere }
.columns { columns: 2 460px; column-gap: 26px } .columns > * { margin-bottom: 18px }
.columns h3 { margin-top: 0; break-after: avoid } tr { break-inside: avoid }
@media print { body { margin: 0; max-width: none } h2 { break-after: avoid } }
"""
_NONE = "-"
Cell = Callable[[RunRecord], str | None]


def page(runs: Sequence[RunRecord]) -> str:
    """The page of one run or more, side by side: HTML text in UTF-8."""
    names = ", ".join(run.name for run in runs)
    body = [
        f"<h1>Slipstream: {escape(names)}</h1>",
        '<p class="quiet">A hot row is one in fast memory. A stale row is a <em>trained</em> row whose updates have '
        "next to nothing left to gain (not one untouched for long). Hover over a chart for its figures.</p>",
        f'<div class="charts">{_summary(runs)}',
        *charts.quality(runs),
        *charts.over_time(runs),
        *charts.step_parts(runs),
        "</div>",
    ]
    for run in runs:
        of_run = "" if len(runs) == 1 else f": {run.name}"
        if run.report is not None and run.report.inputs is not None:
            body += [f"<h2>{escape(f'Inputs{of_run}')}</h2>", *input_section.section(run.report.inputs)]
        if run.report is not None:
            body += [f"<h2>{escape(f'Tables and rows{of_run}')}</h2>", *_details(run.report)]
    body += ["<h2>What was run</h2>", '<div class="columns">', *_settings(runs), "</div>"]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Slipstream: {escape(names)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _summary(runs: Sequence[RunRecord]) -> str:
    """The figures that a reader looks for first, a column a run."""
    rows: list[tuple[str, Cell]] = [
        ("AUC", lambda run: _last(run, "auc")),
        ("log-loss", lambda run: _last(run, "log_loss")),
        ("steps", lambda run: _of(run.report, lambda report: f"{report.steps:,}") or _fact(run, "steps")),
        ("samples a second", lambda run: _fact(run, "samples_per_second")),
        ("whole step, median ms", lambda run: f"{run.step_ms['median']:.2f}" if "median" in run.step_ms else None),
        ("updates left out, whole run", lambda run: _of(run.report, lambda one: f"{one.total.skipped_share:.1%}")),
        ("left out, in steps and tables that leave out (target)", _left_out),
        ("inputs dropped (by)", _inputs_dropped),
        ("hit rate (planned)", lambda run: _placed(run, _hit_rate)),
        ("overlays' fast memory (planned)", lambda run: _placed(run, _memory)),
        ("re-plans, those that moved rows (left out by the limit)", lambda run: _placed(run, _replans)),
        ("rows moved", lambda run: _placed(run, lambda one: f"{one.moved_rows:,}")),
        ("waited for re-plans", lambda run: _placed(run, lambda one: f"{one.stall_share:.2%}")),
        ("time in the tracker", _tracker),
    ]
    cells = [(name, [cell(run) for run in runs]) for name, cell in rows]
    shown = [[name, *(value or _NONE for value in values)] for name, values in cells if any(values)]
    return table(["", *(run.name for run in runs)], shown)


def _details(report: Report) -> list[str]:
    placed = report.placement
    figures = charts.skipping(report)
    if placed is not None:
        figures += charts.hot_rows(placed)
    figures += charts.spreads(report)
    parts = ['<div class="columns">', *figures, "</div>"]
    if placed is not None and placed.predicted_hit_rate is not None:
        parts += ["<h3>Predicted and measured</h3>", _predictions(placed)]
    if report.payoffs:
        parts += ["<h3>What leaving updates out costs and saves</h3>", _payoffs(report)]
    return [*parts, "<h3>By table</h3>", _tables(report)]


def _payoffs(report: Report) -> str:
    rows = [
        [
            *(one.names, str(one.rank), f"{one.step:,}", f"{one.stock_ms:.2f}", f"{one.skipping_ms:.2f}"),
            "left out" if one.pays else "all made",
        ]
        for one in report.payoffs
    ]
    return table(["tables of one TBE", "rank", "step", "ms with all updates", "ms with some left out", "since"], rows)


def _predictions(placed: PlacementReport) -> str:
    def line(name: str, predicted: str | None, measured: str) -> list[str]:
        return [name, predicted or _NONE, measured]

    planned = placed.predicted_hit_rate
    rows = [
        line("hit rate", None if planned is None else f"{planned:.2%}", f"{placed.total.hit_rate:.2%}"),
        line(
            "the overlays' fast memory for hot rows and slot words",
            None if placed.predicted_bytes is None else format_bytes(placed.predicted_bytes),
            format_bytes(placed.hbm_bytes),
        ),
        *(
            [line("a step's embedding part, slowest device", _ms(placed.predicted_ms), "not measured apart")]
            if placed.predicted_ms is not None
            else []
        ),
        line("a whole step, the dense part included", None, _ms(placed.step_ms) or _NONE),
    ]
    return table(["", "predicted", "measured"], rows)


def _tables(report: Report) -> str:
    placed = report.placement
    short = charts.short_names(list({**report.tables, **(placed.tables if placed is not None else {})}))
    head = ["table", "rows", "with a count", "stale", "look-ups", "left out"]
    dropped = report.inputs.tables if report.inputs is not None else {}
    head += ["dropped with samples"] if dropped else []
    head += ["hot", "memory", "hit rate"] if placed is not None else []
    head += ["predicted"] if placed is not None and placed.predicted_hit_rate is not None else []
    rows = []
    for name, label in short.items():
        one = report.tables.get(name)
        row = [label]
        if one is not None:
            row += [f"{n:,}" for n in (one.rows, one.touched_rows, one.stale_rows, one.lookups)]
            row.append(f"{one.skipped_share:.1%}")
        row += [_NONE] * (6 - len(row))
        if dropped:
            row.append(f"{dropped[name].share:.1%}" if name in dropped else _NONE)
        if placed is not None and (hits := placed.tables.get(name)) is not None:
            rate = f"{hits.hit_rate:.1%}" if hits.lookups else _NONE
            predicted = _NONE if hits.predicted is None else f"{hits.predicted:.1%}"
            row += [f"{hits.hot_rows:,}", format_bytes(hits.hot_bytes), rate, predicted]
        rows.append([*row, *[_NONE] * len(head)][: len(head)])
    name, label = next(iter(short.items()), ("", ""))
    prefix = name.removesuffix(label)
    where = f'<p class="quiet">All names begin with {escape(prefix)}</p>' if prefix else ""
    return where + table(head, rows)


def _settings(runs: Sequence[RunRecord]) -> list[str]:
    """Facts, versions and configurations, a column a run."""
    names = [run.name for run in runs]
    out = []
    for title, found in (
        ("Run", [{key.replace("_", " "): _plain(value) for key, value in run.facts.items()} for run in runs]),
        ("Versions", [dict(run.versions) for run in runs]),
        ("Configuration (what differs from the default is bold)", [_config(run.report) for run in runs]),
    ):
        keys = {key: None for one in found for key in one}
        if not keys:
            continue
        rows = [[key, *(one.get(key, _NONE) for one in found)] for key in keys]
        bold = {key for key in keys for one in found if key in one and one[key] != _DEFAULTS.get(key, one[key])}
        out.append(
            f"<section><h3>{title}</h3>{table(['', *names] if len(runs) > 1 else [], rows, 'words', bold)}</section>"
        )
    return out


def _config(report: Report | None) -> dict[str, str]:
    return _flat(report.config) if report is not None else {}


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """``room.field`` of a configuration (``room.part.field`` where a room has parts), and its value in words."""
    found: dict[str, str] = {}
    for name, value in config.items():
        inner = _flat(value) if isinstance(value, Mapping) else {}
        found |= {f"{name}.{key}": one for key, one in inner.items()} if inner else {name: _plain(value)}
    return found


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


_DEFAULTS = _flat(asdict(SlipstreamConfig()))


# ------------------------------------------------------------------------------------------------- cells of the summary


def _of(report: Report | None, cell: Callable[[Report], str | None]) -> str | None:
    return cell(report) if report is not None else None


def _placed(run: RunRecord, cell: Callable[[PlacementReport], str | None]) -> str | None:
    return cell(run.report.placement) if run.report is not None and run.report.placement is not None else None


def _last(run: RunRecord, metric: str) -> str | None:
    values = [value for entry in run.history if (value := entry.get(metric)) is not None]
    return f"{values[-1]:.4f}" if values else None


def _fact(run: RunRecord, name: str) -> str | None:
    value = run.facts.get(name)
    return f"{value:,.0f}" if isinstance(value, int | float) else None


def _left_out(run: RunRecord) -> str | None:
    report = run.report
    if report is None or not report.target_share:
        return None
    return f"{report.measured_share:.1%} ({report.target_share:.0%})"


def _inputs_dropped(run: RunRecord) -> str | None:
    inputs = run.report.inputs if run.report is not None else None
    return None if inputs is None else f"{inputs.dropped_share:.1%} ({inputs.method})"


def _tracker(run: RunRecord) -> str | None:
    return _of(run.report, lambda report: f"{report.tracker_seconds / max(report.seconds, 1e-9):.2%}")


def _hit_rate(placed: PlacementReport) -> str | None:
    if not placed.total.lookups:
        return None
    planned = placed.predicted_hit_rate
    return f"{placed.total.hit_rate:.1%}" + ("" if planned is None else f" ({planned:.1%})")


def _memory(placed: PlacementReport) -> str:
    planned = placed.predicted_bytes
    return format_bytes(placed.hbm_bytes) + ("" if planned is None else f" ({format_bytes(planned)})")


def _replans(placed: PlacementReport) -> str | None:
    moved = sum(one.moved for one in placed.replans)
    left_out = f" ({placed.left_out:,})" if placed.left_out else ""
    return f"{len(placed.replans):,}, {moved:,}{left_out}" if placed.replans else None


def _ms(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g} ms"
