"""What the benchmarks' figures are drawn with: rows, styles, panels, curves and bars.

A provider has one colour and marker in every figure. Colours are Okabe and Ito's, and from Tol's muted scheme where
those run out, so that they differ for colour-blind eyes too; no two providers of one figure share both,
and no two bars of one a colour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BLACK, GREY, ORANGE, SKY, GREEN = "#000000", "#999999", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PINK, WINE, INDIGO, OLIVE = "#0072B2", "#D55E00", "#CC79A7", "#882255", "#332288", "#999933"
TEAL, SAND = "#44AA99", "#DDCC77"
# By provider: colour and marker.
STYLES = {
    # stock, and what is measured against
    **dict.fromkeys(("torchrec_fused", "torchrec", "off", "stock"), (BLACK, "s")),
    **dict.fromkeys(("torchrec_uvm", "uvm", "torchrec_scaleup", "random_rows"), (PINK, "D")),
    **dict.fromkeys(("torchrec_uvm_caching_lru", "torchrec_uvm_caching", "uvm_caching_lru", "lru"), (ORANGE, "v")),
    **dict.fromkeys(("torchrec_uvm_caching_lfu", "uvm_caching_lfu", "lfu", "movement", "ours_movement"), (RED, "^")),
    **dict.fromkeys(("uvm_host_mapped", "xdl", "uniform"), (WINE, "X")),
    **dict.fromkeys(("dlrm_open_source", "static"), (GREY, "P")),
    **dict.fromkeys(("random_lookups", "random"), (ORANGE, "v")),
    "random_inputs": (WINE, "X"),
    # that choose inputs
    **{"negatives": (GREY, "s"), "slipstream": (RED, "^"), "slipstream_half": (WINE, "X"), "rarity": (SKY, "h")},
    **{"slipstream_relative": (RED, "<"), "slipstream_per_table": (WINE, ">"), "surprise": (INDIGO, "p")},
    **{
        "fae": (TEAL, "P"),
        "hotline": (SAND, "D"),
        "balanced": (BLACK, "*"),
        "thinning": (GREEN, "s"),
        "thinning_ours": (INDIGO, "p"),
    },
    # of the update filter alone, by what is left out
    **{"random rows": (BLUE, "o"), "most popular rows": (GREEN, "d"), "sampled, rare rows": (ORANGE, "v")},
    # the best there can be
    **dict.fromkeys(("belady", "oracle"), (BLACK, "*")),
    "static_best": (GREEN, "*"),
    # ours
    "ours": (BLUE, "o"),
    "ours_everywhere": (PINK, "o"),
    **dict.fromkeys(("ours_counting", "ours_counts", "ours_host_mapped", "plan", "exact"), (SKY, "h")),
    **dict.fromkeys(("ours_tail", "ours_skip", "ours_half_life"), (GREEN, "d")),
    **dict.fromkeys(("ours_hot_rows", "ours_caching", "sampled"), (INDIGO, "p")),
    **dict.fromkeys(("ours_all", "ours_skip_sampling", "ours_sketch", "sketch"), (OLIVE, "<")),
}
# What nobody can have in practice is dashed.
BOUNDS = frozenset({"belady", "oracle", "static_best"})
# Of matplotlib, for every figure.
SETTINGS = {
    **{"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "figure.labelsize": 9, "legend.fontsize": 8},
    **{"xtick.labelsize": 8, "ytick.labelsize": 8, "lines.markersize": 5, "lines.linewidth": 1.3},
    **{"axes.grid": True, "grid.alpha": 0.3, "grid.linewidth": 0.6, "axes.axisbelow": True},
}


@dataclass(frozen=True)
class Record:
    """One row of the CSV: times in the row's unit, and ``columns`` as they stand there."""

    question: str
    provider: str
    parameters: Mapping[str, Any]
    quality: Mapping[str, Any]
    p20: float
    p50: float
    p80: float
    columns: Mapping[str, str]


def panels(rows: int, columns: int, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure as wide as a README's page, ``height`` in inches, and its panels in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, height), layout="constrained")
    ratios = {"height_ratios": shared.pop("height_ratios", None)}
    found = list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios, **shared).flat)
    return figure, found


def style(name: str) -> dict[str, Any]:
    """A provider's colour, marker and line; grey crosses for one that is not in ``STYLES``."""
    colour, marker = STYLES.get(name, (GREY, "x"))
    line = "--" if name in BOUNDS else "-"
    # Where curves meet, ours is on top.
    return {"color": colour, "marker": marker, "linestyle": line, "zorder": 3 if name == "ours" else 2}


def curve(
    axes: Axes, records: Iterable[Record], over: str, value: Callable[[Record], Any], label: str, **other: Any
) -> None:
    """A line over a parameter, through the values that there are, in the label's style but for ``other``."""
    points = [(one.parameters[over], y) for one in in_order(records, over) if (y := value(one)) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style(label) | other)


def curves(axes: Axes, records: Sequence[Record], over: str, value: Callable[[Record], Any]) -> None:
    """A line a provider."""
    for name in providers(records):
        curve(axes, [one for one in records if one.provider == name], over, value, name)


def bars(
    axes: Axes,
    records: Sequence[Record],
    group: Callable[[Record], int],
    value: Callable[[Record], float | None],
    shown: str | None = None,
) -> None:
    """A group of bars around each whole number, always in the same order; ``shown`` formats the number on top."""
    names = providers(records)
    width = 0.84 / max(1, len(names))
    for i, name in enumerate(names):
        found = [(group(one), y) for one in records if one.provider == name and (y := value(one)) is not None]
        x = [at + width * (i - (len(names) - 1) / 2) for at, _ in found]
        drawn = axes.bar(x, [y for _, y in found], width * 0.92, label=name, color=style(name)["color"])
        if shown is not None:
            axes.bar_label(drawn, fmt=shown, fontsize=6.5, rotation=90, padding=2)
            axes.margins(y=0.15)
    axes.grid(visible=False, axis="x")


def legend_on_top(figure: Figure, *all_axes: Axes, title: str | None = None) -> None:
    """One legend for all panels, above them."""
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in all_axes]
    found = {label: handle for of_axes in pairs for handle, label in of_axes}
    names = sorted(found, key=_order)
    rows = -(-len(names) // (4 if max(map(len, names)) > 22 else 6))
    columns = -(-len(names) // rows)
    handles = [found[name] for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=columns, title=title, title_fontsize=8)


def ticks(axes: Axes, at: Sequence[float], labels: Any) -> None:
    """Ticks of the horizontal axis where something was measured, and nowhere else."""
    axes.set_xticks(at)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(labels)


def providers(records: Iterable[Record]) -> list[str]:
    """Those that there are, in the order of ``STYLES``; unknown ones last."""
    return sorted({one.provider for one in records}, key=_order)


def _order(name: str) -> tuple[int, str]:
    return (list(STYLES).index(name) if name in STYLES else len(STYLES)), name


def values(records: Iterable[Record], parameter: str) -> list[Any]:
    """The different values of a parameter, in order."""
    return sorted({one.parameters[parameter] for one in records})


def in_order(records: Iterable[Record], parameter: str) -> list[Record]:
    """By a parameter."""
    return sorted(records, key=lambda one: one.parameters[parameter])


def quality(name: str) -> Callable[[Record], Any]:
    """Takes a row's quality of that name; None where it has none."""
    return lambda one: one.quality.get(name)


def median(one: Record) -> float:
    """In the row's unit."""
    return one.p50


def short_name(about: str) -> str:
    """A trace's description on a few short lines."""
    if about.startswith("synthetic"):
        return "synthetic"
    source, without, tables = about.replace(".parquet", "").partition(", without ")
    parts = [part for part in source.split(", ") if not part.startswith(("one row for each", "drawn with"))]
    return "\n".join([*parts, f"without {tables}"] if without else parts)


def percent() -> Any:
    """Of a share, for an axis's labels."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{100 * value:.6g}%")


def plain_log(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, as many as there is room for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())
