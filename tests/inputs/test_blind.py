"""The methods that look at no row: shares, weights, and draws that repeat."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torchrec.datasets.utils import Batch

from tests.inputs.samples import numbered
from torchrec_slipstream import InputError, StateError
from torchrec_slipstream.inputs.blind import KeepAll, NegativeSampling, RandomDrop
from torchrec_slipstream.inputs.choice import Choice, OneLane


def labelled(positives: float, size: int, seed: int) -> Batch:
    """A batch whose labels are 1 with this probability."""
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.rand(size, generator=draw) < positives).float()
    return dataclasses.replace(numbered(range(size)), labels=labels)


def test_random_keeps_its_share_of_every_label() -> None:
    selector = RandomDrop(0.3, seed=1, weighs=True)
    batches = [labelled(0.25, 500, seed) for seed in range(100)]
    choices = [selector.choose(batch) for batch in batches]
    keep, labels = torch.cat([one.keep for one in choices]), torch.cat([batch.labels for batch in batches])
    for label in (0, 1):
        assert keep[labels == label].float().mean() == pytest.approx(0.7, abs=0.01)
    weights = [one.weight for one in choices if one.weight is not None]
    assert torch.cat(weights)[keep].sum() == pytest.approx(len(keep), rel=0.01)
    assert RandomDrop(0.3).choose(batches[0]).weight is None


def test_draws_repeat_by_seed_and_differ_by_rank_batch_and_epoch() -> None:
    def kept(**arguments: Any) -> list[torch.Tensor]:
        selector = RandomDrop(0.5, **arguments)
        return [selector.choose(numbered(range(64))).keep for _ in range(3)]

    first = kept(seed=3, rank=0)
    assert all(map(torch.equal, first, kept(seed=3, rank=0)))
    others = [*first, *kept(seed=4, rank=0), *kept(seed=3, rank=1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(others) for b in others[:i])


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_negatives_alone_are_dropped_and_the_kept_ones_count_for_them(share: float) -> None:
    selector = NegativeSampling(share, seed=2)
    read = dropped = weight_of_negatives = negatives = 0.0
    for seed in range(200):
        batch = labelled(0.25, 250, seed)
        choice = selector.choose(batch)
        assert choice.weight is not None
        positive = batch.labels == 1
        assert choice.keep[positive].all()
        assert (choice.weight[positive] == 1).all()
        read += len(positive)
        negatives += int((~positive).sum())
        dropped += int((~choice.keep).sum())
        weight_of_negatives += float(choice.weight[~positive & choice.keep].sum())
    assert dropped / read == pytest.approx(share, abs=0.01)
    assert weight_of_negatives == pytest.approx(negatives, rel=0.02)


def test_a_share_that_the_negatives_do_not_give_stops_at_the_least_probability() -> None:
    selector = NegativeSampling(0.5, min_probability=0.2)
    choices = [(batch := labelled(0.8, 500, seed), selector.choose(batch)) for seed in range(20)]
    negative = torch.cat([batch.labels == 0 for batch, _ in choices])
    keep = torch.cat([choice.keep for _, choice in choices])
    assert keep[~negative].all()
    assert keep[negative].float().mean() == pytest.approx(0.2, abs=0.02)
    assert max(float(choice.weight.max()) for _, choice in choices if choice.weight is not None) == pytest.approx(5.0)


def test_the_share_of_positives_is_followed() -> None:
    selector = NegativeSampling(0.3, weighs=False)
    for seed in range(300):
        selector.choose(labelled(0.1, 200, seed))
    late = [selector.choose(labelled(0.5, 200, seed)) for seed in range(900)][600:]
    assert 1 - torch.cat([one.keep for one in late]).float().mean() == pytest.approx(0.3, abs=0.01)
    assert late[0].weight is None


def test_a_batch_of_positives_alone_is_kept_whole() -> None:
    choice = NegativeSampling(0.3).choose(labelled(1.0, 50, 0))
    assert choice.keep.all()
    assert choice.weight is not None
    assert (choice.weight == 1).all()


def test_several_labels_a_sample_are_positive_together() -> None:
    batch = dataclasses.replace(numbered(range(400)), labels=torch.tensor([[0.0, 1.0], [0.0, 0.0]]).repeat(200, 1))
    keep = NegativeSampling(0.4).choose(batch).keep
    assert keep[0::2].all()
    assert keep[1::2].float().mean() < 0.4
    with pytest.raises(InputError, match="'negatives' read labels, and Batch has no tensor 'labels'"):
        NegativeSampling(0.3).choose(dataclasses.replace(batch, labels=None))


@pytest.mark.parametrize("tasks", [(), (2,)])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_labels_that_are_not_finite_are_refused_and_change_nothing(wrong: float, tasks: tuple[int, ...]) -> None:
    """A NaN is not above 0.5, nor is it up to it: it was trained on as a positive."""
    labels = torch.zeros(40, *tasks)
    good = dataclasses.replace(numbered(range(40)), labels=labels.clone())
    labels[17:19].view(-1)[-1] = wrong
    bad = dataclasses.replace(good, labels=labels)
    selector, other = NegativeSampling(0.4), NegativeSampling(0.4)
    selector.choose(good)
    other.choose(good)
    before = selector.state_dict()
    with pytest.raises(InputError, match=r"^labels of 1 of a batch's 40 samples are not finite.* sample 18: .*; give"):
        selector.choose(bad)
    assert selector.state_dict() == before
    assert torch.equal(selector.choose(good).keep, other.choose(good).keep)


def test_thinning_is_refused_for_several_tasks_a_sample_and_changes_nothing() -> None:
    batch = dataclasses.replace(numbered(range(4)), labels=torch.tensor([[0.0, 1.0], [0.0, 0.0]]).repeat(2, 1))
    selector = NegativeSampling(0.4, weighs=False)
    before = selector.state_dict()
    with pytest.raises(InputError, match=r"labels \[4, 2\] are of several tasks.*method='negatives' with its weights"):
        selector.choose(batch)
    assert selector.state_dict() == before
    selector.choose(dataclasses.replace(batch, labels=torch.zeros(4, 1)))


@pytest.mark.parametrize("make", [KeepAll, lambda: RandomDrop(0.4), lambda: NegativeSampling(0.4)])
def test_a_resumed_selector_goes_on_alike(make: Any) -> None:
    def choose(selector: Any, seeds: range) -> list[Choice]:
        found = []
        for seed in seeds:
            found.append(selector.choose(labelled(0.3, 40, seed)))
            selector.step(seed)
        return found

    whole, first, second = make(), make(), make()
    choose(whole, range(5))
    choose(first, range(5))
    second.load_state_dict(first.state_dict())
    for a, b in zip(choose(whole, range(5, 9)), choose(second, range(5, 9)), strict=True):
        assert torch.equal(a.keep, b.keep)
        assert (a.weight is None and b.weight is None) or torch.equal(a.weight, b.weight)  # type: ignore[arg-type]
    for broken in ({"selector": "another"}, {}, None):
        with pytest.raises(StateError, match=r"of selector .* not of"):
            second.load_state_dict(broken)


def test_one_lane_takes_what_is_there() -> None:
    assert OneLane().next([0, 2, 1]) == 1
    OneLane().load_state_dict(OneLane().state_dict())
    with pytest.raises(StateError, match="another scheduler"):
        OneLane().load_state_dict({"scheduler": "shuffle"})


def test_thinning_weighs_positives_as_asked_and_negatives_once() -> None:
    selector = NegativeSampling(0.4, weighs=False, positive_weight=3.0, seed=1)
    plain = NegativeSampling(0.4, weighs=False, seed=1)
    assert selector.weighs
    assert not plain.weighs
    batch = labelled(0.2, 400, 0)
    choice, without = selector.choose(batch), plain.choose(batch)
    assert without.weight is None
    assert choice.weight is not None
    assert torch.equal(choice.keep, without.keep)
    assert torch.equal(choice.weight, torch.where(batch.labels > 0.5, 3.0, 1.0))


@pytest.mark.parametrize(("positives", "weight"), [(0.02, 4.0), (0.1, 1.2), (0.3, 1.0)])
def test_positives_weigh_more_by_themselves_only_where_they_are_few(positives: float, weight: float) -> None:
    selector = NegativeSampling(0.3, weighs=False, positive_weight="auto", seed=1)
    for step in range(30):
        batch = labelled(positives, 1000, step)
        choice = selector.choose(batch)
    assert choice.weight is not None
    of_positives = choice.weight[batch.labels > 0.5]
    assert float(of_positives.min()) == pytest.approx(weight, abs=0.05)  # 0.2 * 0.6 / 0.1 where a tenth are positive
    assert float(of_positives.min()) == float(of_positives.max())
    assert bool((choice.weight[batch.labels <= 0.5] == 1.0).all())
