"""The session on real TBEs and on TorchRec's DistributedModelParallel, one rank."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.models import TwoCollections, batches_for, sharded
from tests.staleness.test_tracker import ROWS, config, train
from tests.tables import make_tbe, table_states
from torchrec_slipstream import AttachError, Report, Slipstream, StateError


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
        {"selection": "duty", "signal": "drift", "snapshot_dtype": "float16", "count_every": 2},
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


def test_state_of_another_model_or_config_changes_nothing() -> None:
    tbe = make_tbe(ROWS, (8, 8), table_names=["a", "b"])
    session = Slipstream(tbe, config())
    train(tbe, session, range(60))
    before = copy.deepcopy(session.state_dict())
    other_names = Slipstream(make_tbe(ROWS, (8, 8)), config()).state_dict()
    other_rows = Slipstream(make_tbe((401, 60), (8, 8), table_names=["a", "b"]), config()).state_dict()
    other_config = Slipstream(make_tbe(ROWS, (8, 8), table_names=["a", "b"]), config(target_share=0.1)).state_dict()
    for state, message in (
        (other_names, r"lacks shard\(s\) \['\.a@0:0', '\.b@0:0'\]"),
        (other_rows, r"shard \.a@0:0: the saved state has touches of shape \(401,\), this model needs \(400,\)"),
        (other_config, r"\['target_share'\] differ"),
        ({"version": 99, "staleness": {}}, "version=99"),
        ({}, "version=None"),
        ("nonsense", "version=None"),
    ):
        with pytest.raises(StateError, match=message):
            session.load_state_dict(state)  # type: ignore[arg-type]
    after = session.state_dict()
    assert str(after) == str(before)


def test_truncated_state_changes_nothing() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config())
    train(tbe, session, range(60))
    good = session.state_dict()
    for key in list(good["staleness"]["shards"][".table_1@0:0"]):
        broken = copy.deepcopy(good)
        del broken["staleness"]["shards"][".table_1@0:0"][key]
        with pytest.raises(StateError, match=r"\.table_1@0:0"):
            session.load_state_dict(broken)
        assert str(session.state_dict()) == str(good)


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", "many"), ("baseline", [1]), ("sampling", [1.0]), ("decisions", [{"step": 3}]), ("intervals", None)],
)
def test_malformed_state_changes_nothing(key: str, value: object) -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config())
    train(tbe, session, range(60))
    good = session.state_dict()
    broken = copy.deepcopy(good)
    broken["staleness"][key] = value
    broken["staleness"]["steps"] = value if key == "steps" else 7
    with pytest.raises(StateError, match="malformed"):
        session.load_state_dict(broken)
    assert str(session.state_dict()) == str(good)


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
