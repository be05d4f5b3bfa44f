"""A picture of a profile and what a plan made of it: hit rate over bytes, a curve a table, the chosen points."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from torchrec_slipstream.access import AccessProfile, TableAccess
from torchrec_slipstream.budget import format_bytes
from torchrec_slipstream.errors import PlanError
from torchrec_slipstream.placement.placement import Placement, TablePlacement

# Tables that are told apart; the rest is drawn in grey. More colours than these are no longer told apart by a reader,
# and not by one who sees no red or green: Okabe and Ito's palette, without yellow (too pale) and black (the total).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("-", "--", ":")
MAX_LABELLED = len(_COLOURS) * len(_DASHES)
_POINTS = 400


def draw(profile: AccessProfile, placement: Placement | None, path: str | os.PathLike[str]) -> None:
    """Draw hit rate over bytes and write it as PNG.

    A line a table: the share of its look-ups that its most looked-up rows serve, over the bytes of those rows with
    their optimizer state; the tables with the most look-ups (up to ``MAX_LABELLED``) in colour. The thick line is all
    tables together. With a ``placement``, a dot a table and one for all together say what was chosen.

    Args:
        profile: the access counts.
        placement: a plan for these tables; None draws the profile alone.
        path: the file, overwritten. Its ending must be ``.png``.

    Raises:
        PlanError: the path ends otherwise or cannot be written, no table has look-ups, or the placement is of other
            tables.
        ImportError: matplotlib is not installed.
    """
    path = os.fspath(path)
    if not path.lower().endswith(".png"):
        raise PlanError(f"the picture {path!r} would be a PNG; give it a name that ends in .png")
    figure = figure_of(profile, placement)
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise PlanError(f"the picture {path!r} cannot be written ({error.strerror}); give another path") from error


def figure_of(profile: AccessProfile, placement: Placement | None) -> Any:
    """What :func:`draw` writes, as a matplotlib ``Figure``; raises alike."""
    used = sorted(
        (table for table in profile.tables.values() if table.lookups), key=lambda one: (-one.lookups, one.name)
    )
    if not used:
        raise PlanError("the profile has no look-ups to draw; measure some batches first")
    chosen = _chosen(used, placement)
    try:
        # Objects of our own, not pyplot: a caller's backend and figures stay as they are.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error

    figure = Figure(figsize=(11.0, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for table in reversed(used[MAX_LABELLED:]):  # below the others
        size, rate = curve(table)
        axes.plot(size, rate, color="0.78", linewidth=0.7, zorder=1)
        _dot(axes, chosen.get(table.name), "0.6", 9, 2)
    for place, table in enumerate(used[:MAX_LABELLED]):
        colour, dashes = _COLOURS[place % len(_COLOURS)], _DASHES[place // len(_COLOURS)]
        size, rate = curve(table)
        axes.plot(size, rate, color=colour, linestyle=dashes, linewidth=1.4, label=_label(table, profile), zorder=3)
        _dot(axes, chosen.get(table.name), colour, 26, 4)
    total = profile.curve(_POINTS)
    axes.plot(total.bytes, total.hit_rate, color="black", linewidth=3.2, label="all tables", zorder=5)
    title = "Hit rate that the hottest rows give"
    if placement is not None:
        title = _mark_total(axes, chosen, placement, profile)
    if len(used) > MAX_LABELLED:
        axes.plot([], [], color="0.78", linewidth=0.7, label=f"{len(used) - MAX_LABELLED} more tables")
    # Bytes that serve next to nothing are not worth the width.
    left = float(total.bytes[np.searchsorted(total.hit_rate, 0.05)])
    _dress(axes, (min(left, profile.total_bytes / 1000), 1.3 * profile.total_bytes))
    axes.set_title(title, loc="left", fontsize=13, pad=24)
    told = f"{len(profile)} tables of {format_bytes(profile.total_bytes)}, {profile.lookups:,} look-ups counted"
    axes.text(0, 1.02, told, transform=axes.transAxes, color="0.35", fontsize=9.5)
    _legend(axes)
    return figure


def curve(table: TableAccess) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Bytes, int64 ``[n]``, and hit rate of one table with its most looked-up rows hot, row by row as one would see.

    Ends where the last row with a look-up is hot.
    """
    histogram = table.histogram
    used = histogram.counts > 0
    counts, rows = histogram.counts[used], histogram.rows[used]
    ends = np.cumsum(rows)
    hits = np.cumsum(counts * rows)
    # Within a count the line is straight over rows, hence bent over their logarithm: points in between.
    at = np.unique(np.concatenate([ends, np.geomspace(1, ends[-1], _POINTS).astype(np.int64)]))
    if len(at) > 4 * _POINTS:
        at = at[np.unique(np.searchsorted(at, np.geomspace(1, at[-1], 2 * _POINTS)))]
    rate = np.interp(at, np.concatenate([[0], ends]), np.concatenate([[0], hits])) / table.lookups
    return at * table.row_bytes, rate


def _chosen(tables: Sequence[TableAccess], placement: Placement | None) -> dict[str, tuple[float, float]]:
    """Bytes of hot rows and their hit rate, of the tables that the plan placed."""
    if placement is None:
        return {}
    by_name: dict[str, TablePlacement] = {one.name: one for one in placement.tables.values()} | dict(placement.tables)
    points: dict[str, tuple[float, float]] = {}
    for table in tables:
        if (plan := by_name.get(table.name)) is not None:
            if plan.rows != table.rows:
                raise PlanError(
                    f"table {table.name!r} has {plan.rows} rows in the plan and {table.rows} in the profile; draw a "
                    "plan with the profile that it was made from"
                )
            points[table.name] = (plan.hot_rows * table.row_bytes, plan.hit_rate)
    if not points:
        raise PlanError("the plan has none of the profile's tables; draw it with the profile that it was made from")
    return points


def _dot(axes: Any, point: tuple[float, float] | None, colour: str, size: float, order: int) -> None:
    """A table of which nothing is hot has no dot: on a logarithmic scale there is no place for it."""
    if point is not None and point[0] > 0:
        axes.scatter(*point, s=size, color=colour, edgecolors="white", linewidths=0.6, zorder=order)


def _mark_total(axes: Any, chosen: dict[str, tuple[float, float]], placement: Placement, profile: AccessProfile) -> str:
    """Marks what the plan gives in all; the title that says it in words.

    The mark lies on the thick line or below it: rows come in whole shards and to several devices.
    """
    size = sum(point[0] for point in chosen.values())
    if size == 0:
        return "The plan: no row is hot"
    rate = placement.hit_rate
    axes.scatter(size, rate, s=120, color="black", edgecolors="white", linewidths=1.5, zorder=7, label="the plan")
    axes.plot([size, size], [0, rate], color="black", linewidth=0.8, linestyle=":", zorder=0)
    most = profile.hit_rate(int(size))
    return (
        f"The plan: {rate:.1%} of look-ups to come hit {format_bytes(size)} of HBM "
        f"(of those counted, the most for these bytes: {most:.1%})"
    )


def _label(table: TableAccess, profile: AccessProfile) -> str:
    name = table.name if len(table.name) <= 24 else f"{table.name[:10]}…{table.name[-13:]}"
    return f"{name} ({table.lookups / profile.lookups:.0%})"


def _dress(axes: Any, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    axes.set_xscale("log")
    axes.set_xlim(limits)
    # Every so many powers of two, so that ten at most are named: 1 KiB, 16 KiB, 256 KiB, ...
    low, high = (math.log2(limit) for limit in limits)
    step = max(1, math.ceil((high - low) / 10))
    exponents = range(math.ceil(low / step) * step, math.floor(high) + 1, step)
    axes.xaxis.set_major_locator(FixedLocator([2.0**exponent for exponent in exponents]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_bytes(size)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("bytes of hot rows, with optimizer state")
    axes.set_ylabel("hit rate: look-ups that find their row hot")
    axes.grid(color="0.9", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(axes: Any) -> None:
    """Beside the lines, in the order of look-ups, the total first."""
    handles, labels = axes.get_legend_handles_labels()
    first = ("all tables", "the plan")
    order = sorted(range(len(labels)), key=lambda i: first.index(labels[i]) if labels[i] in first else len(first))
    axes.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=9,
        title="table (share of look-ups)",
        title_fontsize=9,
        alignment="left",
        handlelength=3.0,
    )
