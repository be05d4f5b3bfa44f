"""Signals against their definitions, on rows that a real TBE trained."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType

from tests.tables import Lookups, make_tbe, table_states
from torchrec_slipstream.staleness.signals import SIGNALS, Drift, Gain, Movement, RowView


def view(**given: torch.Tensor) -> RowView:
    n = next(iter(given.values())).shape[0]
    fields = {
        "weights": torch.zeros(n, 2),
        "before": torch.zeros(n, 2),
        "updates": torch.ones(n),
        "new_updates": torch.ones(n),
        "state": torch.ones(n),
        "state_before": torch.zeros(n),
    }
    return RowView(**{**fields, **given})


def test_movement_is_a_touch_and_unknown_without_one() -> None:
    rows = view(weights=torch.tensor([[0.4, 0.1], [0.4, 0.1], [0.0, 0.0]]), new_updates=torch.tensor([1.0, 4.0, 0.0]))
    score = Movement().score(rows)
    torch.testing.assert_close(score[:2], torch.tensor([0.4, 0.1]))
    assert score[2].isnan()  # untouched, not settled: the artefact's trap


def test_movement_without_a_snapshot_is_unknown() -> None:
    assert Movement().score(view(before=torch.full((2, 2), torch.nan))).isnan().all()


def test_drift_tells_a_walker_from_a_trembler() -> None:
    """Two rows of as many, as large steps: one always the same way, one back and forth."""
    tbe = make_tbe((2,), (4,))
    before = table_states(tbe)[0]
    steps = 16
    for step in range(steps):
        output = Lookups(torch.tensor([0, 1]), torch.tensor([0, 1, 2])).run(tbe)
        sign = 1.0 if step % 2 else -1.0
        output.backward(torch.tensor([[1.0] * 4, [sign] * 4]))
    now = table_states(tbe)[0]
    rows = view(
        weights=now[0],
        before=before[0],
        state=now[1],
        state_before=before[1],
        updates=torch.full((2,), float(steps)),
        new_updates=torch.full((2,), float(steps)),
    )
    walker, trembler = Drift().score(rows).tolist()
    assert walker > 3 * trembler


@pytest.mark.parametrize("optimizer", [EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD])
def test_gain_is_twice_a_learning_rate_below_the_first_order_loss_reduction(optimizer: EmbOptimType) -> None:
    """sum over the updates of gradient . step is 2 lr sqrt(G), from below, within a tenth after 400 steps."""
    tbe = make_tbe((1,), (4,), optimizer=optimizer)
    generator = torch.Generator().manual_seed(0)
    gained, steps = 0.0, 400
    for _ in range(steps):
        before = table_states(tbe)[0][0]
        gradient = torch.randn(1, 1, generator=generator).expand(1, 4).contiguous()
        Lookups(torch.tensor([0]), torch.tensor([0, 1])).run(tbe).backward(gradient)
        gained += float(((before - table_states(tbe)[0][0]) * gradient).sum())
    state = table_states(tbe)[0][1].reshape(1, -1).mean(dim=1)
    score = Gain().score(view(state=state, updates=torch.tensor([float(steps)])))
    claimed = 2 * 0.1 * float(score) * steps * 4  # lr 0.1; four equal dims
    assert claimed == pytest.approx(gained, rel=0.1)


def test_names() -> None:
    assert set(SIGNALS) == {"gain", "movement", "drift"}
