"""Real runs for the tests of records and pages, and how a page is read."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from examples.arguments import parse_arguments
from examples.runtime import process_group
from examples.train_dlrm import train
from tests.staleness.test_tracker import ROWS, config
from tests.staleness.test_tracker import train as steps_of
from tests.tables import make_tbe
from torchrec_slipstream import InputReport, Report, Slipstream
from torchrec_slipstream.report.inputs import ClassCount, DropCount, LaneCount, SearchReport

_EMPTY = ("meta", "br")


def session_report(names: tuple[str, str] = ("users", "items"), **changes: object) -> Report:
    """The report of a session alone, over two tables and 100 steps."""
    tbe = make_tbe(ROWS, (8, 8), table_names=list(names))
    session = Slipstream(tbe, config(**changes))
    steps_of(tbe, session, range(100))
    return session.report()


def dlrm_run(*more: str) -> dict[str, Any]:
    """What a short run of train_dlrm.py writes with --json; hot rows planned and re-planned, updates left out."""
    small = "--rows-per-table 200 --embedding-dim 8 --dense-mlp 16 --over-mlp 16 --samples 4000 --batch-size 50"
    rest = "--evaluations 3 --skip everywhere --interval 8 --warmup-steps 16 --device cpu --sharding table_wise"
    hot = "--placement planned --hbm-budget 25% --replan-every 8"
    with process_group(torch.device("cpu")):
        return train(parse_arguments([*f"{small} {rest} {hot}".split(), *more]))


def input_report(method: str = "slipstream") -> InputReport:
    """Of two ranks, with all that a report on inputs may say."""
    return InputReport(
        method=method,
        epochs=2,
        read=1000,
        used=690,
        dropped=300,
        left_over=1,
        waiting=9,
        kept_weight=700.0,
        classes={"negative": ClassCount(800, 280, 520.0), "positive": ClassCount(200, 20, 180.0)},
        labels={"0": DropCount(800, 280), "1": DropCount(200, 20)},
        features={"f0": DropCount(1500, 450), "f1": DropCount(900, 100), "f2": DropCount(10, 0)},
        tables={"m.ebc.t_0": DropCount(2400, 550), "m.ebc.t_1": DropCount(10, 0)},
        lanes={"cold": LaneCount(450, 40), "hot": LaneCount(240, 20)},
        searches=[SearchReport(20, 0.0125, 0.55, True, 64, 37), SearchReport(60, 0.25, 0.125, False, 60, 5)],
        classified=600,
        hot=400,
    )


class Page(HTMLParser):
    """A page's tags, its text and its charts; every tag that opens must close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []
        self.charts = {
            chart.get("aria-label"): chart
            for chart in (ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", html, re.DOTALL))
        }

    @staticmethod
    def of(path: Path) -> Page:
        return Page(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in _EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def said(self, chart: str) -> list[str]:
        """The tooltips of a chart."""
        return [one.text or "" for one in self.charts[chart].iter("title")]
