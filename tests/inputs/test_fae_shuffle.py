"""FAE's shuffle scheduler with scripted losses."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchrec_slipstream.config import FaeInputs
from torchrec_slipstream.errors import StateError
from torchrec_slipstream.inputs.choice import OneLane, Scheduler
from torchrec_slipstream.inputs.fae import ShuffleScheduler


class Script:
    """A test loss that reads from a list, and repeats the last."""

    def __init__(self, losses: Iterable[float]) -> None:
        self.losses = list(losses)
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return self.losses[min(self.asked, len(self.losses)) - 1]


def drained(scheduler: Scheduler, *windows: tuple[int, ...]) -> list[str]:
    """The order of each window's batches, as letters c and h."""
    orders = []
    for window in windows:
        waiting, order = list(window), ""
        while any(waiting):
            lane = scheduler.next(waiting)
            assert waiting[lane] > 0
            waiting[lane] -= 1
            order += "ch"[lane]
        orders.append(order)
    return orders


@pytest.mark.parametrize(
    ("rate", "window", "order"),
    [
        (50, (4, 6), "cchhhcchhh"),
        (100, (3, 2), "ccchh"),
        (1, (3, 2), "chchc"),
        (25, (8, 4), "cchcchcchcch"),
        (50, (3, 3), "cchhch"),  # a turn is rounded up
        (50, (0, 4), "hhhh"),
        (50, (5, 0), "ccccc"),
        (30, (10, 1), "ccchccccccc"),  # the lane that is used up takes no more turns
    ],
)
def test_turns(rate: float, window: tuple[int, int], order: str) -> None:
    assert drained(ShuffleScheduler(FaeInputs(window=8, rate=rate)), window, window) == [order, order]


def test_loss_is_asked_for_after_each_swap() -> None:
    loss = Script(range(9, 0, -1))
    scheduler = ShuffleScheduler(FaeInputs(window=8, patience=99), loss)
    drained(scheduler, (4, 6))
    assert loss.asked == 3  # cc|hhh|cc|hhh
    drained(scheduler, (4, 6))
    assert loss.asked == 7  # and one more, from hot to the next window's cold
    drained(scheduler, (0, 5), (0, 5))
    assert loss.asked == 7  # hot after hot is no swap


def test_all_hot_and_all_cold_never_ask() -> None:
    loss = Script([1.0])
    scheduler = ShuffleScheduler(FaeInputs(window=8, rate=50), loss)
    drained(scheduler, (0, 5), (0, 9))
    assert loss.asked == 0
    drained(ShuffleScheduler(FaeInputs(window=8, rate=50), loss), (7, 0), (1, 0))
    assert loss.asked == 0


@pytest.mark.parametrize(
    ("losses", "rates"),
    [
        # The first has none before it; four falls in a row double, and are counted anew.
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], [20, 20, 20, 20, 40, 40, 40, 40, 80]),
        ([9, 8, 7, 6, 6, 5], [20, 20, 20, 20, 10, 10]),  # the same again is no fall, and begins the count anew
        ([1, 2, 3, 4, 5, 6, 7], [20, 10, 5, 2.5, 1.25, 1, 1]),  # the floor
        ([9, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3], [20] * 4 + [40] * 4 + [80] * 4 + [100]),  # the cap
        ([9, 8, math.nan, 7, 6, 5, 4], [20, 20, 10, 10, 10, 10, 20]),  # NaN did not fall, and is not compared with
        ([math.nan, 5, 4], [20, 20, 20]),
        ([math.inf, 5, math.inf, 4], [20, 20, 10, 10]),
    ],
)
def test_rate_follows_losses(losses: list[float], rates: list[float]) -> None:
    scheduler = ShuffleScheduler(FaeInputs(window=8, rate=20))
    found = []
    for loss in losses:
        scheduler.observe(loss)
        found.append(scheduler.rate)
    assert found == rates


def test_swaps_change_the_rate_of_the_turns_to_come() -> None:
    """The first loss has none before it; each of the six after it halves the rate of the turn that it begins."""
    scheduler = ShuffleScheduler(FaeInputs(window=8, rate=100), Script([1, 2, 3, 4, 5, 6, 7, 8]))
    assert drained(scheduler, (4, 4), (4, 4)) == ["cccchhhh", "cchchchh"]
    assert scheduler.rate == 100 / 2**6


def test_losses_of_all_ranks_count() -> None:
    asked: list[list[float]] = []

    def total(values: Tensor) -> Tensor:
        asked.append(values.tolist())
        return values + torch.tensor([3.0, 1.0], dtype=torch.float64)  # the other rank's loss is 3

    scheduler = ShuffleScheduler(FaeInputs(window=8, rate=100), Script([1.0, 2.0]), total=total)
    drained(scheduler, (1, 1), (1, 1))
    assert asked == [[1.0, 1.0], [2.0, 1.0], [2.0, 1.0]]
    assert scheduler.state_dict()["loss"] == 2.5


def test_without_a_test_loss_the_rate_stays() -> None:
    scheduler = ShuffleScheduler(FaeInputs(window=8, rate=30))
    drained(scheduler, (9, 9), (9, 9))
    assert scheduler.rate == 30


@given(
    windows=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4),
    losses=st.lists(st.floats(0, 1), min_size=1, max_size=20),
    rate=st.floats(1, 100),
    stop=st.integers(0, 40),
)
def test_resumes_bit_for_bit(windows: list[tuple[int, int]], losses: list[float], rate: float, stop: int) -> None:
    script = Script(losses)
    whole = ShuffleScheduler(FaeInputs(window=8, rate=rate), script)
    first, orders, states = [], [], []
    for window in windows:
        waiting = list(window)
        while any(waiting):
            states.append((whole.state_dict(), script.asked))
            first.append(list(waiting))
            lane = whole.next(waiting)
            orders.append(lane)
            waiting[lane] -= 1
        assert waiting == [0, 0]
    if not first:
        return
    stop %= len(first)
    again = Script(losses)
    state, again.asked = states[stop]
    resumed = ShuffleScheduler(FaeInputs(window=8, rate=77), again)
    resumed.load_state_dict(state)
    assert [resumed.next(waiting) for waiting in first[stop:]] == orders[stop:]
    assert resumed.state_dict() == whole.state_dict()


def test_short_batches_join_the_last_window() -> None:
    scheduler = ShuffleScheduler(FaeInputs(window=8, rate=50))
    assert [scheduler.next(waiting) for waiting in ([2, 2], [1, 2])] == [0, 1]
    # The epoch is over: a short batch of each lane waits besides, which makes the window one of 3 and 3.
    assert drained(scheduler, (2, 2)) == ["cchh"]


@pytest.mark.parametrize("taken", range(1, 11))
def test_a_new_epoch_begins_with_a_new_window(taken: int) -> None:
    scheduler = ShuffleScheduler(FaeInputs(window=8, rate=50, patience=99), Script(range(99, 0, -1)))
    waiting = [4, 6]
    for _ in range(taken):  # the window is broken off after so many batches
        waiting[scheduler.next(waiting)] -= 1
    before = scheduler.state_dict()
    scheduler.begin()
    after = scheduler.state_dict()
    assert [after[name] for name in ("rate", "falls", "loss")] == [before[name] for name in ("rate", "falls", "loss")]
    assert drained(scheduler, (4, 6), (2, 2)) == ["cchhhcchhh", "chch"]


def test_refuses() -> None:
    with pytest.raises(StateError, match="one lane"):
        ShuffleScheduler(FaeInputs()).load_state_dict(OneLane().state_dict())
