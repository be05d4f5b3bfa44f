"""A session's saved state: its version, and what is checked of all its parts alike before a room looks at its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from torchrec_slipstream.errors import StateError

STATE_VERSION = 6
PARTS = ("staleness", "access", "placement", "inputs")

# What states lack that are of a version below.
_SINCE = {
    3: "which rows are hot",
    4: "which inputs were read",
    5: "by which knobs inputs were chosen",
    STATE_VERSION: "where leaving updates out pays",
}
# Of these parts, what is by shard, and what holds nothing but numbers.
_BY_SHARD = {"staleness": ("shards",), "access": ("shards",), "placement": ("shards", "replanners")}
_NUMBERS = {"staleness": ("sampling", "decisions"), "access": (), "placement": ("replans", "points")}


def check_whole(state: object) -> None:
    """Check the version, and that all parts but the inputs (``LiveInputs.check``) are built as they were saved.

    Raises:
        StateError: the state is of another version, or damaged; the message names the part.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if isinstance(version, int) and version in range(1, STATE_VERSION):
        missing = next(what for since, what in _SINCE.items() if version < since)
        raise StateError(
            f"this is a Slipstream state of version {version}, which does not say {missing}; this release reads "
            f"version {STATE_VERSION}. Start without it: the model's checkpoint is complete, and rows are "
            "tracked afresh."
        )
    if not isinstance(state, Mapping) or version != STATE_VERSION:
        raise StateError(f"not a Slipstream state of version {STATE_VERSION} (version={version!r})")
    if missing_parts := [part for part in PARTS if part not in state]:
        raise StateError(f"not a Slipstream state: it lacks {missing_parts}")
    for part, by_shard in _BY_SHARD.items():
        saved = check_mapping(part, state[part])
        for name in ("config", *by_shard):
            if name in saved:  # what is missing the room says
                check_mapping(f"{part}.{name}", saved[name])
        for key, shard in saved.get("shards", {}).items():
            check_mapping(f"{part}.shards[{key!r}]", shard)
            if part != "placement":  # whose room does it
                _check_tensors(f"{part}.shards[{key!r}]", shard)
        for key, pools in saved.get("replanners", {}).items():
            for pool in pools if isinstance(pools, list) else ():
                _check_tensors(f"{part}.replanners[{key!r}]", pool)
        for name in _NUMBERS[part]:
            if isinstance(saved.get(name), (list, tuple)):
                check_numbers(f"{part}.{name}", saved[name])


def check_mapping(path: str, saved: object) -> Mapping[str, Any]:
    """``saved``, which is at ``path`` of the state. Raises StateError unless it is a mapping."""
    if not isinstance(saved, Mapping):
        raise damaged(f"{path} is {type(saved).__name__} instead of a mapping")
    return saved


def check_numbers(path: str, saved: object) -> None:
    """Raises StateError unless all leaves of what is at ``path`` are plain numbers."""
    if isinstance(saved, (Mapping, list, tuple)):
        for key, one in saved.items() if isinstance(saved, Mapping) else enumerate(saved):
            check_numbers(f"{path}[{key!r}]", one)
    elif not isinstance(saved, (int, float)):
        raise damaged(f"{path} is {type(saved).__name__} instead of a number")


def _check_tensors(path: str, saved: object) -> None:
    for name, one in check_mapping(path, saved).items():
        if not isinstance(one, Tensor):
            raise damaged(f"{path}: {name} is {type(one).__name__} instead of a tensor")


def damaged(why: str) -> StateError:
    """The error for a state that says no sense, for the reason ``why``."""
    return StateError(f"the saved state is damaged: {why}. Give what Slipstream.state_dict() gave, or start without it")


@contextmanager
def checking(part: str) -> Iterator[None]:
    """Around checks of a part, which change nothing: what a damaged one makes them raise comes as a StateError."""
    try:
        yield
    except StateError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise damaged(f"{part} cannot be read ({type(error).__name__}: {error})") from error
