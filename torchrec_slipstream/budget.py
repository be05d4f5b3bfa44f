"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from numbers import Integral

from torchrec_slipstream.errors import ConfigError

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{kind}": base ** (power + 1)
    for power, prefix in enumerate("KMGT")
    for kind, base in (("B", 1000), ("iB", 1024))
}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """A size in bytes, from a whole number or a string such as ``"8GiB"``, ``"1.5 TB"``, ``"4096"``.

    Raises:
        ConfigError: it is neither, or negative, or a string of a fractional number of bytes. The message names it.
    """
    if isinstance(size, Integral) and not isinstance(size, bool) and size >= 0:
        return int(size)  # numpy's are not int
    match = _PATTERN.fullmatch(size) if isinstance(size, str) else None
    unit = _UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise ConfigError(
            f"{size!r} is not a size of memory; give bytes as a whole number, or a string such as '8GiB' or '500MB'"
        )
    if unit == 1 and "." in match[1]:  # a share, or a unit that was forgotten: a budget of 0 or 1 byte is not meant
        raise ConfigError(
            f"{size!r} is not a size of memory: bytes are whole; give a unit as in '8GiB', or where a share is meant "
            "a float such as 0.25 (on the command line 25%)"
        )
    return int(float(match[1]) * unit)


def format_bytes(size: float) -> str:
    """A size for people, in binary units with three digits or so: ``"1.25 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB" if abs(size) < 1000 else f"{size:,.0f} TiB"
