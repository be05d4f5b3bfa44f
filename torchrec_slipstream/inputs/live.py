"""The session's end of the room: one selector through all epochs, one stream an epoch, and what a resumed run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from torchrec_slipstream.config import InputsConfig
from torchrec_slipstream.errors import InputError, StateError
from torchrec_slipstream.inputs.batches import size_of
from torchrec_slipstream.inputs.blind import KeepAll
from torchrec_slipstream.inputs.choice import OneLane, Scheduler, Selector
from torchrec_slipstream.inputs.dealing import Lockstep
from torchrec_slipstream.inputs.methods import told_by
from torchrec_slipstream.inputs.packing import pack, unpack
from torchrec_slipstream.inputs.queues import HandedOut
from torchrec_slipstream.inputs.stream import InputStream
from torchrec_slipstream.inputs.tally import Tally
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.report.inputs import InputReport
from torchrec_slipstream.session_state import check_mapping, check_numbers, checking, damaged
from torchrec_slipstream.tbe.features import ModelTable

_SAVED = ("config", "rank", "selector", "scheduler", "tally", "stream", "unconfirmed")


class LiveInputs:
    """The inputs of a session.

    Args:
        config: of the inputs.
        group: whose ranks read in lockstep; None: this process alone.
        make: the method's selector and scheduler, from what :meth:`open` is given.
    """

    def __init__(
        self,
        config: InputsConfig,
        group: dist.ProcessGroup | None,
        make: Callable[..., tuple[Selector, Scheduler]],
    ) -> None:
        self._config, self._group = config, group
        self._make = make
        own = Ranks(group)
        self._rank = (own.mine, own.number)
        self._tally = Tally()
        self._ranks: Lockstep | None = None
        self._method: tuple[Selector, Scheduler] | None = None
        self._things: dict[str, Any] | None = None  # that the method was made with
        self._stream: InputStream | None = None
        self._handed_out = HandedOut()
        self._saved: dict[str, Any] | None = None

    def open(self, loader: Iterable[Any], **things: Any) -> Iterator[Any]:
        """The batches of an epoch; those of the epoch that a loaded state is of, from where it was.

        An epoch that was left before its end is over with this: its stream gives no more, its samples that wait are
        left over, and its batches that were handed out but not trained on count as used, and are not trained on by a
        resumed run. A pipeline that still holds such batches would train on them first: make a new one.

        Raises:
            InputError: the method takes other ``things``, or took others in the first call.
            StateError: the loaded state is of another method or number of ranks, or damaged; nothing was changed.
        """
        self._check_things(things)
        if self._config.method == "off":
            return iter(loader)
        if self._method is None:
            method = self._make(loader, **things)
            if self._saved is not None and self._saved["selector"] is not None:
                with checking("inputs.selector"):
                    method[0].load_state_dict(self._saved["selector"])
                with checking("inputs.scheduler"):
                    method[1].load_state_dict(self._saved["scheduler"])
            self._ranks = Lockstep(self._group)
            self._method, self._things = method, things
        assert self._ranks is not None
        stream = InputStream(loader, *self._method, self._ranks, self._tally, self._handed_out)
        if self._saved is not None and self._saved["stream"] is not None:
            stream.load_state_dict(self._saved["stream"])
        else:
            self._method[1].begin()
        if self._stream is not None:
            self._stream.leave()
        if self._saved is not None:
            stream.again.extend(unpack(one) for one in self._saved["unconfirmed"])
            self._saved = None
        self._stream = stream
        return stream

    def _check_things(self, things: dict[str, Any]) -> None:
        """Raises InputError where some would not be heeded; what the method takes ``make`` knows."""
        method = self._config.method
        if method == "off" and things:
            raise InputError(f"method='off' takes no {', '.join(sorted(things))}; give it nothing but the loader")
        taken = self._things if self._things is not None else things
        if unknown := sorted(things.keys() - taken.keys()):
            raise InputError(
                f"method={method!r} got no {', '.join(unknown)} with the first call of inputs(), and takes none later; "
                f"give it there, or {'the same things again' if taken else 'nothing but the loader'}"
            )
        if other := sorted(name for name, one in things.items() if one is not taken[name] and one != taken[name]):
            raise InputError(
                f"method={method!r} got another {', '.join(other)} with the first call of inputs(), and goes on with "
                "it; give the same again, or leave it out"
            )

    def step(self, steps: int) -> None:
        """``steps`` training steps are over; the last was that of the oldest batch handed out."""
        self._handed_out.confirm()
        if self._method is not None:
            self._method[0].step(steps)

    def detach(self) -> None:
        """Choose no more: the stream that is open goes on, in lockstep, and keeps all samples that it still reads."""
        self._handed_out.forget()
        if self._stream is not None:
            old = self._stream.selector
            self._stream.selector = KeepAll(lanes=old.lanes, weighs=old.weighs)

    def report(self, tables: Sequence[ModelTable] = ()) -> InputReport | None:
        """Of this rank; None where all inputs pass untouched. ``tables``: of the model."""
        if self._config.method == "off":
            return None
        waiting = self._stream.buffered if self._stream is not None else 0
        told = told_by(self._method[0]) if self._method is not None else {}
        return self._tally.report(self._config.method, waiting, tables, **told)

    # ----------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any] | None:
        """What a resumed epoch needs; None where all inputs pass untouched."""
        if self._config.method == "off":
            return None
        if self._saved is not None:  # loaded, and nothing was read since
            return self._saved
        again = [*self._handed_out.batches, *(self._stream.again if self._stream is not None else ())]
        # An epoch that ended, all of it trained on, is over: the next stream is the next epoch's.
        goes_on = self._stream is not None and (again or not self._stream.ended)
        return {
            "config": asdict(self._config),
            "rank": list(self._rank),
            "selector": self._method[0].state_dict() if self._method is not None else None,
            "scheduler": self._method[1].state_dict() if self._method is not None else None,
            "tally": self._tally.state_dict(),
            "stream": self._stream.state_dict() if self._stream is not None and goes_on else None,
            "unconfirmed": [pack(batch) for batch in again],
        }

    def check(self, state: dict[str, Any] | None) -> None:
        """Raises StateError if the state is of another configuration, rank or number of ranks, or is damaged, or a
        stream is open already. What only the method can read, the first :meth:`open` checks."""
        mine, saved = asdict(self._config), {"method": "off"}
        if state is not None:
            if missing := [name for name in _SAVED if name not in check_mapping("inputs", state)]:
                raise damaged(f"inputs lacks {missing}")
            saved = dict(check_mapping("inputs.config", state["config"]))
        if saved.get("method") != mine["method"]:
            raise StateError(
                f"the saved run chose inputs by method={saved.get('method')!r}, this one by {mine['method']!r}; resume "
                "with the same InputsConfig"
            )
        if state is None:
            return
        if differing := _differing(saved, mine):
            raise StateError(
                f"the saved run chose inputs by another configuration: {differing} differ. Use the same InputsConfig "
                "to resume, or start without the session's state."
            )
        if state["rank"] != list(self._rank):
            raise StateError(
                "the saved inputs are those of rank {} of {}, and this is rank {} of {}; resume on as many ranks, each "
                "from its own state".format(*state["rank"], *self._rank)
            )
        self._check_contents(state)
        if self._stream is not None:
            raise StateError("a stream of inputs is open; load the state before inputs() is called")

    def _check_contents(self, state: dict[str, Any]) -> None:
        """Raises StateError if the state is damaged: loads it into things of no use, as far as that goes."""
        fresh, tally = Tally(), check_mapping("inputs.tally", state["tally"])
        if tally.keys() != fresh.state_dict().keys():
            raise damaged(f"inputs.tally has {sorted(tally)} instead of {sorted(fresh.state_dict())}")
        check_numbers("inputs.tally", {**tally, "labels": tally["labels"] or []})
        fresh.load_state_dict(dict(tally))
        if not isinstance(state["unconfirmed"], list):
            raise damaged(f"inputs.unconfirmed is {type(state['unconfirmed']).__name__} instead of a list")
        for packed in state["unconfirmed"]:
            size_of(unpack(packed))
        for name in ("selector", "scheduler") if state["selector"] is not None else ():
            check_mapping(f"inputs.{name}", state[name])
        if state["stream"] is None:
            return
        saved = check_mapping("inputs.stream", state["stream"])
        alone = Lockstep(None)
        alone.ranks = self._rank[1]
        stream = InputStream((), KeepAll(lanes=len(saved["lanes"])), OneLane(), alone, Tally(), HandedOut())
        numbers = {name: type(one) for name, one in stream.state_dict().items() if isinstance(one, int)}
        if wrong := [name for name, kind in numbers.items() if not isinstance(saved.get(name), kind)]:
            raise damaged(f"inputs.stream does not say {wrong}")
        check_numbers("inputs.stream['counts']", saved["counts"])
        stream.load_state_dict(dict(saved))

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from :meth:`state_dict`, which :meth:`check` found right, in the next stream."""
        self._saved = state
        if state is not None:
            self._tally.load_state_dict(state["tally"])


def _differing(saved: Mapping[str, Any], mine: Mapping[str, Any], within: str = "") -> list[str]:
    """Names of the knobs that are not the same, those of a part with its name before them."""
    found = []
    for name in sorted({*saved, *mine}):
        one, other = saved.get(name), mine.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += _differing(one, other, f"{within}{name}.")
        elif one != other or (name in saved) != (name in mine):
            found.append(within + name)
    return found
