"""Epochs in turn, some broken off, by one selector and one scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from tests.inputs.samples import ids_of
from tests.inputs.test_session import NEGATIVES, SIZE, attach, epoch_of, train
from tests.inputs.test_stream import Numbered, loader_of
from torchrec_slipstream import FaeInputs, InputError, InputsConfig
from torchrec_slipstream.inputs.fae import ShuffleScheduler
from torchrec_slipstream.inputs.live import LiveInputs

FAE = FaeInputs(hot_bytes=1, window=8, rate=50)
LOADER = loader_of(range(128), 4)
LANES = [i % 5 % 2 for i in range(128)]


def live() -> LiveInputs:
    def make(_: Any) -> Any:
        return Numbered([True] * 128, LANES), ShuffleScheduler(FAE)

    return LiveInputs(InputsConfig(method="fae", fae=FAE), None, make)


def trained(inputs: LiveInputs, stream: Iterator[Any], steps: int = 1000) -> list[list[int]]:
    found = []
    for _, batch in zip(range(steps), stream, strict=False):
        found.append(ids_of(batch))
        inputs.step(1)
    return found


@pytest.mark.parametrize("taken", [1, 2, 5, 11])
def test_an_epoch_broken_off_leaves_the_next_ones_order_alone(taken: int) -> None:
    inputs = live()
    want = trained(inputs, inputs.open(LOADER))
    assert sorted(i for ids in want for i in ids) == list(range(128))
    inputs = live()
    assert trained(inputs, inputs.open(LOADER), taken) == want[:taken]
    assert trained(inputs, inputs.open(LOADER)) == want


@pytest.mark.parametrize("taken", [0, 1, 2, 5, 11, 32])
def test_an_epoch_resumed_goes_on_in_its_window(taken: int) -> None:
    inputs = live()
    stream = inputs.open(LOADER)
    trained(inputs, stream, taken)
    state = copy.deepcopy(inputs.state_dict())
    want = trained(inputs, stream)
    resumed = live()
    resumed.load_state_dict(state)
    assert trained(resumed, resumed.open(LOADER)) == want


def test_an_epoch_broken_off_is_left_over() -> None:
    tbe, slip = attach(InputsConfig(method="random", drop_share=0.4))
    first = slip.inputs(epoch_of(0))
    train(tbe, slip, first, 3)
    train(tbe, slip, slip.inputs(epoch_of(1)))
    inputs = slip.report().inputs
    assert inputs is not None
    assert inputs.read == inputs.used + inputs.dropped + inputs.left_over
    assert inputs.left_over > 0
    assert inputs.epochs == 1


@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_of_an_epoch_broken_off_are_not_trained_on_by_a_resumed_run(ahead: int) -> None:
    tbe, slip = attach(NEGATIVES)
    left = slip.inputs(epoch_of(0))
    train(tbe, slip, left, 2)
    assert [len(ids_of(batch)) for _, batch in zip(range(ahead), left, strict=False)] == [SIZE] * ahead
    stream = slip.inputs(epoch_of(1))
    with pytest.raises(InputError, match=r"this stream was left for a newer one; take a new one from .* inputs\(\)"):
        next(left)
    train(tbe, slip, stream, 3)
    state = copy.deepcopy(slip.state_dict())
    assert state["inputs"]["unconfirmed"] == []
    want = train(tbe, slip, stream)
    inputs = slip.report().inputs
    assert inputs is not None
    assert (inputs.read, inputs.waiting) == (inputs.used + inputs.dropped + inputs.left_over, 0)
    assert inputs.epochs == 1

    _, resumed = attach(NEGATIVES)
    resumed.load_state_dict(state)
    assert [ids_of(batch) for batch in resumed.inputs(epoch_of(1))] == want


def test_a_resumed_epoch_may_be_broken_off_as_well() -> None:
    tbe, slip = attach(NEGATIVES)
    stream = slip.inputs(epoch_of(0))
    train(tbe, slip, stream, 2)
    assert len(list(stream)) > 3  # all read ahead: the stream has ended, and a state has its batches
    second_tbe, second = attach(NEGATIVES)
    second.load_state_dict(copy.deepcopy(slip.state_dict()))
    left = second.inputs(epoch_of(0))
    train(second_tbe, second, left, 1)
    next(left)
    train(second_tbe, second, second.inputs(epoch_of(1)), 2)
    assert second.state_dict()["inputs"]["unconfirmed"] == []
