"""The harness: turns, percentiles, and a CSV that is only ever appended to."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from benchmarks.harness import COLUMNS, Row, Timing, interleaved, record


def row(provider: str = "stock", p50: float = 2.0) -> Row:
    return Row("what", provider, {"rows": 10, "a": "x,y"}, Timing((p50 - 1, p50, p50 + 1)), "ms", {"exact": True})


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_providers_take_turns_and_who_goes_first_rotates() -> None:
    calls: list[tuple[str, int]] = []
    providers = {name: (lambda turn, name=name: calls.append((name, turn))) for name in "abc"}
    timings = interleaved(providers, 3, 1)
    assert calls == [
        *[("a", 0), ("b", 0), ("c", 0)],
        *[("b", 1), ("c", 1), ("a", 1)],
        *[("c", 2), ("a", 2), ("b", 2)],
        *[("a", 3), ("b", 3), ("c", 3)],
    ]
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_warmup_is_not_measured_and_times_are_in_seconds() -> None:
    import time

    timings = interleaved({"slow at first": lambda turn: time.sleep(0.2 if turn == 0 else 0.01)}, 3, 1)
    assert 0.01 <= timings["slow at first"].p50 < 0.15
    assert timings["slow at first"].mean < 0.15


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_no_rounds_are_refused(rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"rounds={rounds}, warmup={warmup}"):
        interleaved({"a": lambda turn: None}, rounds, warmup)


def test_percentiles() -> None:
    timing = Timing((*map(float, range(11)), 100.0))
    assert (timing.p20, timing.p50, timing.p80) == pytest.approx((2.2, 5.5, 8.8))
    assert timing.mean == pytest.approx(155 / 12)


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    path = tmp_path / "new" / "all.csv"
    record([row(), row("ours", 1.0)], path)
    before = path.read_bytes()
    record([row("other")], path)
    assert path.read_bytes().startswith(before)
    rows = read(path)
    assert [one["provider"] for one in rows] == ["stock", "ours", "other"]
    assert tuple(rows[0]) == COLUMNS
    assert json.loads(rows[0]["parameters"]) == {"rows": 10, "a": "x,y"}
    assert json.loads(rows[0]["quality"]) == {"exact": True}
    assert [float(rows[0][name]) for name in ("p20", "p50", "p80")] == pytest.approx([1.4, 2.0, 2.6])
    assert all(rows[0][name] not in ("", "unknown") for name in COLUMNS)
    assert rows[0]["date"].endswith("+00:00")


@pytest.mark.parametrize(
    ("content", "said"),
    [("question,other\n", "has the header"), (",".join(COLUMNS) + "\nhalf,a", "ends within a row")],
)
def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "all.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        record([row()], path)
    assert path.read_text() == content


def test_a_write_that_falls_short_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "all.csv"
    record([row()], path)
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
    with pytest.raises(OSError, match="could not write"):
        record([row()], path)
    monkeypatch.undo()
    assert path.read_bytes() == before
