"""Sessions' states that are damaged or of others: refused with what is wrong, and nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.inputs.test_session import SIZE, N, epoch_of
from tests.inputs.test_session import train as train_inputs
from tests.staleness.test_tracker import ROWS, config, train
from tests.tables import TBE, make_tbe
from tests.test_session import access_config
from torchrec_slipstream import (
    AccessConfig,
    InputsConfig,
    PlacementConfig,
    Slipstream,
    SlipstreamConfig,
    StalenessConfig,
    StateError,
)

# All parts have something to say.
FULL = SlipstreamConfig(
    staleness=StalenessConfig(where="everywhere", interval=2, warmup_steps=2, min_touches=1),
    access=AccessConfig(counter="exact", half_life=4, sketch_tables=("table_1",)),
    placement=PlacementConfig(hbm_budget=4000, replan_every=2, record_every=2, max_stall_share=None),
    inputs=InputsConfig(method="negatives", drop_share=0.3),
)


def attach() -> tuple[TBE, Slipstream]:
    tbe = make_tbe((2 * N, 2 * N), (4, 4))
    return tbe, Slipstream(tbe, FULL)


def saved() -> dict[str, Any]:
    """Of a session in the middle of an epoch, two batches of which were handed out and not trained on."""
    tbe, session = attach()
    stream = session.inputs(epoch_of(0))
    train_inputs(tbe, session, stream, 5)
    assert [len(next(stream).labels) for _ in range(2)] == [SIZE, SIZE]
    state = copy.deepcopy(session.state_dict())
    assert state["staleness"]["decisions"] != []
    assert state["placement"]["replans"] != []
    assert len(state["inputs"]["unconfirmed"]) == 2
    return state


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    return saved()


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, all of their tensors bit for bit."""
    if isinstance(one, Tensor):
        both = isinstance(other, Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return both and torch.equal(one.nan_to_num(nan=-7.0), other.nan_to_num(nan=-7.0))
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def test_states_are_compared_to_the_last_tensor() -> None:
    state = {"a": [torch.zeros(5000)], "b": (1, None)}
    other = copy.deepcopy(state)
    assert same(state, other)
    other["a"][0][2500] = 1
    assert str(state) == str(other)
    assert not same(state, other)


def paths(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """Of everything in the state, from the outside in."""
    if path:
        yield path
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from paths(one, *path, key)
    elif isinstance(value, (list, tuple)):
        for place, one in enumerate(value):
            yield from paths(one, *path, place)


def put(state: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The state with another value at a path; ``...``: with none."""
    changed = copy.copy(state)
    if isinstance(changed, tuple):
        changed = list(changed)
    if len(path) > 1:
        changed[path[0]] = put(changed[path[0]], path[1:], value)
    elif value is ...:
        del changed[path[0]]
    else:
        changed[path[0]] = value
    return changed


@pytest.mark.parametrize("value", [..., None, "x", [1], {}, {"y": 1}, 1.5, torch.zeros(2, dtype=torch.bool)], ids=repr)
@pytest.mark.parametrize("part", ["staleness", "access", "placement", "inputs"])
def test_whatever_is_damaged_in_a_part_nothing_changes(part: str, value: Any, good: dict[str, Any]) -> None:
    """It may be a thing that nothing depends on; but nothing raises in the middle of loading."""
    _, session = attach()
    before = copy.deepcopy(session.state_dict())
    refused = 0
    for path in paths(good[part], part):
        try:
            session.load_state_dict(put(good, path, value))
        except StateError:
            refused += 1
            assert same(session.state_dict(), before), path
        else:
            _, session = attach()
    assert refused > 15
    session.load_state_dict(good)
    assert same(session.state_dict(), good)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("staleness", None, "staleness is NoneType instead of a mapping"),
        ("staleness shards", [], "staleness.shards is list instead of a mapping"),
        (
            "staleness shards .table_0@0:0 touches",
            [1],
            r"shards\['.table_0@0:0'\]: touches is list instead of a tensor",
        ),
        ("staleness decisions 0 step", "x", r"decisions\[0\]\['step'\] is str instead of a number"),
        ("access", None, "access is NoneType instead of a mapping"),
        ("access config", 3, "access.config is int instead of a mapping"),
        ("access shards .table_1@0:0", (), r"access.shards\['.table_1@0:0'\] is tuple instead of a mapping"),
        ("placement", None, "placement is NoneType instead of a mapping"),
        ("placement replanners .table_0@0:0 0 since", None, "replanners.*: since is NoneType instead of a tensor"),
        ("placement points 0 hits", "many", r"placement.points\[0\]\['hits'\] is str instead of a number"),
        ("inputs", {}, r"inputs lacks \['config', 'rank', 'selector', 'scheduler', 'tally', 'stream', 'unconfirmed'\]"),
        ("inputs tally", ..., r"inputs lacks \['tally'\]"),
        ("inputs tally read", ..., r"inputs.tally has \['classes', .* instead of"),
        ("inputs stream size", "x", r"inputs.stream does not say \['size'\]"),
        ("inputs stream lanes", None, "inputs cannot be read .TypeError"),
        ("inputs unconfirmed 0 class", "nowhere:Batch", "which this program has not imported"),
        ("inputs selector", 7, "inputs.selector is int instead of a mapping"),
        ("inputs config drop_share", 0.2, r"another configuration: \['drop_share'\] differ"),
        ("inputs config fae", {"hot_bytes": None, "rate": 50.0}, r"\['fae.patience', 'fae.window'\] differ"),
        ("inputs config seed", ..., r"\['seed'\] differ"),
        ("version", 4, "version 4, which does not say by which knobs inputs were chosen; this release reads version 6"),
    ],
)
def test_what_is_wrong_is_said(path: str, value: Any, message: str, good: dict[str, Any]) -> None:
    _, session = attach()
    before = copy.deepcopy(session.state_dict())
    at = tuple(int(one) if one.isdigit() else one for one in path.split())
    with pytest.raises(StateError, match=message):
        session.load_state_dict(put(good, at, value))
    assert same(session.state_dict(), before)


@pytest.mark.parametrize(("part", "key"), [("selector", "batches"), ("scheduler", "scheduler")])
def test_what_only_the_method_can_read_is_refused_by_the_first_stream(
    part: str, key: str, good: dict[str, Any]
) -> None:
    _, session = attach()
    broken = put(good, ("inputs", part, key), ...)
    session.load_state_dict(broken)
    before = copy.deepcopy(session.state_dict())
    with pytest.raises(StateError, match=f"inputs.{part} cannot be read|state of another {part}"):
        session.inputs(epoch_of(0))
    assert same(session.state_dict(), before)


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
    assert same(session.state_dict(), before)


def test_truncated_state_changes_nothing() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config())
    train(tbe, session, range(60))
    good = copy.deepcopy(session.state_dict())
    for key in list(good["staleness"]["shards"][".table_1@0:0"]):
        broken = copy.deepcopy(good)
        del broken["staleness"]["shards"][".table_1@0:0"][key]
        with pytest.raises(StateError, match=r"\.table_1@0:0"):
            session.load_state_dict(broken)
        assert same(session.state_dict(), good)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", "many"),
        ("intervals", None),
        ("skipping_intervals", -3),
        ("trial_left", [1]),
        ("trial_left", -1),
        ("trial_left", 1000),
        ("sampling", [1.0]),
        ("decisions", [{"step": 3}]),
    ],
)
def test_malformed_state_changes_nothing(key: str, value: object) -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, config())
    train(tbe, session, range(60))
    good = copy.deepcopy(session.state_dict())
    broken = copy.deepcopy(good)
    broken["staleness"][key] = value
    broken["staleness"]["steps"] = value if key == "steps" else 7
    with pytest.raises(StateError, match="malformed"):
        session.load_state_dict(broken)
    assert same(session.state_dict(), good)


def test_state_counted_in_another_way_changes_nothing() -> None:
    tbe = make_tbe(ROWS, (8, 8))
    session = Slipstream(tbe, access_config(sketch_tables=("table_1",), half_life=20))
    train(tbe, session, range(60))
    good = copy.deepcopy(session.state_dict())
    other = Slipstream(make_tbe(ROWS, (8, 8)), access_config(half_life=30)).state_dict()
    broken = {}
    for name in ("faded", "samples", "sketch.rows", "sketch.counts", "sketch.errors", "sketch.total"):
        broken[name] = copy.deepcopy(good)
        del broken[name]["access"]["shards"][".table_1@0:0"][name]
    wrong = copy.deepcopy(good)
    wrong["access"]["shards"][".table_1@0:0"]["sketch.counts"] = torch.zeros(3)
    short = copy.deepcopy(good)
    short["access"]["shards"][".table_1@0:0"]["sketch.counts"] = torch.zeros(3, dtype=torch.int64)
    for state, message in (
        (other, r"another configuration: \['half_life', 'sketch_tables'\] differ. Use the same AccessConfig"),
        (
            {"version": 1, "staleness": good["staleness"]},
            "version 1, which does not say which rows are hot; this release",
        ),
        *((state, rf"\.table_1@0:0: .*lacks \['{name}'\]") for name, state in broken.items()),
        (wrong, r"table_1@0:0: the saved state has sketch\.counts of torch\.float32 \(3,\)"),
        (short, r"table_1@0:0: the saved sketch has not a count for every row"),
    ):
        with pytest.raises(StateError, match=message):
            session.load_state_dict(state)
        assert same(session.state_dict(), good)
