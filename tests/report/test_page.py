"""The page of a run: it stands alone, says what the record says, and lets no name become code."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.report.runs import Page, dlrm_run, input_report, session_report
from torchrec_slipstream import InputReport
from torchrec_slipstream.report import charts, svg
from torchrec_slipstream.report.inputs import ClassCount, DropCount, LaneCount
from torchrec_slipstream.report.octaves import Octaves
from torchrec_slipstream.report.page import page
from torchrec_slipstream.report.payoff import Payoff
from torchrec_slipstream.report.placement import HitPoint, PlacementReport, Replan
from torchrec_slipstream.report.record import RunRecord
from torchrec_slipstream.report.report import Decision, Report


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return json.loads(json.dumps(dlrm_run()))


@pytest.fixture
def run(values: dict[str, Any]) -> RunRecord:
    return RunRecord.from_dict(values)


def placed(run: RunRecord) -> tuple[Report, PlacementReport]:
    assert run.report is not None
    assert run.report.placement is not None
    return run.report, run.report.placement


def test_the_page_stands_alone_and_is_well_formed(run: RunRecord) -> None:
    html = page([run])
    found = Page(html)
    assert found.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"})
    assert found.attributes.isdisjoint({"src", "href", "srcset", "action", "data"})
    assert not re.search(r"https?:|//|url\(|@import", html)
    for chart in found.charts.values():
        _, _, width, height = map(float, str(chart.get("viewBox")).split())
        for one in chart.iter():
            for name, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                assert 0 <= float(one.get(name, 0)) <= most
        numbers = " ".join(str(value) for one in chart.iter() for value in one.attrib.values())
        assert not re.search(r"nan|inf", numbers)


def test_it_says_what_the_record_says(run: RunRecord, values: dict[str, Any]) -> None:
    report, hot = placed(run)
    found = Page(page([run]))
    last = run.history[-1]
    for name, title in (("auc", "AUC on the test samples"), ("log_loss", "Log-loss on the test samples")):
        assert f"{last[name]:.4f}" in found.text
        assert found.said(title)[-2:] == [f"skip everywhere, step {last['step']}: {last[name]:.4g}", "best possible"]
    assert f"{report.measured_share:.1%} (50%)" in found.text
    assert f"{hot.total.hit_rate:.1%} ({hot.predicted_hit_rate:.1%})" in found.text
    step, rate = hot.hit_rates()[-1]
    assert f"skip everywhere, step {step}: {svg.share(rate)}" in found.said("Hit rate over steps")
    assert any("planned" in said for said in found.said("Hit rate over steps"))
    one = report.decisions[-1]
    said = found.said("Updates left out, over steps")[-2]
    assert said == f"skip everywhere, step {one.step}: {svg.share(one.measured_share)}"
    assert f"stale: all that may be, step {one.step}: {one.stale_rows:,}" in found.said("Stale rows over steps")
    for name, table in report.tables.items():
        short = name.rpartition(".")[2]
        assert f"{short}: {table.skipped:,} of {table.lookups:,} look-ups" in found.said("Updates left out, by table")
        rows = found.said("Rows: stale, live, untouched")
        assert f"{short}: {table.stale_rows:,} of {table.rows:,} rows stale" in rows
    for name, hits in hot.tables.items():
        said = found.said("Hit rate by table, predicted and measured")
        assert f"{name.rpartition('.')[2]}: predicted {svg.share(hits.predicted or 0.0)}" in said
    assert hot.moved_rows > 0
    told = found.said("Rows moved by re-plans")
    for replan in hot.replans:
        assert replan.promoted == 0 or any(
            said.startswith(f"step {replan.step}: {replan.promoted:,} promoted, {replan.demoted:,} demoted,")
            for said in told
        )
    for part in ("forward", "backward"):
        assert f"skip everywhere: {part} {values['step_ms'][part]:.2f} ms" in found.said("A step's time by part")
    assert values["versions"]["torch"] in found.text
    assert "train samples\n3,200\n" in found.text


def test_inputs_have_a_section_of_their_own(run: RunRecord) -> None:
    report, _ = placed(run)
    inputs = input_report()
    with_inputs = replace(run, name="with", report=replace(report, inputs=inputs))
    assert "Inputs" not in Page(page([run])).text.splitlines()
    found = Page(page([with_inputs, run]))
    assert "Inputs: with\n" in found.text
    assert "Inputs: skip everywhere\n" not in found.text
    assert "inputs dropped (by)\n30.0% (slipstream)\n-\n" in found.text
    for line in (
        "samples read\n1,000\n",
        "trained on\n690\n",
        "dropped\n300 (30.0%)\n",
        "left over at epochs' ends\n1\n",
        "waiting for a batch\n9\n",
        "look-ups dropped with them\n550 (22.8%)\n",
        "weights of the kept samples, sum\n700\n",
        "cold batches a rank\n40 (450 samples)\n",
        "hot batches a rank\n20 (240 samples)\n",
        "dropped, of those read while stale rows were known\n50.0%\n",
        "dropped, of the hot ones among them\n75.0%\n",
        "20\n0.0125\n55.0% of 64\nyes\n37\n",
        "60\n0.25\n12.5% of 60\nno\n5\n",
    ):
        assert line in found.text
    assert found.said("Samples dropped, by label") == [
        "label 0", "label 0: 280 of 800 samples", "label 1", "label 1: 20 of 200 samples",
    ]  # fmt: skip
    said = found.said("Look-ups dropped with their samples, by table")
    assert said == ["t_0", "t_0: 550 of 2,400 look-ups", "t_1", "t_1: 0 of 10 look-ups"]
    assert "logits" not in found.text


def test_what_dropped_inputs_mean_for_the_model_is_said(run: RunRecord) -> None:
    report, _ = placed(run)

    def text(inputs: InputReport) -> str:
        return Page(page([replace(run, report=replace(report, inputs=inputs))])).text

    thinned = input_report("thinning")
    assert f"add {thinned.logit_shift:+.4f} to its logits" in text(thinned)
    assert thinned.logit_shift == pytest.approx(math.log(0.65 / 0.9))
    assert "As negatives were dropped and the kept ones count once, the model learnt odds" in text(thinned)
    negative, positive = thinned.classes["negative"], replace(thinned.classes["positive"], kept_weight=720.0)
    heavier = replace(thinned, kept_weight=1240.0, classes={"negative": negative, "positive": positive})
    assert "dropped and the kept ones count once and positives weigh more, the model learnt" in text(heavier)
    undropped = {"negative": ClassCount(800, 0, 800.0), "positive": ClassCount(200, 0, 800.0)}
    assert "As positives weigh more, the model" in text(replace(heavier, dropped=0, classes=undropped))
    before_both = replace(heavier, classes={"positive": positive})
    assert "one over the probability" not in text(heavier) + text(before_both)
    weights = {"negative": replace(negative, kept_weight=810.0), "positive": replace(positive, kept_weight=180.0)}
    weighed = text(replace(input_report("negatives"), kept_weight=990.0, classes=weights))
    assert "Kept samples weigh one over the probability of being kept" in weighed
    assert "logits" not in weighed
    alike = replace(thinned, tables={f"m.t_{i}": DropCount(100, 25) for i in range(3)})
    assert "of every table alike" in text(alike)
    assert "by table" not in Page(page([replace(run, report=replace(report, inputs=alike))])).charts


def test_a_tables_line_says_what_was_dropped_with_samples(run: RunRecord) -> None:
    report, _ = placed(run)
    first, second, *_ = report.tables
    inputs = replace(input_report(), tables={first: DropCount(80, 20), second: DropCount(80, 8)})
    shown = replace(report, inputs=inputs)
    assert str(shown).splitlines()[0].endswith("skipped   dropped")
    assert [line.split()[-1] for line in str(shown).splitlines()[2:4]] == ["25.0%", "10.0%"]
    text = Page(page([replace(run, report=shown)])).text
    assert "left out\ndropped with samples\n" in text
    one = report.tables[first]
    assert f"{one.skipped_share:.1%}\n25.0%\n" in text
    assert "dropped with samples" not in Page(page([run])).text
    assert not str(report).splitlines()[0].endswith("dropped")


def test_bars_and_lines_are_as_long_as_they_say() -> None:
    chart = Page(
        svg.bars(
            "b",
            [svg.Bar("one", [(0.2, "#000", "p"), (0.3, "#111", "q")], ""), svg.Bar("two", [(1.0, "#000", "p")], "")],
        )
    ).charts["b"]
    widths = [float(str(rect.get("width"))) for rect in chart.iter("rect")]
    assert widths[:2] == pytest.approx([0.2 * widths[2], 0.3 * widths[2]], abs=0.1)
    line = Page(svg.lines("l", [svg.Line("n", [(0, 0.0), (50, 0.5), (100, 1.0)])], bounds=(0.0, 1.0))).charts["l"]
    dots = [(float(str(dot.get("cx"))), float(str(dot.get("cy")))) for dot in line.iter("circle")]
    assert dots[1] == pytest.approx(((dots[0][0] + dots[2][0]) / 2, (dots[0][1] + dots[2][1]) / 2), abs=0.1)
    assert dots[2][1] < dots[0][1], "up is more"
    texts = {text.text: float(str(text.get("y"))) for text in line.iter("text")}
    assert texts["1"] == pytest.approx(dots[2][1] + 4, abs=0.1), "the axis says what the line means"


EVIL = ('<script>alert("1")</script>', "\"><img src=x onerror='alert(2)'>&amp;")


def test_names_stay_text(tmp_path: Path) -> None:
    report = replace(session_report(EVIL), config={"staleness": {EVIL[0]: EVIL[1]}}, spread={EVIL[1]: Octaves(0, [3])})
    counts, lanes = {EVIL[0]: DropCount(9, 5), EVIL[1]: DropCount(9, 4)}, {EVIL[0]: LaneCount(1, 1)}
    inputs = replace(input_report(EVIL[1]), labels=counts, tables=counts, features=counts, lanes=lanes)
    report = replace(report, inputs=inputs)
    run = RunRecord(
        report=report,
        name=EVIL[1],
        history=[{"step": 1, EVIL[0]: 0.5}, {"step": 2, EVIL[0]: 0.6}],
        step_ms={EVIL[0]: 1.0},
        versions={EVIL[0]: EVIL[1]},
        facts={EVIL[1]: EVIL[0]},
    )
    run.save(tmp_path / "run.json")
    runs = [run, RunRecord.from_dict(json.loads((tmp_path / "run.json").read_text()))]
    found = Page(page(runs))
    plain = Page(page([RunRecord(report=session_report(), step_ms={"a": 1.0}), RunRecord(report=None)]))
    assert found.tags <= plain.tags | {"circle"}
    assert found.tags.isdisjoint({"script", "img"})
    assert "onerror" not in found.attributes
    for name in EVIL:
        assert found.text.count(name) > 8, "shown as it is"


def test_settings_of_a_part_are_listed_one_by_one(run: RunRecord) -> None:
    report, _ = placed(run)
    config = {**report.config, "inputs": {**report.config["inputs"], "fae": {"window": 7, "rate": 50.0}}}
    html = page([replace(run, report=replace(report, config=config))])
    assert "<b>inputs.fae.window</b></td><td><b>7</b>" in html
    assert "<td>inputs.fae.rate</td><td>50</td>" in html
    assert "{" not in Page(html).text.partition("What was run")[2]


def test_what_was_not_recorded_leaves_no_empty_chart(run: RunRecord) -> None:
    nothing = Page(page([RunRecord(report=None, name="bare")]))
    assert nothing.charts == {}
    assert "Tables and rows" not in nothing.text
    report, _ = placed(run)
    only_hot = replace(
        report,
        target_share=0.0,
        decisions=[],
        tables={name: replace(table, skipped=0, stale_rows=0) for name, table in report.tables.items()},
    )
    found = Page(page([replace(run, report=only_hot, history=(), step_ms={})]))
    assert set(found.charts) - {"Look-ups of a row"} == {
        "Hit rate over steps",
        "Hit rate by table, predicted and measured",
        "Rows moved by re-plans",
    }
    only_skipping = Page(page([replace(run, report=replace(report, placement=None), history=(), step_ms={})]))
    assert not any("Hit rate" in str(title) or "re-plans" in str(title) for title in only_skipping.charts)
    assert "fast memory (planned)" not in only_skipping.text
    assert "predicted" not in only_skipping.text


def test_what_leaving_out_costs_and_saves_is_told_by_tbe(run: RunRecord) -> None:
    report = run.report
    assert report is not None
    assert "What leaving updates out costs and saves" not in Page(page([run])).text, "nothing was tried"
    tried = [
        Payoff(["m.<b>t_1", "m.t_2"], 1132, 20.25, 12.5, pays=True),
        Payoff(["m.t_3"], 1132, 1.0, 2.0, pays=False, rank=1),
    ]
    text = Page(page([replace(run, report=replace(report, payoffs=tried))])).text
    assert "2 tables (m.<b>t_1, ...)\n0\n1,132\n20.25\n12.50\nleft out\n" in text
    assert "m.t_3\n1\n1,132\n1.00\n2.00\nall made\n" in text


def test_runs_stand_side_by_side(run: RunRecord) -> None:
    other = replace(run, name="another", history=[{"step": 1, "auc": 0.123}, {"step": 2, "auc": 0.1234}])
    found = Page(page([run, other, RunRecord(report=None, name="bare", step_ms={"median": 5.0})]))
    said = found.said("AUC on the test samples")
    assert "another, step 2: 0.1234" in said
    assert any(one.startswith("skip everywhere, step ") for one in said)
    assert "bare: a whole step, median 5.00 ms" in found.said("A step's time by part")
    for name in ("skip everywhere", "another"):
        assert f"Tables and rows: {name}" in found.text
    assert "AUC\n" + f"{run.history[-1]['auc']:.4f}\n0.1234\n-\n" in found.text


def test_long_runs_and_many_tables_stay_readable(run: RunRecord) -> None:
    report, hot = placed(run)
    (table, *_), (hits, *_) = report.tables.values(), hot.tables.values()
    names = [f"model.ebc.t_{i}" for i in range(100)]
    points = [HitPoint(step, 10 * step, 5 * step) for step in range(1, 100_001)]
    replans = [Replan(step, 0.1, True, 1, 2, 100, 0.001) for step in range(1, 1001)]
    long = replace(
        report,
        tables={name: replace(table, lookups=1000 + i, skipped=i + 1) for i, name in enumerate(names)},
        decisions=[Decision(step, 10, 5, 0, 0, 0.4, 0.4, 0.1) for step in range(1, 20_001)],
        placement=replace(hot, tables=dict.fromkeys(names, hits), points=points, replans=replans),
    )
    html = page([replace(run, report=long)])
    assert len(html) < 1_000_000
    found = Page(html)
    left_out = found.said("Updates left out, by table")
    assert [said.split(":")[0] for said in left_out[::2]] == [f"t_{i}" for i in range(70, 100)], "the busiest, in order"
    assert "the 30 of 100 tables with the most look-ups" in found.text
    assert found.text.count("\nt_60\n") == 1, "all of them in the table"
    columns = found.said("Rows moved by re-plans")
    moved = [re.findall(r": ([\d,]+) promoted, ([\d,]+) demoted", one)[0] for one in columns]
    assert sum(int(up) for up, _ in set(moved)) > 0
    assert len(columns) <= 240
    assert "step 1 to 9: 18 promoted, 9 demoted, 900 B, 9.0 ms" in columns
    assert "skip everywhere, step 100,000: 50.0%" in found.said("Hit rate over steps"), "the last point is drawn"


def test_names_lose_what_they_have_in_common_and_are_in_order() -> None:
    assert charts.short_names(["m.a.t_10", "m.a.t_2", "m.b.t_1"]) == {
        "m.a.t_2": "a.t_2",
        "m.a.t_10": "a.t_10",
        "m.b.t_1": "b.t_1",
    }
    assert list(charts.short_names(["m.t_10", "m.t_2"]).values()) == ["t_2", "t_10"]
    assert charts.short_names(["m.t"]) == {"m.t": "m.t"}
    assert charts.short_names([".a", ".b"]) == {".a": "a", ".b": "b"}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.397, 0.498, [0.4, 0.42, 0.44, 0.46, 0.48]),
        (0.0, 60_000.0, [0.0, 10_000.0, 20_000.0, 30_000.0, 40_000.0, 50_000.0, 60_000.0]),
        (3.0, 3.0, [3.0]),
        (0.0, 2.5e-323, [0.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert svg.ticks(low, high) == expected


def test_numbers_for_people() -> None:
    assert [svg.number(value) for value in (0.25, 1500, 12_000, 3_400_000, 999_960, 2.5e9)] == [
        "0.25", "1,500", "12k", "3.4M", "1,000k", "2.5G",
    ]  # fmt: skip
    assert [svg.share(value) for value in (0.0, 0.0794, 0.5, 0.9999, 1.0)] == ["0%", "7.9%", "50.0%", "100%", "100%"]
