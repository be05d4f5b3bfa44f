"""The picture of the hit rate over a run."""

from __future__ import annotations

from math import isnan
from pathlib import Path

from torchrec_slipstream.errors import SlipstreamError
from torchrec_slipstream.report.placement import PlacementReport


def draw(report: PlacementReport, path: str | Path) -> None:
    """Draw a report's hit rate over steps, re-plans marked. See :meth:`PlacementReport.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SlipstreamError("a plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    rates = report.hit_rates()
    axes.plot([step for step, _ in rates], [rate for _, rate in rates], label="measured", color="C0")
    planned = report.predicted_hit_rate
    if planned is not None and not isnan(planned):
        axes.axhline(planned, color="C2", linestyle="--", label="planned")
    moved = [one.step for one in report.replans if one.moved]
    for i, step in enumerate(moved):
        axes.axvline(step, color="C1", alpha=0.4, linewidth=0.8, label="re-plan that moved rows" if i == 0 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("share of look-ups in fast memory")
    axes.set_ylim(0.0, 1.0)
    axes.grid(alpha=0.3)
    if rates or planned is not None or moved:
        axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
