"""The session's inputs on one rank: what goes through, what is reported, saved and refused."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.inputs.samples import ids_of, numbered, same
from tests.inputs.test_stream import loader_of
from tests.tables import TBE, make_tbe, table_states
from torchrec_slipstream import (
    AttachError,
    ConfigError,
    InputError,
    InputReport,
    InputsConfig,
    Report,
    Slipstream,
    SlipstreamConfig,
    SlipstreamInputs,
    StalenessConfig,
    StateError,
    WeightedBatch,
)
from torchrec_slipstream.inputs.batches import with_weights
from torchrec_slipstream.inputs.blind import KeepAll
from torchrec_slipstream.inputs.choice import OneLane
from torchrec_slipstream.report.record import RunRecord

N, SIZE = 200, 16
NEGATIVES = InputsConfig(method="negatives", drop_share=0.3)


def attach(inputs: InputsConfig, seed: int = 0) -> tuple[TBE, Slipstream]:
    tbe = make_tbe((2 * N, 2 * N), (4, 4), seed=seed)
    staleness = StalenessConfig(where="everywhere", warmup_steps=5, interval=5, min_touches=1)
    config = SlipstreamConfig(inputs=inputs, staleness=staleness)
    return tbe, Slipstream(tbe, config)


def train(tbe: TBE, slip: Slipstream, stream: Iterator[Any], steps: int | None = None) -> list[list[int]]:
    order: list[list[int]] = []
    while (steps is None or len(order) < steps) and (batch := next(stream, None)) is not None:
        logits = tbe(batch.sparse_features.values(), batch.sparse_features.offsets().long()).sum(dim=1)
        weights = batch.weights if isinstance(batch, WeightedBatch) else None
        binary_cross_entropy_with_logits(logits, batch.labels, weight=weights).backward()
        slip.step()
        order.append(ids_of(batch))
    return order


def epoch_of(number: int) -> list[Any]:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(number))
    return loader_of(order.tolist(), SIZE)


def test_off_hands_the_loaders_batches_through_untouched() -> None:
    _, slip = attach(InputsConfig())
    data = [*epoch_of(0), "not even a batch"]
    assert [id(one) for one in slip.inputs(data)] == [id(one) for one in data]
    assert slip.report().inputs is None
    assert slip.report().to_dict()["inputs"] is None
    assert slip.state_dict()["inputs"] is None


def test_epochs_are_reported_by_label_and_feature() -> None:
    tbe, slip = attach(NEGATIVES)
    orders = [train(tbe, slip, slip.inputs(epoch_of(epoch))) for epoch in range(3)]
    assert [set(map(len, order[:-2])) for order in orders] == [{SIZE}] * 3
    kept = [{i for ids in order for i in ids} for order in orders]
    positives = {i for i in range(N) if i % 2}
    assert all(positives <= one for one in kept)
    assert kept[0] != kept[1]  # each epoch drops others

    report = slip.report()
    inputs = report.inputs
    assert inputs is not None
    used = sum(map(len, kept))
    assert (inputs.read, inputs.used, inputs.dropped) == (3 * N, used, 3 * N - used)
    assert (inputs.epochs, inputs.left_over, inputs.waiting) == (3, 0, 0)
    assert inputs.dropped_share == pytest.approx(0.3, abs=0.05)
    assert inputs.labels["1"].dropped == 0
    assert inputs.labels["0"].dropped == inputs.dropped
    assert inputs.labels["0"].read == inputs.labels["1"].read == 3 * N // 2
    assert inputs.kept_weight == pytest.approx(3 * N, rel=0.1)
    lookups = [sum((i + k) % 3 for i in range(N)) for k in range(2)]  # as `numbered` deals them out
    kept_lookups = [sum((i + k) % 3 for one in kept for i in one) for k in range(2)]
    for k in range(2):
        of = inputs.features[f"f{k}"]
        assert (of.read, of.read - of.dropped) == (3 * lookups[k], kept_lookups[k])
    text = str(report)
    assert f"method 'negatives', 3 epochs over: {3 * N:,} samples read, {used:,} trained on" in text
    assert "0.0% of label 1" in text
    values = json.loads(json.dumps(report.to_dict()))
    assert Report.from_dict(values).inputs == inputs
    assert RunRecord.from_dict(RunRecord(report=report, name="run").to_dict()).report == report
    values["inputs"]["used"] = "many"
    broken = RunRecord(report=report).to_dict() | {"slipstream": values}
    with pytest.raises(ConfigError, match="used is 'many'"):
        RunRecord.from_dict(broken)


@pytest.mark.parametrize("inputs", [NEGATIVES, InputsConfig(method="random", drop_share=0.5, weigh=True, seed=3)])
@pytest.mark.parametrize("ahead", [0, 2])
def test_a_run_resumed_in_mid_epoch_equals_an_uninterrupted_one(inputs: InputsConfig, ahead: int) -> None:
    whole_tbe, whole = attach(inputs)
    want = [train(whole_tbe, whole, read_ahead(whole.inputs(epoch_of(epoch)), ahead)) for epoch in range(2)]
    flat = want[0] + want[1]
    for stop in (1, len(want[0]) - 1, len(want[0]), len(flat) - 2):
        tbe, slip = attach(inputs)
        order: list[list[int]] = []
        for epoch in range(1 if stop <= len(want[0]) else 2):
            order += train(tbe, slip, read_ahead(slip.inputs(epoch_of(epoch)), ahead), stop - len(order))
        file = io.BytesIO()
        torch.save(slip.state_dict(), file)
        file.seek(0)
        states = table_states(tbe)

        tbe, slip = attach(inputs, seed=9)
        for weights, state in zip(tbe.split_embedding_weights(), states, strict=True):
            weights.copy_(state[0])
        for target, state in zip(tbe.split_optimizer_states(), states, strict=True):
            target[0].copy_(state[1])
        loaded = torch.load(file, weights_only=True)
        slip.load_state_dict(loaded)
        assert str(slip.state_dict()["inputs"]) == str(loaded["inputs"])
        # Read by hand, the last batch does not say that it was: the epoch ends once nothing more comes.
        for epoch in range(0 if stop < len(want[0]) or (stop == len(want[0]) and not ahead) else 1, 2):
            order += train(tbe, slip, read_ahead(slip.inputs(epoch_of(epoch)), ahead))
        assert order == flat
        for one, other in zip(table_states(whole_tbe), table_states(tbe), strict=True):
            assert all(map(torch.equal, one, other))
        assert slip.report().inputs == whole.report().inputs


def read_ahead(stream: Iterator[Any], batches: int) -> Iterator[Any]:
    """As a pipeline reads: some batches ahead of the one that trains."""
    waiting = [batch for _, batch in zip(range(batches), stream, strict=False)]
    for batch in stream:
        waiting.append(batch)
        yield waiting.pop(0)
    yield from waiting


def test_a_state_can_be_saved_again_before_all_is_handed_out_again() -> None:
    tbe, slip = attach(NEGATIVES)
    stream = read_ahead(slip.inputs(epoch_of(0)), 3)
    train(tbe, slip, stream, 2)
    state = slip.state_dict()
    want = [numbered(ids) for ids in train(tbe, slip, stream)]

    _, second = attach(NEGATIVES)
    second.load_state_dict(state)
    first = next(again := second.inputs(epoch_of(0)))
    state = copy.deepcopy(second.state_dict())
    _, third = attach(NEGATIVES)
    third.load_state_dict(state)
    assert ids_of(first) == ids_of(want[0])
    assert [ids_of(batch) for batch in third.inputs(epoch_of(0))] == [ids_of(batch) for batch in want]
    assert [ids_of(batch) for batch in again] == [ids_of(batch) for batch in want[1:]]


@dataclass
class Plain:
    """A batch without a place for weights."""

    dense_features: Tensor
    sparse_features: KeyedJaggedTensor
    labels: Tensor


@pytest.mark.parametrize("inputs", [NEGATIVES, InputsConfig(method="thinning", drop_share=0.3, positive_weight=2.0)])
def test_weights_without_a_place_are_refused_with_what_helps(inputs: InputsConfig) -> None:
    loader = [Plain(one.dense_features, one.sparse_features, one.labels) for one in epoch_of(0)]
    _, slip = attach(inputs)
    with pytest.raises(InputError, match=r"Plain has no place .* set InputsConfig\(weigh=False, positive_weight=1\)"):
        next(slip.inputs(loader))
    _, slip = attach(replace(inputs, weigh=False, positive_weight=1))
    assert all(type(batch) is Plain for batch in slip.inputs(loader))


def test_a_samples_own_weight_is_kept() -> None:
    _, slip = attach(replace(NEGATIVES, weigh=True))
    _, plain = attach(replace(NEGATIVES, weigh=True))
    loader = [with_weights(one, one.dense_features.view(-1) + 1) for one in epoch_of(0)]
    for batch, other in zip(slip.inputs(loader), plain.inputs(epoch_of(0)), strict=True):
        assert torch.equal(batch.weights, (batch.dense_features.view(-1) + 1) * other.weights)


def test_a_stream_goes_on_after_detach_and_drops_nothing_more() -> None:
    tbe, slip = attach(NEGATIVES)
    stream = slip.inputs(epoch_of(0))
    before = train(tbe, slip, stream, 2)
    read = slip.report().inputs
    assert read is not None
    slip.detach()
    rest = list(stream)
    assert all(isinstance(batch, WeightedBatch) for batch in rest)
    after = slip.report().inputs
    assert after is not None
    assert after.dropped == read.dropped
    assert after.used == N - read.dropped
    assert len({i for ids in before for i in ids} | {i for batch in rest for i in ids_of(batch)}) == after.used
    with pytest.raises(AttachError, match="detached; iterate over the loader itself"):
        slip.inputs(epoch_of(1))


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    _, slip = attach(NEGATIVES)
    with pytest.raises(InputError, match="takes no profile, test_loss; give it nothing but the loader"):
        slip.inputs(epoch_of(0), test_loss=float, profile=None)
    state = slip.state_dict()
    for change, message in (
        (lambda s: s["inputs"]["config"].update(method="random"), "method='random', this one by 'negatives'"),
        (lambda s: s["inputs"].update(rank=[1, 2]), "rank 1 of 2, and this is rank 0 of 1"),
        (lambda s: s.update(inputs=None), "method='off', this one by 'negatives'"),
        (lambda s: s.update(version=3), "version 3, which does not say which inputs were read; .* version 6"),
        (lambda s: s.pop("inputs"), "not a Slipstream state"),
    ):
        other = copy.deepcopy(state)
        change: Callable[[Any], Any]
        change(other)
        with pytest.raises(StateError, match=message):
            slip.load_state_dict(other)
        assert str(slip.state_dict()) == str(state)
    slip.inputs(epoch_of(0))
    with pytest.raises(StateError, match=r"a stream of inputs is open; load the state before inputs\(\)"):
        slip.load_state_dict(state)


def test_things_that_would_not_be_heeded_are_refused() -> None:
    _, slip = attach(InputsConfig())
    with pytest.raises(InputError, match="method='off' takes no profile; give it nothing but the loader"):
        slip.inputs([], profile=1)
    _, slip = attach(NEGATIVES)
    slip.inputs(epoch_of(0))
    with pytest.raises(InputError, match=r"method='negatives' got no foo with the first .* nothing but the loader"):
        slip.inputs(epoch_of(1), foo=1)
    profile = slip.access_profile()
    _, slip = attach(InputsConfig(method="slipstream", slipstream=SlipstreamInputs(hot_bytes=100)))
    slip._inputs._make = lambda loader, **things: (KeepAll(), OneLane())  # the tables of this model have no features
    slip.inputs(epoch_of(0), profile=profile)
    stream = slip.inputs(epoch_of(1), profile=profile)
    for things, message in (
        ({"profile": 7}, "got another profile with the first call of inputs.., and goes on with it"),
        ({"test_loss": float}, "got no test_loss .* the same things again"),
    ):
        with pytest.raises(InputError, match=f"method='slipstream' {message}"):
            slip.inputs(epoch_of(2), **things)
    assert next(stream) is not None, "the epoch goes on"
    slip.inputs(epoch_of(2))


def test_reports_of_ranks_add_up() -> None:
    tbe, slip = attach(NEGATIVES)
    train(tbe, slip, slip.inputs(epoch_of(0)))
    one = slip.report().inputs
    assert one is not None
    both = one + one
    assert (both.read, both.used, both.epochs) == (2 * one.read, 2 * one.used, 1)
    assert both.labels["0"].share == one.labels["0"].share
    assert InputReport.from_dict(both.to_dict()) == both


def test_a_batch_handed_out_is_the_one_that_is_saved() -> None:
    _, slip = attach(InputsConfig(method="random", drop_share=0.2))
    batch = next(slip.inputs(epoch_of(0)))
    state = slip.state_dict()
    _, other = attach(InputsConfig(method="random", drop_share=0.2))
    other.load_state_dict(state)
    assert same(next(other.inputs(epoch_of(0))), batch)
