"""A run's record: a JSON file that says what a run was and did, with or without a session; ``slipstream report`` draws
it.

One object with ``format`` and ``version``, and besides:

| key | what |
| --- | --- |
| ``name`` | what the run is called beside others; the file's name where there is none |
| ``slipstream`` | :meth:`Report.to_dict`; null for a run without a session |
| ``history`` | metrics over time, ``[{"step": 500, "auc": 0.78, "log_loss": 0.45}, ...]`` |
| ``step_ms`` | milliseconds of a step by part, and ``median``, ``p20`` and ``p80`` of whole steps |
| ``best_possible`` | by metric, what the best model would get, where that is known |
| ``versions`` | of the packages, and the device |
| any other | what a program has to say of its run; plain values are listed on the page |

Several runs in one file are an object of such objects, by any keys (``examples/train_dlrm.py --compare --json``).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from torchrec_slipstream.errors import ConfigError
from torchrec_slipstream.installed import installed, processor
from torchrec_slipstream.report.report import Report
from torchrec_slipstream.writing import whole_file

FORMAT = "torchrec_slipstream.run"
VERSION = 1
_KNOWN = ("format", "version", "name", "slipstream", "history", "step_ms", "best_possible", "versions")
# Beyond this no number is of a run, and sums and differences of such could not be drawn.
_MOST = 1e100
_WRITERS = "what Report.save or examples/train_dlrm.py --json wrote"


def versions(device: str | torch.device = "") -> dict[str, str]:
    """The packages' versions, and what this process trains on: ``device`` (default: a GPU where there is one)."""
    found = {"python": platform.python_version(), **installed()}
    with suppress(PackageNotFoundError):  # run from its sources
        found["torchrec_slipstream"] = version("torchrec-slipstream")
    on_gpu = torch.cuda.is_available() and not str(device).startswith("cpu")
    return found | {"device": torch.cuda.get_device_name() if on_gpu else processor()}


@dataclass(frozen=True)
class RunRecord:
    """One run. The attributes are the file's keys (see above); ``facts`` are all others, plain values only."""

    report: Report | None
    name: str = ""
    history: Sequence[Mapping[str, float | None]] = ()
    step_ms: Mapping[str, float] = field(default_factory=dict)
    best_possible: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=versions)
    facts: Mapping[str, str | float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The file's object: plain numbers and strings, null for what is not finite (or beyond 1e100).

        Raises:
            ConfigError: a history entry has no step, or is no number; or so of the milliseconds.
        """
        for name, value in self.step_ms.items():
            if not _is_number(value):
                raise ConfigError(f"step_ms: {name!r} is {value!r}; give milliseconds as a number")
        for entry in self.history:
            _check_entry(entry)
        whole = {
            **self.facts,
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "slipstream": self.report.to_dict() if self.report is not None else None,
            "history": list(self.history),
            "step_ms": dict(self.step_ms),
            "best_possible": dict(self.best_possible),
            "versions": dict(self.versions),
        }
        finite: dict[str, Any] = _finite(whole)
        return finite

    def save(self, path: str | Path) -> None:
        """Write it as JSON; the file appears whole or not at all.

        Raises:
            ConfigError: what :meth:`to_dict` raises; or the path cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with whole_file(path, ConfigError) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @staticmethod
    def from_dict(values: Mapping[str, Any], name: str = "") -> RunRecord:
        """What :meth:`to_dict` gave; ``name`` where it has none.

        Raises:
            ConfigError: it is of another kind or version, or incomplete or malformed. The message says which.
        """
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ConfigError(f"is not a run's record; give {_WRITERS}")
        if (found := values.get("version")) != VERSION:
            newer = isinstance(found, int) and found > VERSION
            remedy = "update torchrec_slipstream" if newer else f"give {_WRITERS} in this release"
            raise ConfigError(f"is of version {found!r}, and this release reads version {VERSION}; {remedy}")
        try:
            report = Report.from_dict(values["slipstream"]) if values["slipstream"] is not None else None
            if report is not None:
                _check_report(report)
            return RunRecord(
                report=report,
                name=str(values.get("name") or name),
                history=[_finite(_check_entry(entry)) for entry in values.get("history") or ()],
                step_ms=_known(values, "step_ms"),
                best_possible=_known(values, "best_possible"),
                versions={key: str(value) for key, value in (values.get("versions") or {}).items()},
                facts={
                    key: one
                    for key, one in values.items()
                    if key not in _KNOWN and (isinstance(one, str | bool) or _is_drawn(one))
                },
            )
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ConfigError(f"is damaged ({type(error).__name__}: {error}); give {_WRITERS}") from error


def load_all(paths: Sequence[str | Path]) -> list[RunRecord]:
    """The runs of several files, in order, each by a name of its own: with the file's where two have the same.

    Raises:
        ConfigError: what :func:`load` raises.
    """
    found = [(Path(path).stem, run) for path in paths for run in load(path)]
    named: list[RunRecord] = []
    for file, run in found:
        name = run.name if sum(other.name == run.name for _, other in found) == 1 else f"{file}: {run.name}"
        taken = [one.name for one in named]
        number = next(n for n in range(1, len(found) + 1) if (name if n == 1 else f"{name} ({n})") not in taken)
        named.append(replace(run, name=name if number == 1 else f"{name} ({number})"))
    return named


def load(path: str | Path) -> list[RunRecord]:
    """The runs of a file: one, or several side by side, in the file's order.

    Raises:
        ConfigError: there is no such file, or it is no record, damaged, or of another version: the message says which.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_bytes(), parse_constant=lambda _: None)  # NaN is Python's, not JSON's
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give {_WRITERS}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise ConfigError(f"{path} is not JSON ({error}); give {_WRITERS}") from error
    several = isinstance(found, dict) and found and "format" not in found
    runs = found if several and all(isinstance(one, dict) for one in found.values()) else {path.stem: found}
    try:
        return [RunRecord.from_dict(one, name) for name, one in runs.items()]
    except ConfigError as error:
        raise ConfigError(f"{path} {error}") from error


def _check_report(report: Report) -> None:
    """Raises TypeError for a value that is not of its field's type, or too large to be one of a run: where a file is
    believed, not where it is drawn."""
    parts: list[Any] = [report, *report.tables.values(), *report.decisions, *report.spread.values()]
    parts += report.payoffs
    if (placed := report.placement) is not None:
        parts += [placed, *placed.tables.values(), *placed.points, *placed.replans]
    if (inputs := report.inputs) is not None:
        parts += [inputs, *inputs.classes.values(), *inputs.labels.values(), *inputs.features.values()]
        parts += [*inputs.tables.values(), *inputs.lanes.values(), *inputs.searches]
    for octaves in report.spread.values():
        counts, lowest = octaves.counts, octaves.lowest
        if not isinstance(lowest, int) or abs(lowest) + len(counts) > 256 or not all(map(_is_whole, counts)):
            raise TypeError(f"a spread is {octaves!r}")
    if not isinstance(report.config, Mapping):
        raise TypeError(f"config is {report.config!r}")
    for part in parts:
        for one in fields(part):
            value = getattr(part, one.name)
            fits = {
                "str": isinstance(value, str),
                "int": _is_whole(value),
                "float": _is_drawn(value),
                "int | None": value is None or _is_whole(value),
                "float | None": value is None or _is_drawn(value),
                "bool": isinstance(value, bool),
            }
            if not fits.get(str(one.type), True):
                raise TypeError(f"{one.name} is {value!r}")


def _known(values: Mapping[str, Any], key: str) -> dict[str, float]:
    found = {name: value for name, value in (values.get(key) or {}).items() if value is not None}
    if wrong := [name for name, value in found.items() if not _is_drawn(value)]:
        raise TypeError(f"{key}: {wrong[0]!r} is {found[wrong[0]]!r}")
    return {name: float(value) for name, value in found.items()}


def _check_entry(entry: Mapping[str, float | None]) -> Mapping[str, float | None]:
    if not isinstance(entry, Mapping) or not _is_whole(entry.get("step")):
        raise ConfigError(f"history: {entry!r} has no step; give entries such as {{'step': 500, 'auc': 0.78}}")
    for name, value in entry.items():
        if value is not None and not _is_number(value):
            raise ConfigError(f"history, step {entry['step']}: {name!r} is {value!r}; give a number")
    return entry


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_drawn(value: object) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return -_MOST <= (int(value) if isinstance(value, Integral) else float(value)) <= _MOST  # numpy's would overflow


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and _is_drawn(value)


def _finite(value: Any) -> Any:
    """The same in JSON's own types, with None for numbers that JSON has no word for, or that no run has."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if not _is_number(value):
        return value
    if not _is_drawn(value):
        return None
    return int(value) if isinstance(value, Integral) else float(value)  # numpy's are not int
