"""The figures of the recorded benchmarks: what is drawn of a question's rows, once they are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.drawing import (
    Record,
    bars,
    curve,
    curves,
    in_order,
    legend_on_top,
    median,
    panels,
    percent,
    plain_log,
    providers,
    quality,
    short_name,
    style,
    ticks,
    values,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def update_filter(records: Sequence[Record]) -> Figure:
    """Stock's step over the filter's, by share of look-ups left out: by kind of rows, and by dim."""
    figure, (left, right) = panels(1, 2, 3.9)
    kinds = {"speedup": "random rows", "speedup_popular": "most popular rows", "speedup_sampling": "sampled, rare rows"}
    filters = {
        kind: [one for one in records if one.question.endswith(f".{key}") and "share" in one.parameters]
        for key, kind in kinds.items()
    }
    dims = values(filters["random rows"], "dim")
    for kind, found in filters.items():
        curve(left, [one for one in found if one.parameters["dim"] == dims[0]], "share", quality("speedup"), kind)
    steps = {one.provider: one.p50 for one in records if one.question.endswith("overhead_at_0")}
    if len(steps) == 2:
        ratio = steps["stock"] / steps["session"]
        left.plot([0], [ratio], "ks", label=f"a session, nothing stale yet: {ratio:.2f}")
    # From light to dark, so that their order shows without colour.
    for dim, shade, marker in zip(dims, ("#9ecae1", "#4292c6", "#08519c", "#08306b"), "ovd^", strict=False):
        of_dim = [one for one in filters["random rows"] if one.parameters["dim"] == dim]
        curve(right, of_dim, "share", quality("speedup"), f"dim {dim}", color=shade, marker=marker)
    left.set_title(f"by which rows are stale, dim {dims[0]}")
    right.set_title("by embedding dim, random rows")
    for axes in (left, right):
        axes.axhline(1, color="0.5", linewidth=0.8)
        axes.set_xlabel("share of look-ups whose update is left out")
        axes.xaxis.set_major_formatter(percent())
        axes.set_ylim(bottom=0)
        axes.legend()
    right.sharey(left)
    left.set_ylabel("stock's step / ours (above 1: faster)")
    return figure


def convergence(records: Sequence[Record]) -> Figure:
    """Differences in AUC to nothing left out, with standard deviations over seeds, by share."""
    figure, (axes,) = panels(1, 1, 3.9)
    _over_share(axes, records, "auc_delta")
    axes.set_xlabel("share of look-ups whose update is to be left out")
    axes.set_ylabel("AUC minus that of nothing left out")
    axes.set_title(f"mean and standard deviation of {records[0].parameters['seeds']} paired seeds")
    axes.legend(ncols=2)
    return figure


def inputs(records: Sequence[Record]) -> Figure:
    """Differences in AUC and log-loss to no input dropped, with standard deviations over seeds, by share."""
    figure, (above, below) = panels(2, 1, 7.2, sharex=True)
    _over_share(above, records, "auc_delta")
    _over_share(below, records, "logloss_delta")
    above.set_title(f"mean and standard deviation of {records[0].parameters['seeds']} paired seeds (AUC: up is better)")
    above.set_ylabel("AUC minus that of all inputs")
    below.set_ylabel("log-loss minus that of all inputs")
    below.set_xlabel("share of inputs that is to be dropped")
    legend_on_top(figure, above)
    return figure


def _over_share(axes: Axes, records: Sequence[Record], name: str) -> None:
    """A quality with its standard deviation over the share, a line a provider, side by side."""
    names = providers(records)
    apart = min(0.008, 0.04 / len(names))
    for i, provider in enumerate(names):
        found = in_order((one for one in records if one.provider == provider), "share")
        x = [one.parameters["share"] + apart * (i - (len(names) - 1) / 2) for one in found]
        y, spread = ([one.quality[key] for one in found] for key in (name, f"{name}_sd"))
        axes.errorbar(x, y, spread, label=provider, capsize=3, **style(provider))
    axes.axhline(0, color="0.5", linewidth=0.8)
    axes.xaxis.set_major_formatter(percent())


def throughput(records: Sequence[Record]) -> Figure:
    """Speed and AUC against stock, by configuration and provider."""
    figure, (above, below) = panels(2, 1, 6.2, sharex=True, height_ratios=[3, 2])
    others = [one for one in records if one.provider != "torchrec_fused"]
    names = list(dict.fromkeys(one.parameters["configuration"] for one in records))

    bars(above, others, lambda one: names.index(one.parameters["configuration"]), quality("speedup"), "{:.2f}")
    bars(below, others, lambda one: names.index(one.parameters["configuration"]), quality("auc_delta"))
    above.axhline(1, color="black", linewidth=1, zorder=0.9, label="torchrec_fused (stock)")
    below.axhline(0, color="black", linewidth=1)
    below.set_xticks(range(len(names)), [name.replace("_bound_", "_bound\n") for name in names])
    below.tick_params(axis="x", length=0)
    above.set_ylabel("stock's step / the provider's")
    below.set_ylabel("AUC minus stock's")
    above.set_title("speed, stock = 1 (above 1: faster)")
    below.set_title("AUC after the same few steps (above 0: better)")
    legend_on_top(figure, above)
    return figure


def time_to_auc(records: Sequence[Record]) -> Figure:
    """Mean curves of AUC over training time, and the mean target."""
    figure, (axes,) = panels(1, 1, 4.2)
    starts = []
    for one in records:
        points = [list(zip(*at_once, strict=True)) for at_once in zip(*one.quality["curves"], strict=False)]
        x, y = ([fmean(point[i]) for point in points] for i in (0, 1))
        starts.append(y[1] if len(y) > 2 else y[0])
        axes.plot(x, y, label=one.provider, **style(one.provider))
    stock = next((one for one in records if one.provider == "torchrec_fused"), None)
    if stock is not None:
        target = fmean(curve[-1][1] for curve in stock.quality["curves"]) - stock.parameters["below"]
        below = f"stock's last AUC less {stock.parameters['below']:g}"
        axes.axhline(target, color="0.4", linewidth=1, linestyle=":", label=f"target: {below}")
    axes.set_ylim(bottom=min(starts))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("test AUC")
    axes.set_title(f"mean of {records[0].parameters['seeds']} paired seeds")
    axes.legend(loc="lower right")
    return figure


def hbm_budget(records: Sequence[Record]) -> Figure:
    """Step time with p20 and p80, and hit rate, over the budget; a column an optimizer."""
    optimizers = list(dict.fromkeys(one.parameters["optimizer"] for one in records))
    figure, all_axes = panels(2, len(optimizers), 6.2, sharex=True, sharey="row", height_ratios=[3, 2])
    for i, optimizer in enumerate(optimizers):
        above, below = all_axes[i], all_axes[len(optimizers) + i]
        of_optimizer = [one for one in records if one.parameters["optimizer"] == optimizer]
        for name in providers(of_optimizer):
            found = [one for one in of_optimizer if one.provider == name]
            with_budget = in_order((one for one in found if one.parameters["budget"]), "budget")
            if not with_budget:  # all rows in host memory, whatever the budget
                above.axhline(found[-1].p50, label=name, color=style(name)["color"], linestyle="--")
                continue
            x, y = [one.parameters["budget"] for one in with_budget], [one.p50 for one in with_budget]
            spread = [[one.p50 - one.p20 for one in with_budget], [one.p80 - one.p50 for one in with_budget]]
            above.errorbar(x, y, spread, label=name, capsize=2, **style(name))
            curve(below, with_budget, "budget", quality("hit_rate"), name)
            if name in ("ours", "ours_skip"):
                label = "floor: rows over the bus once" + (", live ones back" if name == "ours_skip" else "")
                dots = {"color": style(name)["color"], "linestyle": ":", "marker": "", "linewidth": 1.8}
                curve(above, with_budget, "budget", quality("floor_ms"), label, **dots)
        above.set_title(optimizer)
        above.set(xscale="log", yscale="log")
        below.set_xlabel("budget, share of the tables' bytes")
        ticks(below, values([one for one in records if one.parameters["budget"]], "budget"), percent())
        below.yaxis.set_major_formatter(percent())
        plain_log(above.yaxis)
        if i == 0:
            above.set_ylabel("ms a step")
            below.set_ylabel("look-ups that hit")
    legend_on_top(figure, *all_axes)
    return figure


def placement(records: Sequence[Record]) -> Figure:
    """Hit rates over budgets, a panel a trace."""
    traces = sorted(
        {one.parameters["about"] for one in records},
        key=lambda about: (about.startswith("synthetic"), "file order" not in about, about),
    )
    figure, all_axes = panels(-(-(len(traces) + 1) // 4), min(4, len(traces) + 1), 5.6, sharey=True)
    for axes, about in zip(all_axes, traces, strict=False):
        of_trace = [one for one in records if one.parameters["about"] == about]
        curves(axes, of_trace, "budget", median)
        axes.set_title(short_name(about))
        axes.set_xscale("log")
        ticks(axes, values(of_trace, "budget"), percent())
        axes.yaxis.set_major_formatter(percent())
    for axes in all_axes[len(traces) :]:
        axes.axis("off")
    all_axes[len(traces)].legend(*all_axes[0].get_legend_handles_labels(), loc="center")
    figure.supylabel("look-ups that hit, over the budget (share of the tables' bytes)")
    return figure


def replan(records: Sequence[Record]) -> Figure:
    """Hit rates as bars, by trace and budget."""
    figure, (axes,) = panels(1, 1, 4.4)
    groups = list(dict.fromkeys((one.parameters["about"], one.parameters["budget"]) for one in records))

    def group(one: Record) -> int:
        return groups.index((one.parameters["about"], one.parameters["budget"]))

    bars(axes, records, group, median, "{:.0%}")
    axes.set_xticks(range(len(groups)), [f"{short_name(about)}\nbudget {budget:.0%}" for about, budget in groups])
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter(percent())
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("look-ups that find a hot row")
    legend_on_top(figure, axes)
    return figure


def profiler(records: Sequence[Record]) -> Figure:
    """What counting look-ups costs a step, and which of the hottest rows it finds."""
    figure, (left, right) = panels(1, 2, 2.7)
    counters = [one for one in records if "ratio" in one.quality]
    for axes, key, shown in ((left, "ratio", "{:.3f}"), (right, "recall", "{:.1%}")):
        names = [one.provider for one in counters]
        drawn = axes.barh(names, [one.quality[key] for one in counters], 0.6)
        for bar, name in zip(drawn, names, strict=True):
            bar.set_color(style(name)["color"])
        axes.bar_label(drawn, fmt=shown, padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.2)
    left.axvline(1, color="black", linewidth=1)
    left.set_title("a step that counts / one that does not")
    right.set_title(f"the hottest {records[0].parameters['hot_share']:.0%} of the rows: share that is found")
    right.xaxis.set_major_formatter(percent())
    return figure


def planning(records: Sequence[Record]) -> Figure:
    """Seconds of a plan, over rows and over tables."""
    figure, both = panels(1, 2, 3.7, sharey=True)
    for axes, over, fixed in zip(both, ("rows", "tables"), ("tables", "rows"), strict=True):
        # The value at which most was measured over the other.
        of_value = {at: [one for one in records if one.parameters[fixed] == at] for at in values(records, fixed)}
        value = max(of_value, key=lambda at: len(values(of_value[at], over)))
        curves(axes, of_value[value], over, median)
        axes.set(xscale="log", yscale="log")
        ticks(axes, values(of_value[value], over), "{x:,.0f}")
        plain_log(axes.yaxis)
        axes.set_title(f"over {over}, {value:,} {fixed}")
        axes.set_xlabel(over + (" of all tables together" if over == "rows" else ""))
    both[0].set_ylabel("seconds a plan")
    legend_on_top(figure, *both)
    return figure


def memory(records: Sequence[Record]) -> Figure:
    """What stock takes and what a session adds: bytes over rows, and bytes a row by dim."""
    figure, (left, right) = panels(1, 2, 4.0)
    dims = values(records, "dim")
    curves(left, [one for one in records if one.parameters["dim"] == dims[0]], "rows", lambda one: one.p50 / 2**20)
    left.set(xscale="log", yscale="log", xlabel="rows of all tables together", ylabel="MiB")
    ticks(left, values(records, "rows"), "{x:,.0f}")
    plain_log(left.yaxis)
    left.set_title(f"over rows, dim {dims[0]}")
    fewest = [one for one in records if one.parameters["rows"] == values(records, "rows")[0]]
    bars(right, fewest, lambda one: dims.index(one.parameters["dim"]), quality("bytes_per_row"), "{:.0f}")
    right.set_xticks(range(len(dims)), [f"dim {dim}" for dim in dims])
    right.tick_params(axis="x", length=0)
    right.set_ylabel("bytes a row")
    right.set_title(f"a row, {fewest[0].parameters['rows']:,} rows")
    legend_on_top(figure, left, title="torchrec_fused: a table's training; ours_*: what a session adds to it")
    return figure


def ranks(records: Sequence[Record]) -> Figure:
    """Samples a second of all ranks, over ranks; a panel a sharding."""
    shardings = list(dict.fromkeys(one.parameters["sharding"] for one in records))
    figure, all_axes = panels(1, len(shardings), 3.7, sharey=True)
    for axes, sharding in zip(all_axes, shardings, strict=True):
        of_sharding = [one for one in records if one.parameters["sharding"] == sharding]
        curves(axes, of_sharding, "ranks", quality("samples_per_second"))
        axes.set_xticks(values(of_sharding, "ranks"))
        short = any(one.quality.get("enough_cores") is False for one in of_sharding)
        axes.set_title(sharding + (f", only {of_sharding[0].quality['cores']} cores" if short else ""))
        axes.set_xlabel("ranks, each with as many samples")
    all_axes[0].set_ylim(bottom=0)
    all_axes[0].set_ylabel("samples a second, all ranks")
    all_axes[0].yaxis.set_major_formatter("{x:,.0f}")
    legend_on_top(figure, *all_axes)
    return figure


def projection(records: Sequence[Record]) -> Figure:
    """Milliseconds of the embeddings by the planner's model, marked as what it is; a panel a set of tables."""
    sets = list(dict.fromkeys(one.parameters["data"] for one in records))
    figure, all_axes = panels(1, len(sets), 3.9)
    for axes, data in zip(all_axes, sets, strict=True):
        of_data = [one for one in records if one.parameters["data"] == data]
        curves(axes, of_data, "devices", median)
        axes.set_xscale("log", base=2)
        ticks(axes, values(of_data, "devices"), "{x:g}")
        axes.set_ylim(bottom=0)
        axes.set_title(f"PROJECTION: {data}, {of_data[0].parameters['tables']} tables")
        axes.set_xlabel(f"GPUs (bandwidths {of_data[0].quality.get('bandwidths_from', 'unknown')})")
        words = axes.text(0.5, 0.5, "PROJECTION, NOT MEASURED", transform=axes.transAxes, ha="center", va="center")
        words.set(fontsize=22 if len(sets) == 1 else 14, color="firebrick", alpha=0.4, rotation=12, weight="bold")
    all_axes[0].set_ylabel("projected ms a step, embeddings alone")
    legend_on_top(figure, *all_axes)
    return figure
