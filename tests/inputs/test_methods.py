"""What a configuration and a session become: FAE's hot rows where re-plans change them, Slipstream's steps."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch

from tests.inputs.samples import numbered
from tests.tables import TBE, make_tbe
from torchrec_slipstream import (
    AccessConfig,
    AccessProfile,
    FaeInputs,
    InputError,
    InputsConfig,
    PlacementConfig,
    Slipstream,
    SlipstreamConfig,
    SlipstreamInputs,
    StalenessConfig,
    TableAccess,
)
from torchrec_slipstream.access import calibrate

ROWS, DIM, SIZE = 200, 8, 20
KEY = "0.table_0"
BUDGET = 4 * ROWS + 40 * (4 * DIM + 4)


FAE = InputsConfig(method="fae", fae=FaeInputs(window=4))


def fae_session(inputs: InputsConfig = FAE) -> tuple[TBE, Slipstream]:
    """Hot rows that re-plans find, every ten steps, by exact counts and no clock."""
    tbe = make_tbe((ROWS,), (DIM,))
    placement = PlacementConfig(
        hbm_budget=BUDGET, replan_every=10, min_gain=0.0, move_cost=0.0, max_stall_share=None, record_every=10
    )
    config = SlipstreamConfig(
        staleness=StalenessConfig(target_share=0.0),
        access=AccessConfig(counter="exact"),
        placement=placement,
        inputs=inputs,
    )
    return tbe, Slipstream(nn.ModuleList([tbe]), config)


def turning(batches: int) -> list[Batch]:
    """One look-up a sample; which rows are popular changes every 25 batches. The dense feature: the batch's number."""
    random = np.random.default_rng(0)
    share = 1.0 / np.arange(1, ROWS + 1)
    found = []
    for number in range(batches):
        rows = (random.choice(ROWS, SIZE, p=share / share.sum()) + 60 * (number // 25)) % ROWS
        features = KeyedJaggedTensor([KEY], torch.from_numpy(rows), lengths=torch.ones(SIZE, dtype=torch.int64))
        found.append(Batch(torch.full((SIZE, 1), float(number)), features, torch.zeros(SIZE)))
    return found


def train(tbe: TBE, session: Slipstream, stream: Iterator[Batch], steps: int | None = None) -> list[Any]:
    """Of each batch: the numbers of those it was read in, its rows, and how many of its look-ups the overlay served."""
    (overlay,) = session._hot.overlays
    assert overlay is not None
    seen: list[Any] = []
    while (steps is None or len(seen) < steps) and (batch := next(stream, None)) is not None:
        before = int(overlay.hits.sum())
        features = batch.sparse_features
        tbe(features.values(), features.offsets()).square().sum().backward()
        hits = int(overlay.hits.sum()) - before
        session.step()
        seen.append((batch.dense_features.view(-1).tolist(), features.values().tolist(), hits))
    return seen


def test_fae_follows_the_overlay_through_re_plans() -> None:
    """Of what was read since the rows last changed, hot batches look up the overlay alone, and cold ones never."""
    tbe, session = fae_session()
    moves: dict[int, int] = {}  # by input batch, the re-plans before it was read

    def loader() -> Iterator[Batch]:
        for number, batch in enumerate(turning(100)):
            moves[number] = sum(one.moved for one in session._hot.replans)
            yield batch

    counts: Counter[str] = Counter()
    for numbers, rows, hits in _with_moves(tbe, session, session.inputs(loader()), moves):
        counts["batches"] += 1
        if numbers:
            counts["hot" if hits else "cold"] += 1
            assert hits in (0, len(rows))
    assert len(session._hot.replans) > 5
    assert len({*moves.values()}) > 3
    assert min(counts["hot"], counts["cold"]) > 10


def _with_moves(
    tbe: TBE, session: Slipstream, stream: Iterator[Batch], moves: dict[int, int]
) -> Iterator[tuple[bool, list[int], int]]:
    """Of each step: whether its samples were read since the rows last changed, its rows and hits."""
    while True:
        now = sum(one.moved for one in session._hot.replans)
        if not (found := train(tbe, session, stream, 1)):
            return
        ((numbers, rows, hits),) = found
        yield all(moves[int(number)] == now for number in numbers), rows, hits


@pytest.mark.parametrize("stop", [7, 33, 61])
def test_fae_resumes_with_the_rows_that_are_hot_by_then(stop: int) -> None:
    data = turning(80)
    tbe, whole = fae_session()
    want = train(tbe, whole, whole.inputs(data))
    tbe, first = fae_session()
    head = train(tbe, first, first.inputs(data), stop)
    state = copy.deepcopy(first.state_dict())
    tbe, second = fae_session()
    second.load_state_dict(state)
    assert head + train(tbe, second, second.inputs(data)) == want
    assert len(second._hot.replans) > 4


HOT_ROWS = 40 * (4 * DIM + 4)


def counted() -> AccessProfile:
    counts = np.arange(ROWS, dtype=np.int32)
    return AccessProfile([TableAccess("table_0", ROWS, DIM, counts, lookups=int(counts.sum()), optimizer_bytes=4)], 100)


@pytest.mark.parametrize(
    ("method", "hot_bytes", "given", "match"),
    [
        ("slipstream", None, ("profile",), "hot_bytes, which is None: all rows are hot. Give hot_bytes, or no profile"),
        ("fae", None, ("calibration",), "give inputs.. the profile that it was made from as well"),
        ("fae", HOT_ROWS, (), "give inputs.. a profile, or leave hot_bytes at None"),
        ("fae", HOT_ROWS, ("test_loss",), "give inputs.. a profile, or leave hot_bytes at None"),
        ("fae", HOT_ROWS, ("profile", "calibration"), "say which rows are hot; give one of the two"),
        ("fae", HOT_ROWS, ("calibration",), "say which rows are hot; give one of the two"),
        ("fae", None, ("profile",), "inputs.. a profile, and FaeInputs hot_bytes or inputs.. a calibration"),
    ],
)
def test_what_says_which_rows_are_hot_is_heeded_or_refused(
    method: str, hot_bytes: int | None, given: tuple[str, ...], match: str
) -> None:
    """Also where the session has hot rows of its own."""
    config = InputsConfig(
        method=method, slipstream=SlipstreamInputs(hot_bytes=hot_bytes), fae=FaeInputs(hot_bytes=hot_bytes)
    )
    _, session = fae_session(config)
    profile = counted()
    things = {"profile": profile, "calibration": calibrate(profile, HOT_ROWS, small_table=0), "test_loss": lambda: 0.0}
    with pytest.raises(InputError, match=match):
        session.inputs(turning(3), **{name: things[name] for name in given})


def slipstream_session(**more: Any) -> Slipstream:
    inputs = InputsConfig(method="slipstream", slipstream=SlipstreamInputs(min_touches=1, search_window=1.0, **more))
    config = SlipstreamConfig(staleness=StalenessConfig(target_share=0.0), inputs=inputs)
    return Slipstream(nn.ModuleList([make_tbe((ROWS,), (DIM,))]), config)


@pytest.mark.parametrize(("share", "batches", "steps"), [(0.015, 1000, 15), (0.015, 3, 1), (0.5, 7, 4)])
def test_the_second_snapshot_is_a_share_of_the_epoch_later(share: float, batches: int, steps: int) -> None:
    session = slipstream_session(snapshot_share=share, start=2)
    session.inputs([numbered(range(4))] * batches)
    session._inputs.step(1)  # a method's steps are counted from its first batch
    for step in range(2, steps + 2):
        session._inputs.step(step)
        assert bool(_searches(session)) == (step == steps + 2)
    session._inputs.step(steps + 2)
    assert _searches(session) == [steps + 2]


def _searches(session: Slipstream) -> list[int]:
    report = session.report().inputs
    assert report is not None
    return [one.step for one in report.searches]


def test_a_share_of_an_epoch_without_a_length_is_refused() -> None:
    session = slipstream_session(snapshot_share=0.5)
    with pytest.raises(InputError, match=r"snapshot_share=0.5.*generator has no length.*give snapshot_steps instead"):
        session.inputs(batch for batch in turning(3))
