"""The report on inputs: ranks add up, it says what it knows, and programs read it again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from examples.runtime import process_group
from tests.distributed.test_inputs import FAE, SLIPSTREAM, Training, data
from tests.inputs.samples import numbered
from tests.report.runs import input_report
from torchrec_slipstream import InputReport
from torchrec_slipstream.inputs.batches import select
from torchrec_slipstream.inputs.blind import NegativeSampling
from torchrec_slipstream.inputs.tally import Tally
from torchrec_slipstream.report.inputs import ClassCount, DropCount, LaneCount
from torchrec_slipstream.tbe.features import ModelTable


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    with process_group(torch.device("cpu")):
        yield


def test_a_session_tells_tables_and_lanes() -> None:
    run = Training(FAE, "table_wise")
    order = run.train(run.inputs(data(0, 0)))
    inputs = run.slip.report().inputs
    assert inputs is not None
    hot, cold = ([ids for ids in order if (ids[0] < 100) == is_hot] for is_hot in (True, False))
    assert inputs.lanes == {
        "cold": LaneCount(sum(map(len, cold)), len(cold)),
        "hot": LaneCount(sum(map(len, hot)), len(hot)),
    }
    assert len(hot) > len(cold) > 0
    assert inputs.tables == {f"tables.t{k}": inputs.features[f"f{k}"] for k in range(2)}
    assert inputs.searches == []
    assert f"batches a rank: {len(cold)} cold" in str(run.slip.report())


def test_a_session_tells_its_searches() -> None:
    run = Training(SLIPSTREAM, "table_wise")
    for _ in range(2):
        run.train(run.inputs(data(0, 0)))
    run.slip.detach()
    inputs = run.slip.report().inputs
    assert inputs is not None
    (search,) = inputs.searches
    assert (search.step, search.met) == (4, True)
    assert abs(search.share - SLIPSTREAM.drop_share) <= SLIPSTREAM.slipstream.search_window
    assert 0 < inputs.dropped < inputs.classified == inputs.hot < inputs.read == 300
    assert inputs.lanes == {}
    assert inputs.tables == {f"tables.t{k}": inputs.features[f"f{k}"] for k in range(2)}
    assert inputs.lookups.dropped > 0


def test_a_table_has_the_look_ups_of_all_its_features() -> None:
    tally = Tally()
    batch = numbered(range(9), keys=3)
    keep = torch.arange(9) > 2
    tally.count(batch, keep, None, [select(batch, torch.arange(3, 9))])
    tables = [
        ModelTable("m.one", "one", ("f0", "f2"), 10, 4),
        ModelTable("m.two", "two", ("f2",), 10, 4),
        ModelTable("m.other", "other", ("g",), 10, 4),
    ]
    inputs = tally.report("random", 0, tables)
    assert inputs.tables == {"m.one": inputs.features["f0"] + inputs.features["f2"], "m.two": inputs.features["f2"]}
    assert inputs.features["f0"] == DropCount(9, 3)
    assert tally.report("random", 0).tables == {}


def test_ranks_add_up() -> None:
    one = input_report()
    other = replace(one, epochs=1, tables={"m.ebc.t_1": DropCount(5, 5), "m.ebc.t_2": DropCount(1, 1)}, hot=7)
    both = one + other
    assert (both.epochs, both.read, both.used, both.dropped, both.kept_weight) == (2, 2000, 1380, 600, 1400.0)
    assert (both.classified, both.hot) == (1200, 407)
    assert both.classes == {"negative": ClassCount(1600, 560, 1040.0), "positive": ClassCount(400, 40, 360.0)}
    assert both.labels == {"0": DropCount(1600, 560), "1": DropCount(400, 40)}
    assert both.tables == {
        "m.ebc.t_0": DropCount(2400, 550),
        "m.ebc.t_1": DropCount(15, 5),
        "m.ebc.t_2": DropCount(1, 1),
    }
    assert both.lanes == {"cold": LaneCount(900, 40), "hot": LaneCount(480, 20)}, "ranks take as many batches"
    assert both.searches == one.searches, "which all ranks made together"
    assert both.lookups == DropCount(2 * 2410, 2 * 550)


def test_it_is_read_as_written() -> None:
    for one in (input_report(), input_report("thinning")):
        assert InputReport.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_it_says_what_it_knows() -> None:
    text = str(input_report())
    assert "dropped: 35.0% of label 0, 10.0% of label 1" in text
    assert "look-ups dropped with them: 22.8%; from 0.0% (t_1) to 22.9% (t_0)\n" in text
    assert "batches a rank: 40 cold (450 samples), 20 hot (240 samples)" in text
    assert "step 20: threshold 0.0125, 37 rows stale, for 55.0% of 64 sampled hot inputs\n" in text
    assert "step 60: threshold 0.25, 5 rows stale, for 12.5% of 60 sampled hot inputs (the share asked for was" in text
    assert "of the inputs read while stale rows were known, 50.0% were dropped, 75.0% of the hot ones" in text
    assert "logits" not in text
    assert "add -0.3254 to the model's logits" in str(input_report("thinning"))
    alike = replace(input_report(), tables={"a.t": DropCount(8, 2), "b.t": DropCount(4, 1)})
    assert "look-ups dropped with them: 22.8%\n" in str(alike)
    bare = replace(input_report(), tables={}, lanes={}, searches=[], classified=0)
    assert "from 0.0% (f2) to 30.0% (f0)" in str(bare)
    assert len(str(bare).splitlines()) == 3


def test_the_logits_are_put_right_for_what_was_dropped_and_for_the_weight_of_positives() -> None:
    def shift(negative: ClassCount, positive: ClassCount, method: str = "thinning") -> float:
        classes = {"negative": negative, "positive": positive}
        return replace(input_report(method), labels={}, classes=classes).logit_shift

    thinned, all_of_them = ClassCount(900, 300, 600.0), ClassCount(100, 0, 100.0)
    assert shift(thinned, all_of_them) == shift(thinned, all_of_them, "negatives") == pytest.approx(math.log(2 / 3))
    assert shift(thinned, ClassCount(100, 0, 400.0)) == pytest.approx(math.log(2 / 3 / 4))
    assert shift(ClassCount(900, 0, 900.0), ClassCount(100, 0, 400.0)) == pytest.approx(-math.log(4))
    assert shift(thinned, all_of_them, "random") == 0.0
    # Those that were kept count for those dropped:
    assert shift(ClassCount(900, 300, 890.0), all_of_them, "negatives") == 0.0
    assert shift(ClassCount(900, 900, 0.0), all_of_them) == 0.0
    assert replace(input_report("thinning"), classes={}).logit_shift == 0.0


@pytest.mark.parametrize("labels", [(0.0, 1.0), (-1.0, 1.0), (0.5, 0.75), None])
@pytest.mark.parametrize("positive_weight", [1.0, 2.5])
def test_the_shift_goes_by_the_negatives_of_the_method_whatever_the_labels(
    labels: tuple[float, float] | None, positive_weight: float
) -> None:
    """Of two labels, and of more values than are reported one by one; after a resume as before."""
    selector = NegativeSampling(0.4, weighs=False, positive_weight=positive_weight)
    tally = Tally()
    kept_negatives = 0
    for step in range(10):
        draw = torch.rand(200, generator=torch.Generator().manual_seed(step))
        is_positive = draw < 0.25
        values = torch.where(is_positive, labels[1], labels[0]) if labels else 1.0 - draw
        is_negative = values <= 0.5
        batch = replace(numbered(range(200)), labels=values)
        choice = selector.choose(batch)
        tally.count(batch, choice.keep, choice.weight, [])
        kept_negatives += int((is_negative & choice.keep).sum())
    resumed = Tally()
    resumed.load_state_dict(json.loads(json.dumps(tally.state_dict())))
    for report in (tally.report("thinning", 0), resumed.report("thinning", 0)):
        negative = report.classes["negative"]
        assert negative.read - negative.dropped == kept_negatives < negative.read
        want = math.log(kept_negatives / negative.read / positive_weight)
        assert report.logit_shift == pytest.approx(want)
        assert report.labels.keys() == {f"{one:g}" for one in labels or ()}
