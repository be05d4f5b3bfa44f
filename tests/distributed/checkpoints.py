"""Checkpoints for the tests: models with and without overlays, and all that is in them.

Bags have one look-up at most, so that stock and overlay agree bit for bit at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel

from tests.models import TwoCollections, batches_for, placement_of
from torchrec_slipstream import (
    AccessConfig,
    PlacementConfig,
    Slipstream,
    SlipstreamConfig,
    StalenessConfig,
)
from torchrec_slipstream.tbe.overlay import Overlay

# Local tensors, by a name made of the table, the state and the shard's place.
Whole = dict[str, np.ndarray]


def attach(model: nn.Module, seed: int = 0) -> Slipstream:
    config = SlipstreamConfig(
        staleness=StalenessConfig(target_share=0),
        access=AccessConfig(counter="exact"),
        placement=PlacementConfig(replan_every=4, min_gain=0.0, move_cost=0.0, max_stall_share=None, chunk_bytes=200),
    )
    return Slipstream(model, config, placement=placement_of(model, 0.4, seed=seed))


def train(model: nn.Module, steps: range, rank: int, session: Slipstream | None = None) -> None:
    for step, batch in enumerate(batches_for(TwoCollections(), steps=steps.stop, rank=rank, longest=1)):
        if step in steps:
            model(*batch).square().sum().backward()
            if session is not None:
                session.step()


def overlays(session: Slipstream) -> list[Overlay]:
    return [one.overlay for one in session._filters if one.overlay is not None]


def assert_busy(session: Slipstream) -> None:
    """Hot rows have trained, and their truth is not where a checkpoint is read from."""
    assert overlays(session)
    for overlay in overlays(session):
        assert overlay.dirty
        assert not overlay.released
        assert sum(len(overlay.hot_rows(place)) for place in overlay.pool_of) > 3


def tensors_of(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All local tensors of a state_dict, optimizer state or list, with a name that says where in the whole they are."""
    if hasattr(tree, "local_shards"):
        for shard in tree.local_shards():
            yield f"{name}@{tuple(shard.metadata.shard_offsets)}", shard.tensor
    elif isinstance(tree, Tensor):
        yield name, tree
    elif hasattr(tree, "items"):
        for key, value in tree.items():
            yield from tensors_of(value, f"{name}/{key if isinstance(key, str) else '*'}")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from tensors_of(value, f"{name}/{i}")


def copied(tree: Any) -> Whole:
    return {name: tensor.detach().clone().numpy() for name, tensor in tensors_of(tree)}


def both(model: DistributedModelParallel) -> dict[str, Any]:
    """What a checkpoint has of a model. DCP does not load what is empty, as SGD's state is."""
    state = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}
    return {name: part for name, part in state.items() if list(tensors_of(part))}


def load(model: DistributedModelParallel, state: dict[str, Any]) -> None:
    model.load_state_dict(state["model"])
    if "optimizer" in state:
        model.fused_optimizer.load_state_dict(state["optimizer"])


def assert_same(got: Whole, want: Whole) -> None:
    assert got.keys() == want.keys()
    assert got
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
