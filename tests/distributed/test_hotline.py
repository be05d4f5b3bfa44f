"""Hotline on two real gloo ranks whose batches have different shares of popular samples, against stock."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.ranks import run_ranks
from tests.inputs.clicks import Clicks, is_popular, make_batch
from tests.inputs.test_hotline import NOTHING, assert_equal_states
from tests.models import placement_of, sharded, state_of
from torchrec_slipstream import InputError, Slipstream

pytestmark = pytest.mark.slow  # every test starts processes

SHARES = (0.8, 0.3)  # of popular samples, by rank


def popular_of(rank: int, step: int, size: int = 16) -> list[bool]:
    if step == 3 and rank == 1:
        return [False] * size  # one rank has none: both train whole
    generator = torch.Generator().manual_seed(100 * rank + step)
    return (torch.rand(size, generator=generator) < SHARES[rank]).tolist()


def _tables(rank: int, sharding: str, hot_rows: bool) -> list[tuple[int, int]]:
    stock, ours = (sharded(Clicks(exact=True, sequences=True), sharding) for _ in range(2))
    slip = Slipstream(ours, NOTHING, placement=placement_of(ours, 0.3) if hot_rows else None)
    hotline = slip.hotline(is_popular)
    taken = []
    for step in range(8):
        batch = make_batch(popular_of(rank, step), 100 * rank + step)
        stock(batch).backward()
        before = hotline.first_samples
        hotline.backward(batch, ours)
        taken.append((sum(popular_of(rank, step)), hotline.first_samples - before))
        slip.step()
        if hot_rows:
            for name, want in state_of(stock).items():
                torch.testing.assert_close(state_of(ours)[name], want, rtol=1e-5, atol=1e-6)
        else:
            assert_equal_states(ours, stock)
    return taken


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise", "table_row_wise"])
@pytest.mark.parametrize("hot_rows", [False, True])
def test_tables_as_stock(sharding: str, hot_rows: bool) -> None:
    """Bit for bit, since the joint batch has the whole one's order on all ranks; every rank takes the least number."""
    first, second = run_ranks(2, _tables, sharding, hot_rows)
    for (popular, taken), (other_popular, other_taken) in zip(first, second, strict=True):
        assert taken == other_taken == min(popular, other_popular)
    assert first[3][1] == 0
    assert sum(taken for _, taken in first) > 20


def _dense(rank: int, finds_unused: bool) -> dict[str, Any]:
    stock, ours = (sharded(Clicks(exact=False)) for _ in range(2))
    slip = Slipstream(ours, NOTHING)
    if finds_unused:
        ours._dmp_wrapped_module = _rewrapped(ours)
    reduced: list[int] = []

    def counted(state: object, bucket: Any) -> Any:
        reduced.append(bucket.buffer().numel())
        return dist.all_reduce(bucket.buffer() / 2, async_op=True).get_future().then(lambda f: f.value()[0])

    ours._dmp_wrapped_module.register_comm_hook(
        None, lambda state, bucket: counted(state, bucket)
    )  # DDP reads annotations
    hotline = slip.hotline(is_popular)
    optimizers = [torch.optim.SGD(model.module.over.parameters(), lr=0.1) for model in (stock, ours)]
    reductions = []
    for step in range(8):
        batch = make_batch(popular_of(rank, step), 100 * rank + step)
        for one in optimizers:
            one.zero_grad()
        stock(batch).backward()
        reduced.clear()
        hotline.backward(batch, ours)
        reductions.append(sum(reduced))
        for mine, theirs in zip(ours.module.over.parameters(), stock.module.over.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        for one in optimizers:
            one.step()
        slip.step()
    for name, want in state_of(stock).items():
        torch.testing.assert_close(state_of(ours)[name], want, rtol=1e-4, atol=1e-6)
    return {
        "reductions": reductions,
        "parameters": sum(p.numel() for p in ours.module.over.parameters()),
        "divided": hotline.divided_steps,
        "gradients": [p.grad.tolist() for p in ours.module.over.parameters()],
    }


def _rewrapped(model: Any) -> torch.nn.parallel.DistributedDataParallel:
    """DDP as a user may ask DMP for it: no static graph, unused parameters looked for."""
    return torch.nn.parallel.DistributedDataParallel(
        model._dmp_wrapped_module.module, gradient_as_bucket_view=True, find_unused_parameters=True
    )


@pytest.mark.parametrize("finds_unused", [False, True])
def test_dense_gradients_are_reduced_once(finds_unused: bool) -> None:
    first, second = run_ranks(2, _dense, finds_unused)
    assert first["gradients"] == second["gradients"]
    assert first["reductions"] == [first["parameters"]] * 8
    assert first["divided"] == (7 if finds_unused else 6)  # a static graph has to see the first step whole


def _refused(rank: int) -> str:
    model = sharded(Clicks(exact=True))
    before = state_of(model)
    hotline = Slipstream(model, NOTHING).hotline(is_popular)
    with pytest.raises(InputError) as caught:
        hotline.backward(make_batch([True, False] * (2 + rank), 0), _unused)
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())
    return str(caught.value)


def _unused(batch: object) -> Tensor:
    raise AssertionError("a forward ran")


def test_ranks_with_batches_of_different_sizes_are_told() -> None:
    assert set(run_ranks(2, _refused)) == {
        "ranks have batches of 4 to 6 samples; give all of them the same (drop_last=True)"
    }
