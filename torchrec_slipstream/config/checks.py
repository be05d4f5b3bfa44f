"""What a value has to be. Each check raises a ConfigError that names the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from torchrec_slipstream.budget import parse_bytes
from torchrec_slipstream.errors import ConfigError


def within(name: str, value: float, low: float, high: float | None = None, *, open_end: bool = False) -> None:
    if isinstance(low, int) and high is None:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name}={value!r} must be an integer of at least {low}")
        return
    assert high is not None
    fits = isinstance(value, (int, float)) and low <= value and (value < high if open_end else value <= high)
    if not fits or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be a number in [{low}, {high}{')' if open_end else ']'}")


def finite(name: str, value: object, least: float, *, open_start: bool = False, otherwise: str = "") -> None:
    """``otherwise`` says what may be given instead of a number."""
    fits = isinstance(value, (int, float)) and (least < value if open_start else least <= value) and value < inf
    if not fits or isinstance(value, bool):
        bound = f"above {least:g}" if open_start else f"of at least {least:g}"
        raise ConfigError(f"{name}={value!r} must be a finite number {bound}{otherwise}")


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be True or False")


def instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r} is no {kind.__name__}; give {name}={kind.__name__}(...)")


def memory(name: str, value: int | str) -> int:
    """In bytes."""
    try:
        return parse_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def names(name: str, value: Iterable[str]) -> tuple[str, ...]:
    """In one order, each once: a set has another order in another process."""
    if isinstance(value, str):
        raise ConfigError(f"{name}={value!r} is a string; give a tuple of table names: {name}=({value!r},)")
    found = list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(one, str) for one in found):
        raise ConfigError(f"{name}={value!r} must be table names; give a tuple of strings, () for none")
    return tuple(sorted(set(found)))


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
