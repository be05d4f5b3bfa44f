"""The session on real TBEs and on TorchRec's DistributedModelParallel, one rank."""

from __future__ import annotations

import copy
import io
import json
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.models import TwoCollections, batches_for, sharded
from tests.staleness.test_tracker import ROWS, config, train
from tests.tables import TBE, filtered, make_tbe, table_states
from torchrec_slipstream import (
    AccessConfig,
    AttachError,
    PlacementConfig,
    Report,
    Slipstream,
    SlipstreamConfig,
    StalenessConfig,
    StateError,
    detach,
)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"signal": "movement", "selection": "threshold"},
        {"selection": "duty"},
        {"selection": "duty", "signal": "drift", "snapshot_dtype": "float16", "every": 2},
    ],
)
def test_resumed_run_equals_an_uninterrupted_one(changes: dict[str, object]) -> None:
    whole = make_tbe(ROWS, (8, 8))
    session = Slipstream(whole, config(**changes))
    train(whole, session, range(150))

    first = make_tbe(ROWS, (8, 8))
    before = Slipstream(first, config(**changes))
    train(first, before, range(83))  # in the middle of an interval and of a pattern
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "slip": before.state_dict()}, file)
    states = table_states(first)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)

    second = make_tbe(ROWS, (8, 8), seed=9)
    resumed = Slipstream(second, config(**changes))
    for weights, state in zip(second.split_embedding_weights(), states, strict=True):
        weights.copy_(state[0])
    for target, state in zip(second.split_optimizer_states(), states, strict=True):
        target[0].copy_(state[1])
    resumed.load_state_dict(loaded["slip"])
    train(second, resumed, range(83, 150))

    for want, got in zip(table_states(whole), table_states(second), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert resumed.report().tables == session.report().tables
    assert session.report().total.skipped > 0


@pytest.mark.parametrize(
    ("changes", "signal"),
    [
        ({}, "gradient"),
        ({"every": 4}, "gradient"),
        ({"selection": "duty"}, "gain"),
        ({"selection": "threshold", "signal": "movement"}, "movement"),
    ],
)
def test_the_report_has_the_configuration_and_how_rows_are_spread(changes: dict[str, object], signal: str) -> None:
    tbe = make_tbe(ROWS, (8, 8), table_names=["users", "items"])
    session = Slipstream(tbe, config(**changes))
    train(tbe, session, range(100))
    report = session.report()
    assert report.config["staleness"]["selection"] == session.config.staleness.selection
    assert report.config["staleness"]["exclude_tables"] == []
    assert set(report.spread) == {"lookups", signal}
    every = session.config.access.every
    assert report.spread["lookups"].total == sum(table.touched_rows for table in report.tables.values())
    assert 2 ** report.spread["lookups"].lowest == every, "a counted look-up stands for so many"
    assert report.spread[signal].total > 0
    if signal == "gradient":
        assert report.spread[signal].total == 4 * 60, "a magnitude a sample of the last four steps"
    else:
        assert report.spread[signal].total <= report.decisions[-1].pool_rows
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_spread_of_lookups_fades_and_leaves_uncounted_tables_out() -> None:
    tbe = make_tbe(ROWS, (8, 8), table_names=["users", "items"])
    session = Slipstream(
        tbe,
        SlipstreamConfig(
            staleness=StalenessConfig(target_share=0.0),
            access=AccessConfig(counter="exact", half_life=10, sketch_tables=("items",)),
        ),
    )
    train(tbe, session, range(40))
    spread = session.report().spread["lookups"]
    shard = session._filters[0].shards[0]
    counts = session._filters[0].counts.counts(shard.slots.start, shard.slots.stop)
    assert spread.total == int((counts > 0).sum()), "a row each of the counted table, and no row for the other"
    assert 2 ** (spread.lowest + len(spread.counts) - 1) <= int(counts.max()), "faded, not all that ever were"


def test_detached_session_leaves_the_model_stock() -> None:
    stock, ours = make_tbe(ROWS, (8, 8)), make_tbe(ROWS, (8, 8))
    session = Slipstream(ours, config())
    train(ours, session, range(100))
    session.detach()
    session.detach()
    with pytest.raises(AttachError, match="was detached"):
        session.step()
    for target, state in zip(stock.split_embedding_weights(), table_states(ours), strict=True):
        target.copy_(state[0])
    for target, state in zip(stock.split_optimizer_states(), table_states(ours), strict=True):
        target[0].copy_(state[1])
    train(stock, None, range(100, 120))
    train(ours, None, range(100, 120))
    for want, got in zip(table_states(stock), table_states(ours), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_the_function_detaches_a_session_that_nobody_has() -> None:
    rows = SlipstreamConfig(
        staleness=config().staleness, placement=PlacementConfig(hbm_budget=4000, replan_every=10, max_stall_share=None)
    )
    kept, lost = (nn.ModuleList([make_tbe(ROWS, (8, 8))]) for _ in range(2))
    plain = [(type(model), type(model[0]), sorted(vars(model[0]))) for model in (kept, lost)]
    sessions = [Slipstream(model, rows) for model in (kept, lost)]
    for model, session in zip((kept, lost), sessions, strict=True):
        train(model[0], session, range(60))
        overlay = session._hot.overlays[0]
        assert overlay is not None
        assert overlay.dirty, "there are hot rows to be written back"
    sessions[0].detach()
    alive = weakref.ref(sessions.pop())
    del session, overlay
    with pytest.raises(
        AttachError, match=r"attached already; detach\(\) it first, or call torchrec_slipstream.detach\("
    ):
        Slipstream(lost)
    detach(lost)
    assert alive() is None
    assert [(type(model), type(model[0]), sorted(vars(model[0]))) for model in (kept, lost)] == plain
    assert not lost[0]._state_dict_pre_hooks
    for want, got in zip(table_states(kept[0]), table_states(lost[0]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    detach(lost)  # nothing to do
    Slipstream(lost).detach()


def test_the_function_detaches_whole_sessions_and_they_know() -> None:
    first, second = make_tbe(ROWS, (8, 8)), make_tbe(ROWS, (8, 8))
    session = Slipstream(nn.ModuleList([first, second]), config())
    filtered(other := make_tbe(ROWS, (8, 8)), torch.ones(460, dtype=torch.bool))  # without a session
    detach(nn.ModuleList([second, other]))
    assert {type(one) for one in (first, second, other)} == {TBE}
    with pytest.raises(AttachError, match="was detached"):
        session.step()
    with pytest.raises(AttachError, match=r"the model must be a torch\.nn\.Module, not int"):
        detach(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": 3}, "the model must be a torch.nn.Module, not int"),
        ({"placement": "p"}, "placement must be a Placement, such as SlipstreamPlanner.placement, not str"),
        ({"process_group": "p"}, "process_group='p'; give a torch.distributed.ProcessGroup"),
        ({"writer": "x"}, r"writer must have add_scalar\(tag, value, step\).* and a str has not"),
    ],
)
def test_an_argument_of_another_type_is_refused(given: dict[str, Any], message: str) -> None:
    model = nn.ModuleList([make_tbe(ROWS, (8, 8))])
    with pytest.raises(AttachError, match=message):
        Slipstream(**({"model": model} | given))
    assert type(model[0]) is TBE


class _Pooled(nn.Module):
    """A dense part, behind a table."""

    def __init__(self, *, aside: bool = False) -> None:
        super().__init__()
        self.tbe = make_tbe(ROWS, (8, 8), table_names=["users", "items"])
        if aside:
            self.look_up = torch.compiler.disable(self.look_up)  # type: ignore[method-assign]

    def look_up(self, indices: Tensor, offsets: Tensor) -> Tensor:
        return self.tbe(indices, offsets)

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        return self.look_up(indices, offsets) * 2.0


def test_compiled_lookups_are_warned_of_once_and_the_remedy_helps() -> None:
    batch = torch.arange(40), torch.arange(41)
    model = _Pooled()
    session = Slipstream(model, config())
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(*batch)  # evaluation counts for nothing anyway
        session.step()
    compiled(*batch).sum().backward()
    with pytest.warns(UserWarning, match=r"table\(s\) items, users: torch.compile has traced") as caught:
        session.step()
    assert caught[0].filename == __file__
    assert "decorate the method that calls the embeddings with torch.compiler.disable" in str(caught[0].message)
    assert session.report().total.lookups == 0
    aside = _Pooled(aside=True)
    other = Slipstream(aside, config())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(*batch).sum().backward()
        session.step()
        torch.compile(aside, backend="eager")(*batch).sum().backward()
        other.step()
    assert other.report().total.lookups == 40


def test_report_is_text_and_json() -> None:
    tbe = make_tbe(ROWS, (8, 8), table_names=["users", "items"])
    session = Slipstream(tbe, config())
    train(tbe, session, range(100))
    report = session.report()
    text = str(report)
    assert "users" in text
    assert "all tables" in text
    parsed = json.loads(json.dumps(report.to_dict()))
    assert Report.from_dict(parsed) == report
    assert parsed["tables"]["items"]["rows"] == 60
    assert parsed["steps"] == 100
    assert parsed["tracker_share"] < 0.5
    assert report.total.lookups == sum(t["lookups"] for t in parsed["tables"].values())
    assert len(parsed["decisions"]) == 7  # at 40, 50, ..., 100


def test_dmp_with_several_collections_keeps_plain_torchrec_state(one_rank: None) -> None:
    """Keys, shapes, types and optimizer keys before, during and after; a checkpoint loads into a stock model."""
    model, stock = sharded(TwoCollections()), sharded(TwoCollections())
    before = _layout(model)
    assert before == _layout(stock)
    session = Slipstream(model, config(interval=5, warmup_steps=10))
    assert _layout(model) == before
    for batch in batches_for(TwoCollections(), steps=40):
        model(*batch).square().sum().backward()
        session.step()
    assert session.report().total.skipped > 0
    assert set(session.report().tables) == {"bags.b0", "bags.b1", "sequences.s0", "sequences.s1"}
    assert _layout(model) == before
    stock.load_state_dict(model.state_dict())
    stock.fused_optimizer.load_state_dict(model.fused_optimizer.state_dict())
    session.detach()
    assert _layout(model) == before
    # From the same state, the detached model trains as plain TorchRec does.
    for batch in batches_for(TwoCollections(), steps=5):
        outputs = [one(*batch) for one in (model, stock)]
        assert torch.equal(outputs[0], outputs[1])
        for output in outputs:
            output.square().sum().backward()


def _layout(model: nn.Module) -> dict[str, object]:
    state = {k: (type(v), tuple(v.shape), v.dtype) for k, v in model.state_dict().items()}
    optimizer = {k: sorted(v) for k, v in model.fused_optimizer.state_dict()["state"].items()}
    modules = [name for name, _ in model.named_modules()]
    return {
        "state": state,
        "optimizer": optimizer,
        "parameters": [n for n, _ in model.named_parameters()],
        "modules": modules,
    }


def access_config(**changes: object) -> SlipstreamConfig:
    return SlipstreamConfig(staleness=config().staleness, access=AccessConfig(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"counter": "exact"},
        {"counter": "sampled", "every": 4, "half_life": 15},
        {"counter": "exact", "half_life": 7, "sketch_tables": ("table_1",)},
        {"counter": "sampled", "every": 2, "max_counted_rows": 100},
    ],
)
def test_profile_of_a_resumed_run_equals_an_uninterrupted_ones(changes: dict[str, object]) -> None:
    whole, first, second = (make_tbe(ROWS, (8, 8)) for _ in range(3))
    session = Slipstream(whole, access_config(**changes))
    train(whole, session, range(60))
    before = Slipstream(first, access_config(**changes))
    train(first, before, range(37))
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    resumed = Slipstream(second, access_config(**changes))
    train(second, resumed, range(90, 95))  # what it counted before is forgotten
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.access_profile() == before.access_profile()
    train(second, resumed, range(37, 60))
    assert resumed.access_profile() == session.access_profile()
    assert session.access_profile().lookups > 0


def test_loaded_counts_are_kept_from_the_end_of_int32_at_once() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, access_config(counter="exact"))
    state = session.state_dict()
    state["staleness"]["shards"][".table_0@0:0"]["touches"][7] = 2**31 - 1000
    session.load_state_dict(state)
    train(tbe, session, range(1))
    assert int(session._filters[0].touches.max()) <= 2**30
    assert session.access_profile()["table_0"].counts_of(7, 8)[0] >= 2**31 - 1000
    other = Slipstream(make_tbe(ROWS, (8, 8)), access_config(counter="exact"))
    fresh = other.state_dict()
    other.load_state_dict(session.state_dict())
    assert other.access_profile() == session.access_profile()
    other.load_state_dict(fresh)
    assert other.access_profile().lookups == 0
    state = copy.deepcopy(session.state_dict())
    state["access"]["shards"][".table_0@0:0"]["faded"] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(StateError, match=r"table_0@0:0: faded has 3 rows, this model has 400"):
        other.load_state_dict(state)
