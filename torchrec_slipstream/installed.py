"""Which torch, FBGEMM and TorchRec are installed, which this package is made for, and on what processor.

Imports none of them: it has to say what is installed where they do not load.
"""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

# The oldest and the newest of each whose internals were read; the README says which of them the tests have run on.
SUPPORTED = {
    "torch": ("2.11", "2.13"),
    "FBGEMM": ("1.6", "1.8"),
    "torchrec": ("1.6.1", "1.9.2"),
}
# FBGEMM comes under several names with one module.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "FBGEMM": ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm-gpu-genai", "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu"),
    "torchrec": ("torchrec", "torchrec-nightly"),
}


def installed() -> dict[str, str]:
    """The version of each of ``SUPPORTED`` that is installed; ``"not installed"`` where none is."""
    found = {}
    for name, distributions in _DISTRIBUTIONS.items():
        found[name] = "not installed"
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def versions_note() -> str:
    """What is installed, what is supported, and what to do: the end of a message about something that is missing."""
    have = ", ".join(f"{name} {version}" for name, version in installed().items())
    supported = ", ".join(f"{name} {least} to {most}" for name, (least, most) in SUPPORTED.items())
    return (
        f"Installed: {have}. Supported: {supported}, with the FBGEMM that belongs to the torch (1.6 to 2.11, 1.7 to "
        "2.12, 1.8 to 2.13). Install versions of these."
    )


def outside_of_supported(versions: Mapping[str, str]) -> list[str]:
    """Those of ``versions`` (as :func:`installed` gives them) that are outside of ``SUPPORTED``, in words.

    Only the first two parts of a version count. One that cannot be read says nothing.
    """
    outside = []
    for name, (least, most) in SUPPORTED.items():
        version = versions.get(name, "")
        number = _release(version)
        if number is None:
            continue
        if number > (_release(most) or number) or number < (_release(least) or number):
            outside.append(f"{name} {version} (supported: {least} to {most})")
    return outside


@cache
def warn_if_outside() -> None:
    """Warn, once in a process, where a version is outside of those supported. That is no reason to refuse it."""
    if outside := outside_of_supported(installed()):
        warnings.warn(
            f"{', '.join(outside)}: torchrec_slipstream finds all that it uses there, but it was not made for it",
            stacklevel=2,
        )


def processor() -> str:
    """The model of this machine's processor, or what is known of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    name = found.get("model name") or platform.processor() or "unknown"
    # Virtual machines say no more than "AMD EPYC", of which the fastest is twice as fast as the slowest.
    more = [f"{key} {found[key]}" for key in ("cpu family", "model") if found.get(key)]
    return f"{name} ({', '.join(more)})" if more else name


def _release(version: str) -> tuple[int, int] | None:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else None
