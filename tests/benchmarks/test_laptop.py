"""What `make bench` asks: every line is a benchmark, with arguments that it takes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = (ROOT / "benchmarks" / "laptop.txt").read_text().splitlines()


def test_every_question_that_a_laptop_can_answer_is_asked() -> None:
    asked = {line.split()[0] for line in QUESTIONS}
    assert asked >= {"throughput", "update_filter", "time_to_auc", "inputs", "hbm_budget", "replan", "profiler"}
    assert asked >= {"planning", "memory", "ranks", "projection"}


@pytest.mark.parametrize("line", QUESTIONS)
def test_its_arguments_are_taken(line: str) -> None:
    name, *arguments = line.split()
    parsed = importlib.import_module(f"benchmarks.{name}").parse_arguments(arguments)
    assert parsed.record, "what is measured is kept"
