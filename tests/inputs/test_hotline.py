"""Popular and non-popular micro-batches against whole batches, under real DistributedModelParallel on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.inputs.clicks import HOT, ROWS, Clicks, is_popular, make_batch
from tests.models import placement_of, sharded, state_of
from torchrec_slipstream import (
    AccessConfig,
    AttachError,
    InputError,
    Slipstream,
    SlipstreamConfig,
    StalenessConfig,
)
from torchrec_slipstream.inputs.hotline import Hotline
from torchrec_slipstream.inputs.rows import RowSets
from torchrec_slipstream.tbe.features import model_tables

OPTIMIZERS = [torch.optim.SGD, torch.optim.Adagrad, RowWiseAdagrad]
NOTHING = SlipstreamConfig(staleness=StalenessConfig(target_share=0.0), access=AccessConfig(counter="exact"))


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store: Path = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def skipping(selection: str) -> SlipstreamConfig:
    staleness = StalenessConfig(
        where="everywhere", selection=selection, interval=5, warmup_steps=10, max_table_share=1.0
    )
    return SlipstreamConfig(staleness=staleness, access=AccessConfig(counter="exact"))


def batches(steps: int, **more: Any) -> Iterator[Batch]:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        yield make_batch((torch.rand(16, generator=generator) < 0.6).tolist(), step, **more)


def hotline_of(model: DistributedModelParallel, slip: Slipstream) -> Hotline:
    return slip.hotline(is_popular)


def assert_equal_states(one: DistributedModelParallel, other: DistributedModelParallel) -> None:
    got, want = state_of(one), state_of(other)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("weighted", [False, True])
def test_tables_as_stock(optimizer: type[torch.optim.Optimizer], weighted: bool) -> None:
    stock, ours = (
        sharded(Clicks(exact=True, weighted=weighted, sequences=True), optimizer=optimizer) for _ in range(2)
    )
    slip = Slipstream(ours, NOTHING)
    hotline = hotline_of(ours, slip)
    for batch in batches(10, weighted=weighted):
        want = stock(batch)
        want.backward()
        torch.testing.assert_close(hotline.backward(batch, ours), want.detach(), rtol=1e-6, atol=1e-6)
        slip.step()
    assert_equal_states(ours, stock)
    assert hotline.steps == hotline.divided_steps == 10
    assert hotline.samples == 160
    assert 60 < hotline.first_samples < 130


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("selection", ["sampling", "duty"])
@pytest.mark.parametrize("hot_rows", [False, True])
def test_with_skipping_and_hot_rows(optimizer: type[torch.optim.Optimizer], selection: str, hot_rows: bool) -> None:
    """As a session of the same configuration does with whole batches: tables, counts and decisions."""
    pair = [sharded(Clicks(exact=True), optimizer=optimizer) for _ in range(2)]
    slips = [
        Slipstream(model, skipping(selection), placement=placement_of(model, 0.3) if hot_rows else None)
        for model in pair
    ]
    hotline = hotline_of(pair[0], slips[0])
    for batch in batches(40):
        hotline.backward(batch, pair[0])
        pair[1](batch).backward()
        for slip in slips:
            slip.step()
    assert hotline.divided_steps == 40
    assert_equal_states(*pair)
    ours, whole = (slip.report() for slip in slips)
    assert ours.tables == whole.tables
    assert [d.measured_share for d in ours.decisions] == [d.measured_share for d in whole.decisions]
    assert ours.measured_share > 0.2
    if hot_rows and ours.placement is not None and whole.placement is not None:
        assert ours.placement.tables == whole.placement.tables
        assert sum(table.hits for table in ours.placement.tables.values()) > 100


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_dense_part_as_stock_but_for_rounding(optimizer: type[torch.optim.Optimizer]) -> None:
    stock, ours = (sharded(Clicks(exact=False), optimizer=optimizer) for _ in range(2))
    dense = [torch.optim.SGD(model.module.over.parameters(), lr=0.1) for model in (stock, ours)]
    slip = Slipstream(ours, NOTHING)
    hotline = hotline_of(ours, slip)
    for batch in batches(20):
        for one in dense:
            one.zero_grad()
        want = stock(batch)
        want.backward()
        torch.testing.assert_close(hotline.backward(batch, ours), want.detach(), rtol=1e-5, atol=1e-6)
        for mine, theirs in zip(ours.module.over.parameters(), stock.module.over.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        for one in dense:
            one.step()
        slip.step()
    # DDP's static graph has to see the first step whole.
    assert (hotline.steps, hotline.divided_steps) == (20, 19)
    for name, value in state_of(stock).items():
        torch.testing.assert_close(state_of(ours)[name], value, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def pair(one_rank: None) -> tuple[DistributedModelParallel, DistributedModelParallel, Hotline]:
    stock, ours = (sharded(Clicks(exact=True)) for _ in range(2))
    return stock, ours, hotline_of(ours, Slipstream(ours, NOTHING))


@settings(max_examples=30)
@given(
    popular=st.sampled_from([2, 8, 32]).flatmap(lambda size: st.lists(st.booleans(), min_size=size, max_size=size)),
    longest=st.integers(1, 6),
    seed=st.integers(0, 2**16),
)
def test_any_division(
    pair: tuple[DistributedModelParallel, DistributedModelParallel, Hotline],
    popular: list[bool],
    longest: int,
    seed: int,
) -> None:
    """The models go on from example to example."""
    stock, ours, hotline = pair
    batch = make_batch(popular, seed, longest=longest)
    before = hotline.divided_steps, hotline.first_samples
    stock(batch).backward()
    hotline.backward(batch, ours)
    assert_equal_states(ours, stock)
    divided = 0 < sum(popular) < len(popular)
    assert hotline.divided_steps - before[0] == divided
    assert hotline.first_samples - before[1] == (sum(popular) if divided else 0)


def test_sets_of_rows_say_what_is_popular() -> None:
    model = sharded(Clicks(exact=True))
    tables = model_tables(model)
    rows = RowSets(tables, {table.fqn: torch.arange(table.rows) < HOT for table in tables})
    hotline = Slipstream(model, NOTHING).hotline(rows)
    hotline.backward(make_batch([True, False, True, False, False], 0), model)
    assert (hotline.first_samples, hotline.samples) == (2, 5)


def test_micro_batches_are_the_popular_samples_and_the_others() -> None:
    model = sharded(Clicks(exact=True))
    hotline = hotline_of(model, Slipstream(model, NOTHING))
    seen: list[Batch] = []

    def forward(batch: Batch) -> Tensor:
        seen.append(batch)
        return model(batch)

    batch = make_batch([True, False, True, False, False], 0)
    hotline.backward(batch, forward)
    assert [is_popular(part).tolist() for part in seen] == [[True, True], [False, False, False]]
    assert torch.equal(seen[1].dense_features, batch.dense_features[[1, 3, 4]])


def broken(model: nn.Module, kind: str) -> Any:
    return {
        "no scalar": lambda batch: model(batch) + batch.labels,
        "no tensor": lambda batch: (model(batch), 1),
        "detached": lambda batch: model(batch).detach(),
    }[kind]


@pytest.mark.parametrize("popular", [[True, False] * 2, [True] * 4], ids=["divided", "whole"])
@pytest.mark.parametrize("kind", ["no scalar", "no tensor", "detached"])
def test_forward_that_gives_no_loss_changes_nothing(kind: str, popular: list[bool]) -> None:
    model = sharded(Clicks(exact=True))
    slip = Slipstream(model, NOTHING)
    before = state_of(model)
    with pytest.raises(InputError, match="let it return the mean loss over its samples, a scalar"):
        hotline_of(model, slip).backward(make_batch(popular, 0), broken(model, kind))
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())
    if not all(popular):
        assert slip.report().tables["bags.t0"].lookups == 0


def test_tables_that_one_micro_batch_looks_up_in_more_often_are_refused_before_any_gradient() -> None:
    model = sharded(Clicks(exact=False))
    hotline = hotline_of(model, Slipstream(model, NOTHING))
    hotline.backward(make_batch([True, False] * 2, 0), model)  # the one that DDP's static graph sees whole
    model.zero_grad()
    before = state_of(model)

    def forward(batch: Batch) -> Tensor:
        more = model.module.bags(batch.sparse_features).values().sum() if bool(is_popular(batch).all()) else 0.0
        return model(batch) + more

    with pytest.raises(InputError, match=r"looked up in \[2, 1\] times in the micro-batches"):
        hotline.backward(make_batch([True, False] * 2, 1), forward)
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())
    assert all(one.grad is None or not one.grad.any() for one in model.module.over.parameters())


def test_detached_session_makes_none_and_its_own_refuses() -> None:
    model = sharded(Clicks(exact=True))
    slip = Slipstream(model, NOTHING)
    hotline = slip.hotline(is_popular)
    slip.detach()
    with pytest.raises(AttachError, match="this session was detached; attach a new Slipstream"):
        slip.hotline(is_popular)
    with pytest.raises(AttachError, match="the session was detached, so the tables would be updated once for each"):
        hotline.backward(make_batch([True, False] * 2, 0), model)


def test_batches_and_masks_that_do_not_fit_are_refused() -> None:
    model = sharded(Clicks(exact=True))
    slip = Slipstream(model, NOTHING)
    batch = make_batch([True, False], 0)
    with pytest.raises(InputError, match=r"torch.float32 \[2\] for a batch of 2 samples; give bool \[2\]"):
        slip.hotline(lambda batch: batch.labels).backward(batch, model)
    keys = [f"f{i}" for i in range(len(ROWS))]
    strides = [[2], [1], [2]]
    batch.sparse_features = KeyedJaggedTensor(
        keys, torch.zeros(5).long(), lengths=torch.ones(5).long(), stride_per_key_per_rank=strides
    )
    with pytest.raises(InputError, match="another number of bags for each key"):
        hotline_of(model, slip).backward(batch, model)


def test_dense_parameters_that_the_backward_updates_are_refused() -> None:
    clicks = Clicks(exact=False)
    apply_optimizer_in_backward(torch.optim.SGD, clicks.over.parameters(), {"lr": 0.1})
    model = sharded(clicks)
    slip = Slipstream(model, NOTHING)
    with pytest.raises(AttachError, match=r"dense parameters \['.*over.0.weight', .*micro-batches have two; give it"):
        hotline_of(model, slip)


def test_session_that_leaves_tables_alone_is_refused() -> None:
    model = sharded(Clicks(exact=True), {"t0": "table_wise", "t1": "row_wise", "t2": "table_wise"})
    config = SlipstreamConfig(staleness=StalenessConfig(target_share=0.0, exclude_tables=("t1",)))
    slip = Slipstream(model, config)
    with pytest.raises(AttachError, match=r"are not the session's \(exclude_tables\), so they would be updated"):
        hotline_of(model, slip)
