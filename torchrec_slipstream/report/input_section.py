"""A page's section on the inputs of a run: what was read, trained on and dropped, and what of it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from torchrec_slipstream.report import svg
from torchrec_slipstream.report.charts import busiest
from torchrec_slipstream.report.html import figure, table
from torchrec_slipstream.report.inputs import DropCount, InputReport


def section(inputs: InputReport) -> list[str]:
    """HTML: the counts, a sentence on what they mean for the model, and bars by label and by table."""
    told = "".join(f"<p>{escape(sentence)}</p>" for sentence in _sentences(inputs))
    parts = [f'<div class="columns"><section>{table([], _counts(inputs))}{told}</section>', *_figures(inputs), "</div>"]
    if inputs.searches:
        parts += ["<h3>Searches for stale rows</h3>", _searches(inputs)]
    return parts


def _counts(inputs: InputReport) -> list[list[str]]:
    of_each, kind = _of_each(inputs)
    alike = f", of every {kind} alike" if len(of_each) > 1 and _are_alike(of_each) else ""
    rows = [
        ["method", inputs.method],
        ["samples read", f"{inputs.read:,}"],
        ["trained on", f"{inputs.used:,}"],
        ["dropped", f"{inputs.dropped:,} ({inputs.dropped_share:.1%})"],
        ["left over at epochs' ends", f"{inputs.left_over:,}"],
        ["waiting for a batch", f"{inputs.waiting:,}"],
        ["look-ups dropped with them", f"{inputs.lookups.dropped:,} ({inputs.lookups.share:.1%}{alike})"],
        ["weights of the kept samples, sum", f"{inputs.kept_weight:,.0f}"],
    ]
    rows += [
        [f"{name} batches a rank", f"{one.batches:,} ({one.samples:,} samples)"] for name, one in inputs.lanes.items()
    ]
    if inputs.classified:
        rows += [
            ["dropped, of those read while stale rows were known", f"{inputs.dropped / inputs.classified:.1%}"],
            ["dropped, of the hot ones among them", f"{inputs.dropped / max(1, inputs.hot):.1%}"],
        ]
    return rows + ([["to add to the logits", f"{inputs.logit_shift:+.4f}"]] if inputs.logit_shift else [])


def _sentences(inputs: InputReport) -> list[str]:
    if inputs.logit_shift:
        why = [
            *(["negatives were dropped and the kept ones count once"] if inputs.classes["negative"].dropped else []),
            *(["positives weigh more"] if inputs.classes["positive"].weighs else []),
        ]
        return [
            f"As {' and '.join(why)}, the model learnt odds that are too high by one factor: add "
            f"{inputs.logit_shift:+.4f} to its logits before they are read as probabilities. The order of its "
            "predictions, and so the AUC, is right without."
        ]
    if inputs.method != "thinning" and inputs.dropped and inputs.kept_weight != inputs.read - inputs.dropped:
        return ["Kept samples weigh one over the probability of being kept, so the sum is near the samples read."]
    return []


def _searches(inputs: InputReport) -> str:
    head = ["after step", "threshold", "sampled hot inputs below it", "as asked for", "stale rows"]
    return table(
        head,
        [
            [
                f"{one.step:,}",
                f"{one.threshold:.3g}",
                f"{one.share:.1%} of {one.samples:,}",
                "yes" if one.met else "no",
                f"{one.stale_rows:,}",
            ]
            for one in inputs.searches
        ],
    )


def _figures(inputs: InputReport) -> list[str]:
    if not inputs.dropped:
        return []
    figures = []
    if inputs.labels:
        title = "Samples dropped, by label"
        chart = _bars(title, inputs.labels, {name: f"label {name}" for name in inputs.labels}, "samples")
        figures.append(figure(title, chart, [], "share of the samples read of each label"))
    of_each, kind = _of_each(inputs)
    if not _are_alike(of_each):
        title = f"Look-ups dropped with their samples, by {kind}"
        shown, note = busiest({name: one.read for name, one in of_each.items()}, f"{kind}s")
        chart = _bars(title, of_each, shown, "look-ups")
        figures.append(figure(title, chart, [], f"share of the look-ups read of each {kind}{note}"))
    return figures


def _of_each(inputs: InputReport) -> tuple[Mapping[str, DropCount], str]:
    return (inputs.tables, "table") if inputs.tables else (inputs.features, "feature")


def _are_alike(counts: Mapping[str, DropCount]) -> bool:
    """Whether a chart would show one figure again and again, as where every sample has one look-up of each feature."""
    return len({svg.share(one.share) for one in counts.values()}) < 2


def _bars(title: str, counts: Mapping[str, DropCount], shown: Mapping[str, str], unit: str) -> str:
    bars = [
        svg.Bar(label, [(one.share, svg.COLOURS[0], f"{one.dropped:,} of {one.read:,} {unit}")], svg.share(one.share))
        for name, label in shown.items()
        for one in [counts[name]]
    ]
    return svg.bars(title, bars)
