"""The tracker's state: what it holds of a long run, on whatever device it comes, and what loading it leaves behind."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.staleness.test_tracker import ROWS, config, lookups_of, tracker_of, train
from tests.tables import make_tbe
from torchrec_slipstream import Report, Slipstream
from torchrec_slipstream.report import thinning
from torchrec_slipstream.report.report import Decision


def session_after(steps: int, **changes: object) -> Slipstream:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config(**changes))
    train(tbe, session, range(steps))
    return session


def test_a_long_runs_decisions_are_thinned_and_the_report_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, object] = {
        "selection": "threshold", "signal": "movement", "interval": 2, "warmup_steps": 4, "thaw_every": 3,
    }  # fmt: skip
    whole = session_after(200, **changes).report()
    assert len(whole.decisions) == whole.decisions_made == 99
    monkeypatch.setattr(thinning, "MOST", 10)
    session = session_after(200, **changes)
    thinned = session.report()
    assert 5 <= len(thinned.decisions) <= 10
    assert len(session.state_dict()["staleness"]["decisions"]) == len(thinned.decisions)
    steps = [one.step for one in thinned.decisions]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (4, 200)
    by_step = {one.step: one for one in whole.decisions}
    for one in thinned.decisions:
        mine = replace(one, seconds=0.0, before=0, thawed_before=0, refrozen_before=0)
        assert mine == replace(by_step[one.step], seconds=0.0)
    assert thinned.decisions_made == 99
    assert ", 99 decisions" in str(thinned)
    assert thinned.refreeze_rate == whole.refreeze_rate is not None
    assert thinned.measured_share == whole.measured_share
    assert Report.from_dict(json.loads(json.dumps(thinned.to_dict()))) == thinned


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 40, 41])
def test_thinning_keeps_first_and_last_and_loses_no_count(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinning, "MOST", 4)
    entries = [Decision(step, 0, 0, step, 1, 0.0, 0.0, 0.0) for step in range(count)]
    thinning.thin(entries, Decision.join)
    assert len(entries) == count if count <= 4 else 3 <= len(entries) <= 4
    assert (entries[0].step, entries[-1].step) == (0, count - 1)
    assert sum(1 + one.before for one in entries) == count
    assert sum(one.thawed_before + one.thawed_rows for one in entries) == sum(range(count))
    assert sum(one.refrozen_before + one.refrozen_rows for one in entries) == count


def test_a_state_is_checked_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_after(60, selection="duty", signal="movement")
    state = session.state_dict()["staleness"]
    copied: list[int] = []

    def clone(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        copied.append(tensor.numel())
        return tensor.detach()

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    tracker_of(session).check(state)
    assert copied == []


def test_what_was_saved_stays_as_it_was() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config(selection="duty", signal="movement"))
    train(tbe, session, range(60))
    state = session.state_dict()["staleness"]
    told = str(state)
    for step in range(60, 90):
        lookups_of(step).run(tbe).sum().backward()
        session.step()
    assert str(state) == told
    assert int(state["shards"][".table_1@0:0"]["pool.rows"][0]) < ROWS[1], "rows of the shard, not of the TBE"


def test_seconds_begin_anew_with_a_loaded_state() -> None:
    session = session_after(120)
    state = session.state_dict()
    assert tracker_of(session).seconds > 0.0
    session.load_state_dict(state)
    report = session.report()
    assert report.tracker_seconds == 0.0
    assert "tracker: 0.00 s of 0.0" in str(report)
    assert "(0.0%), 9 decisions" in str(report)


class _Elsewhere(torch.Tensor):
    """A tensor that, as one on another device, cannot be the value of an index of bools before it is moved."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__setitem__:
            raise RuntimeError("expected the value on the device of self")
        found = super().__torch_function__(func, types, args, kwargs or {})
        return found.as_subclass(torch.Tensor) if func is torch.Tensor.to else found


def test_counts_of_features_are_moved_to_the_tbes_device() -> None:
    session = session_after(60)
    state = session.state_dict()
    for part in state["staleness"]["shards"].values():
        for name in ("lookups", "skipped"):
            part[name] = part[name].as_subclass(_Elsewhere)
    session.load_state_dict(state)
    assert session.report().total.lookups == 60 * 120


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_on_the_cpu_loads_on_a_gpu() -> None:
    """``torch.load(..., map_location="cpu")`` is what most checkpoints go through."""
    state = session_after(60, selection="duty", signal="movement").state_dict()
    tbe = make_tbe(ROWS, (8, 8), device="cuda")
    fresh = Slipstream(tbe, config(selection="duty", signal="movement"))
    fresh.load_state_dict(state)
    (one,) = fresh._filters
    assert one.lookups.device.type == "cuda"
    assert int(one.lookups.sum()) == 60 * 120
    again = fresh.state_dict()["staleness"]["shards"]
    for key, part in state["staleness"]["shards"].items():
        for name, value in part.items():
            torch.testing.assert_close(again[key][name].cpu(), value, rtol=0, atol=0, equal_nan=True)
