"""Runs' records: what is written is what is read, and what is no record is told from one."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.report.runs import dlrm_run, input_report, session_report
from torchrec_slipstream import ConfigError, Report
from torchrec_slipstream.report.page import page
from torchrec_slipstream.report.payoff import Payoff
from torchrec_slipstream.report.record import FORMAT, RunRecord, load, load_all


@pytest.fixture(scope="module")
def report() -> Report:
    found = session_report(where="faster")
    assert len(found.payoffs) == 1
    return found


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    return json.loads(json.dumps(dlrm_run()))


def test_a_sessions_record_is_read_as_written(report: Report, tmp_path: Path) -> None:
    history: list[Any] = [
        {"step": np.int64(50), "auc": np.float32(0.5)},
        {"step": 100, "auc": math.nan, "log_loss": 0.25},
    ]
    report.save(tmp_path / "mine.json", history=history, step_ms={"forward": 1.5, "median": 4})
    (found,) = load(tmp_path / "mine.json")
    assert found.report == report
    assert found.name == "mine", "a session has no name but its file's"
    assert found.history == [{"step": 50, "auc": 0.5}, {"step": 100, "auc": None, "log_loss": 0.25}]
    assert found.step_ms == {"forward": 1.5, "median": 4.0}
    # Of the package, which does not say for which CUDA it was built.
    assert found.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found.versions["torchrec"][0].isdigit()
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"], "no temporary file is left"


def test_train_dlrms_result_is_a_record(run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(run))
    (found,) = load(tmp_path / "one.json")
    assert found.report == Report.from_dict(run["slipstream"])
    assert found.report is not None
    assert found.report.placement is not None
    assert found.name == "skip everywhere"
    assert found.history == run["history"]
    assert found.step_ms == run["step_ms"]
    assert found.best_possible == run["best_possible"]
    assert found.facts["world_size"] == 1
    assert "plan" not in found.facts, "plain values only"


def test_runs_side_by_side_have_names_of_their_own(run: dict[str, Any], tmp_path: Path) -> None:
    bare = {**run, "slipstream": None, "name": "skip off"}
    (tmp_path / "a.json").write_text(json.dumps({"off": bare, "rows": run}))
    (tmp_path / "b.json").write_text(json.dumps(run))
    first, second = load(tmp_path / "a.json")
    assert (first.name, first.report, second.name) == ("skip off", None, "skip everywhere")
    found = load_all([tmp_path / "a.json", tmp_path / "b.json", tmp_path / "b.json"])
    names = ["skip off", "a: skip everywhere", "b: skip everywhere", "b: skip everywhere (2)"]
    assert [one.name for one in found] == names
    assert found[3].report == found[1].report


@pytest.mark.parametrize(
    ("history", "step_ms", "said"),
    [
        ([{"auc": 0.5}], None, r"history: \{'auc': 0.5\} has no step; give entries such as"),
        ([{"step": 1.5}], None, r"history: \{'step': 1.5\} has no step"),
        ([0.5], None, "history: 0.5 has no step"),
        ([{"step": 1, "auc": "high"}], None, "history, step 1: 'auc' is 'high'; give a number"),
        ([], {"forward": None}, "step_ms: 'forward' is None; give milliseconds as a number"),
    ],
)
def test_what_is_not_a_metric_is_not_written(
    history: list[Any], step_ms: Any, said: str, report: Report, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        report.save(tmp_path / "run.json", history=history, step_ms=step_ms)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written(report: Report, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere.*run.json: No such file or directory; give a path"):
        report.save(tmp_path / "nowhere" / "run.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: "hello", "is not a run's record; give what Report.save or"),
        (lambda run: [run], "is not a run's record"),
        (lambda run: {}, "is not a run's record"),
        (lambda run: run["slipstream"], "is not a run's record"),
        (lambda run: {"one": run, "two": {"format": "another"}}, "is not a run's record"),
        (lambda run: {**run, "format": "torchrec_slipstream.bandwidths"}, "is not a run's record"),
        (lambda run: {**run, "version": 2}, "is of version 2, and this release reads version 1; update torchrec_sl"),
        (lambda run: {**run, "version": 0}, "is of version 0, .*; give what .* wrote in this release"),
        (lambda run: {key: run[key] for key in run if key != "slipstream"}, r"is damaged \(KeyError: 'slipstream'\)"),
        (lambda run: {**run, "slipstream": {**run["slipstream"], "steps": "many"}}, "damaged .*steps is 'many'"),
        (lambda run: {**run, "slipstream": {**run["slipstream"], "decisions": [{"step": 1}]}}, "is damaged"),
        (lambda run: {**run, "history": [{"auc": 1}]}, "has no step"),
        (lambda run: {**run, "step_ms": 7}, "is damaged"),
    ],
)
def test_what_is_no_record_is_refused(
    change: Callable[[dict[str, Any]], Any], said: str, run: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(change(json.loads(json.dumps(run)))))
    with pytest.raises(ConfigError, match=said) as raised:
        load(path)
    assert str(raised.value).startswith(f"{path} ")


def test_files_that_are_not_json(tmp_path: Path) -> None:
    for content in (b"hello", b"\xff\xfe", b'{"format": "torch', b""):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"run.json is not JSON \(.*\); give what Report.save or"):
            load(tmp_path / "run.json")
    with pytest.raises(ConfigError, match=r"none.json: No such file or directory; give what"):
        load(tmp_path / "none.json")


def test_reports_on_inputs_are_read_as_written_also_older_ones(report: Report) -> None:
    with_inputs = replace(report, inputs=input_report())
    values = json.loads(json.dumps(RunRecord(report=with_inputs).to_dict()))
    assert RunRecord.from_dict(values).report == with_inputs
    for added in ("tables", "lanes", "searches", "classified", "hot"):
        del values["slipstream"]["inputs"][added]
    older = RunRecord.from_dict(values)
    plain = replace(input_report(), tables={}, lanes={}, searches=[], classified=0, hot=0)
    assert older.report == replace(report, inputs=plain)
    assert "Look-ups dropped with their samples, by feature" in page([older])
    del values["slipstream"]["inputs"]
    assert RunRecord.from_dict(values).report == report


def test_every_wrong_value_is_refused_or_drawn(run: dict[str, Any]) -> None:
    """Whatever has become of a value, a page is drawn or a ConfigError says that the file is damaged."""
    for holder in (run["slipstream"], run["slipstream"]["placement"]):
        holder["tables"] = dict(list(holder["tables"].items())[:1])
    inputs = run["slipstream"]["inputs"] = json.loads(json.dumps(input_report("thinning").to_dict()))
    for counts in ("features", "tables", "lanes"):
        inputs[counts] = dict(list(inputs[counts].items())[:1])
    run["slipstream"]["payoffs"] = [Payoff(["m.t_1"], 132, 2.0, 3.0, pays=False).to_dict()]
    text = json.dumps(run)
    refused = 0
    for path in _places(run):
        wrong: Any
        for wrong in ("x", None, {}, -1):
            changed = json.loads(text)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = wrong
            try:
                record = RunRecord.from_dict(changed, "run")
            except ConfigError:
                refused += 1
                continue
            page([record])
    assert refused > 100


@pytest.mark.parametrize("wrong", [1e308, -1e308, 10**400, math.inf, 5e-324])
def test_a_number_that_no_run_has_is_refused_or_drawn(wrong: float, run: dict[str, Any]) -> None:
    """A page adds and subtracts numbers, and takes their logarithms, for which these are too large or too small."""
    text = json.dumps(run | {"slipstream": run["slipstream"] | {"inputs": input_report("thinning").to_dict()}})
    for path in _places(json.loads(text)):
        changed = holder = json.loads(text)
        for key in path[:-1]:
            holder = holder[key]
        if isinstance(holder[path[-1]], bool | None) or not isinstance(holder[path[-1]], int | float):
            continue
        holder[path[-1]] = wrong
        try:
            record = RunRecord.from_dict(changed, "run")
        except ConfigError:
            continue
        assert not re.search(r'="[^"]*\b(nan|inf)\b', page([record])), path


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("slipstream", "placement", "replans", 0, "step"), 1e308, r"damaged \(TypeError: step is 1e\+308\)"),
        (("slipstream", "decisions", 0, "step"), 1.5, r"damaged \(TypeError: step is 1.5\)"),
        (("step_ms", "median"), 1e308, r"damaged \(TypeError: step_ms: 'median' is 1e\+308\)"),
        (("best_possible", "auc"), 10**400, r"damaged \(TypeError: best_possible: 'auc' is 1000"),
        (("history", 0, "step"), 10**400, "has no step; give entries"),
    ],
)
def test_a_damaged_number_is_named(path: tuple[Any, ...], value: Any, said: str, run: dict[str, Any]) -> None:
    changed = holder = json.loads(json.dumps(run))
    for key in path[:-1]:
        holder = holder[key]
    assert path[-1] in holder or isinstance(path[-1], int)
    holder[path[-1]] = value
    with pytest.raises(ConfigError, match=said):
        RunRecord.from_dict(changed, "run")


def test_numbers_beyond_all_runs_are_written_as_null(report: Report, tmp_path: Path) -> None:
    """A metric that has diverged must not make the record one that cannot be read."""
    diverged: dict[str, Any] = {"step": 3, "loss": np.float32("inf")}
    report.save(tmp_path / "run.json", history=[{"step": 1, "loss": 1e200}, {"step": 2, "loss": 3e38}, diverged])
    (found,) = load(tmp_path / "run.json")
    assert found.history == [{"step": 1, "loss": None}, {"step": 2, "loss": 3e38}, {"step": 3, "loss": None}]


def _places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values lie, of lists only the first."""
    inner = values.items() if isinstance(values, dict) else enumerate(values[:1]) if isinstance(values, list) else ()
    return [place for key, one in inner for place in [(*path, key), *_places(one, (*path, key))]]


def test_the_format_is_named() -> None:
    assert RunRecord(report=None).to_dict()["format"] == FORMAT == "torchrec_slipstream.run"
