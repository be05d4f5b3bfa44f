"""Every way to read or load a model's tables while rows train in an overlay; and nothing is left after it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.optim.keyed import CombinedOptimizer, OptimizerWrapper

from tests.distributed.checkpoints import (
    assert_busy,
    assert_same,
    attach,
    both,
    copied,
    load,
    overlays,
    tensors_of,
    train,
)
from tests.distributed.ranks import run_ranks
from tests.models import TwoCollections, sharded
from tests.tables import TBE
from torchrec_slipstream import (
    StateError,
)
from torchrec_slipstream.tbe import find_tbes

pytestmark = pytest.mark.slow  # other processes

# ------------------------------------------------------------------------------------------- one way to read at a time


def _tbes(model: nn.Module) -> list[TBE]:
    return [
        kernel.emb_module
        for collection in (model.module.bags, model.module.sequences)
        for lookup in collection._lookups
        for kernel in lookup._emb_modules
    ]


def _one(model: nn.Module) -> Any:
    return next(one for one in find_tbes(model) if len(one.shards) == 2)


def _wrapper(model: Any) -> OptimizerWrapper:
    return OptimizerWrapper(CombinedOptimizer([model.fused_optimizer]))


# What is taken from the model before anybody attaches, and how it is read right after a step.
READERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "model": (lambda m: m, lambda m: m.state_dict()),
    "module": (lambda m: m.module, lambda m: m.state_dict()),
    "collection": (lambda m: m.module.sequences, lambda m: m.state_dict()),
    "optimizer": (lambda m: m.fused_optimizer, lambda o: o.state_dict()),
    "optimizer, combined state": (lambda m: m.fused_optimizer, lambda o: o.state),
    "collection's optimizer": (lambda m: m.module.sequences.fused_optimizer, lambda o: o.state_dict()),
    "kernel's optimizer": (lambda m: _one(m).optimizer, lambda o: o.state_dict()),
    "kernel's optimizer, state": (lambda m: _one(m).optimizer, lambda o: o.state),
    "parameter's optimizer": (
        lambda m: m.module.sequences.embeddings.s0.weight._in_backward_optimizers[0],
        lambda o: o.state_dict(),
    ),
    "wrapped optimizer": (_wrapper, lambda o: o.state_dict()),
    "tbe": (lambda m: _one(m).tbe, lambda t: t.state_dict()),
    "tbe weights": (lambda m: _one(m).tbe, lambda t: t.split_embedding_weights()),
    "tbe states": (lambda m: _one(m).tbe, lambda t: t.split_optimizer_states()),
    "tbe optimizer state": (lambda m: _one(m).tbe, lambda t: t.get_optimizer_state()),
    "flush": (
        lambda m: (_one(m).tbe, list(m.module.sequences.parameters())),
        lambda pair: (pair[0].flush(), pair[1]),
    ),
}


def _read(rank: int) -> None:
    for name, (take, read) in READERS.items():
        stock, ours = sharded(TwoCollections()), sharded(TwoCollections())
        readers = [take(stock), take(ours)]
        session = attach(ours)
        before = copied(read(readers[0]))
        for steps in (range(3), range(3, 5)):  # the second time, with what the first reader left
            train(stock, steps, rank)
            train(ours, steps, rank, session)
            assert_busy(session)
            want, got = (copied(read(reader)) for reader in readers)
            try:
                assert_same(got, want)
                assert any((before[key] != want[key]).any() for key in want if key in before)
            except AssertionError as error:
                raise AssertionError(f"reader {name!r}, step {steps.stop}: {error}") from error


def test_every_reader_sees_the_current_state() -> None:
    run_ranks(1, _read)


# ------------------------------------------------------------------------------------------- one way to load at a time


def _into(state: Any, values: Any) -> None:
    """Load in place, as ``dcp.load`` does."""
    sources = dict(tensors_of(values))
    for name, tensor in tensors_of(state):
        if name in sources:
            tensor.detach().copy_(sources[name])


def _in_place(model: Any, saved: dict[str, Any]) -> None:
    state = both(model)
    _into(state, saved)
    load(model, state)


def _in_place_and_no_more(model: Any, saved: dict[str, Any]) -> None:
    _into(both(model), saved)


def _part(model: Any, saved: dict[str, Any]) -> None:
    # Stock TorchRec wants all tables of a collection or none.
    part = {name: value for name, value in saved["model"].items() if "sequences" in name}
    assert len(part) == 2
    model.load_state_dict(part, strict=False)


def _twice(model: Any, saved: dict[str, Any]) -> None:
    first = copy.deepcopy(saved)
    _into(first, {name: value * 0.5 for name, value in tensors_of(saved)})
    load(model, first)
    load(model, saved)


def _step_between(model: Any, saved: dict[str, Any]) -> None:
    model.load_state_dict(saved["model"])
    train(model, range(20, 21), 0)
    model.fused_optimizer.load_state_dict(saved["optimizer"])


def _own(model: Any, saved: dict[str, Any]) -> None:
    load(model, both(model))


def _old_views_of_its_own(model: Any, saved: dict[str, Any]) -> None:
    """Which stock TorchRec copies onto itself, or merges before it loads (column-wise)."""
    load(model, saved["old"])


def _reset_parameters(model: Any, saved: dict[str, Any]) -> None:
    for one in _tbes(model):
        one.flush()
    torch.manual_seed(3)
    model.module.bags.reset_parameters()
    model.module.sequences.reset_parameters()


def _zero_momenta(model: Any, saved: dict[str, Any]) -> None:
    for tbe in _tbes(model):
        for states in tbe.split_optimizer_states():
            states[0].zero_()


def _uniform(model: Any, saved: dict[str, Any]) -> None:
    torch.manual_seed(5)
    for tbe in _tbes(model):
        tbe.init_embedding_weights_uniform(-1.0, 1.0)


LOADERS: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "directly": load,
    "model alone": lambda model, saved: model.load_state_dict(saved["model"]),
    "module alone": lambda model, saved: model.module.load_state_dict(saved["model"]),
    "optimizer alone": lambda model, saved: model.fused_optimizer.load_state_dict(saved["optimizer"]),
    "wrapped optimizer": lambda model, saved: _wrapper(model).load_state_dict(saved["optimizer"]),
    "in place, then load_state_dict": _in_place,
    "in place alone": _in_place_and_no_more,
    "one collection": _part,
    "twice": _twice,
    "a step between model and optimizer": _step_between,
    "its own": _own,
    "its own, old views": _old_views_of_its_own,
    "reset_parameters": _reset_parameters,
    "FBGEMM's states": _zero_momenta,
    "FBGEMM's init": _uniform,
}


def _load_between_steps(rank: int, sharding: str) -> None:
    third = sharded(TwoCollections(), sharding, seed=4)
    train(third, range(30, 37), rank)
    saved = copy.deepcopy(both(third))
    for name, loader in LOADERS.items():
        stock, ours = sharded(TwoCollections(), sharding), sharded(TwoCollections(), sharding)
        session = attach(ours)
        old = [both(one) for one in (stock, ours)]
        train(stock, range(5), rank)
        train(ours, range(5), rank, session)
        assert_busy(session)
        before = copied(both(stock))
        for one, views in zip((stock, ours), old, strict=True):
            loader(one, copy.deepcopy(saved) | {"old": views})
        loaded = copied(both(stock))
        try:
            assert name.startswith("its own") or any((before[key] != loaded[key]).any() for key in before)
            train(stock, range(5, 9), rank)
            train(ours, range(5, 9), rank, session)
            assert_same(copied(both(ours)), copied(both(stock)))
        except AssertionError as error:
            raise AssertionError(f"loader {name!r}: {error}") from error


@pytest.mark.parametrize("sharding", ["table_wise", "column_wise"])
def test_what_is_loaded_by_whatever_way_trains_on(sharding: str) -> None:
    run_ranks(1, _load_between_steps, sharding)


def _old_views(rank: int) -> None:
    stock, ours = sharded(TwoCollections()), sharded(TwoCollections())
    old = both(ours)
    saved = copy.deepcopy(both(sharded(TwoCollections(), seed=7)))
    load(stock, saved)
    session = attach(ours)
    # Nothing has trained since: the overlay has nothing to lose, and takes over what was written.
    _into(old, saved)
    session.load_state_dict(session.state_dict())  # which moves rows
    train(stock, range(3), rank)
    train(ours, range(3), rank, session)
    assert_same(copied(both(ours)), copied(both(stock)))
    for write in (
        lambda: _into(old["model"], saved["model"]),
        lambda: _into(old["optimizer"], saved["optimizer"]),
        lambda: ours.module.sequences.reset_parameters(),
    ):
        for find in (
            lambda: train(ours, range(5, 6), rank, session),
            lambda: both(ours),
            lambda: load(ours, old),
            session.detach,
        ):
            train(ours, range(3, 5), rank, session)
            assert_busy(session)
            write()
            with pytest.raises(StateError, match=r"table\(s\) .*taken before the last training step"):
                find()
            for overlay in overlays(session):  # the others have it to say as well
                with contextlib.suppress(StateError):
                    overlay.release()
            load(ours, saved)  # the way out that the message names
    load(stock, saved)
    train(stock, range(3), rank)
    train(ours, range(3), rank, session)
    assert_same(copied(both(ours)), copied(both(stock)))


def test_writes_into_old_views_are_found_out() -> None:
    run_ranks(1, _old_views)


# ------------------------------------------------------------------------------------------- nothing is left behind


def _traces(model: nn.Module) -> list[Any]:
    modules = [*model.modules(), *(tbe for tbe in _tbes(model)), *(one.optimizer for one in find_tbes(model))]
    modules += [o for p in model.parameters() for o in getattr(p, "_in_backward_optimizers", [])]
    hooks = ("_state_dict_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
    return [
        (type(one), sorted(one.__dict__), [list(one.__dict__.get(name, {}).values()) for name in hooks])
        for one in modules
    ]


def _detach(rank: int) -> None:
    stock, ours = sharded(TwoCollections()), sharded(TwoCollections())
    before = _traces(ours)
    session = attach(ours)
    assert [one[0] for one in before] != [type(one) for one in ours.modules()]
    train(stock, range(5), rank)
    train(ours, range(5), rank, session)
    assert_busy(session)
    session.detach()
    session.detach()
    assert _traces(ours) == before
    assert_same(copied(both(ours)), copied(both(stock)))
    old = both(ours)
    train(stock, range(5, 8), rank)
    train(ours, range(5, 8), rank)
    assert_same(copied(old), copied(both(stock)))  # live views again
    saved = copy.deepcopy(both(stock))
    load(ours, saved)
    again = attach(ours, seed=2)
    train(stock, range(8, 11), rank)
    train(ours, range(8, 11), rank, again)
    assert_same(copied(both(ours)), copied(both(stock)))


def test_detached_model_is_stock() -> None:
    run_ranks(1, _detach)
