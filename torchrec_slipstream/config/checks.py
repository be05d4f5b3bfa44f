"""What a value has to be."""

from __future__ import annotations

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


def names(name: str, value: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(value, str):
        raise ConfigError(f"{name}={value!r} is a string; give a tuple of table names")
    return tuple(value)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")
