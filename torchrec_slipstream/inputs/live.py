"""The session's end of the room: one selector through all epochs, one stream an epoch, and what a resumed run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch.distributed as dist

from torchrec_slipstream.config import InputsConfig
from torchrec_slipstream.errors import StateError
from torchrec_slipstream.inputs.blind import KeepAll
from torchrec_slipstream.inputs.choice import Scheduler, Selector
from torchrec_slipstream.inputs.dealing import Lockstep
from torchrec_slipstream.inputs.methods import told_by
from torchrec_slipstream.inputs.packing import pack, unpack
from torchrec_slipstream.inputs.queues import HandedOut
from torchrec_slipstream.inputs.stream import InputStream
from torchrec_slipstream.inputs.tally import Tally
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.report.inputs import InputReport
from torchrec_slipstream.tbe.features import ModelTable


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
        self._stream: InputStream | None = None
        self._handed_out = HandedOut()
        self._saved: dict[str, Any] | None = None

    def open(self, loader: Iterable[Any], **things: Any) -> Iterator[Any]:
        """The batches of an epoch; those of the epoch that a loaded state is of, from where it was.

        An epoch that was left before its end is over with this: its stream gives no more, its samples that wait are
        left over, and its batches that were handed out but not trained on count as used, and are not trained on by a
        resumed run. A pipeline that still holds such batches would train on them first: make a new one.

        Raises:
            InputError: the method needs other ``things``.
            StateError: the loaded state is of another method or number of ranks; nothing was changed.
        """
        if self._config.method == "off":
            return iter(loader)
        if self._method is None:
            method = self._make(loader, **things)
            if self._saved is not None and self._saved["selector"] is not None:
                method[0].load_state_dict(self._saved["selector"])
                method[1].load_state_dict(self._saved["scheduler"])
            self._ranks = Lockstep(self._group)
            self._method = method
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
            "method": self._config.method,
            "rank": list(self._rank),
            "selector": self._method[0].state_dict() if self._method is not None else None,
            "scheduler": self._method[1].state_dict() if self._method is not None else None,
            "tally": self._tally.state_dict(),
            "stream": self._stream.state_dict() if self._stream is not None and goes_on else None,
            "unconfirmed": [pack(batch) for batch in again],
        }

    def check(self, state: dict[str, Any] | None) -> None:
        """Raises StateError if the state is of another method, rank or number of ranks, or a stream is open already."""
        method = state["method"] if state is not None else "off"
        if method != self._config.method:
            raise StateError(
                f"the saved run chose inputs by method={method!r}, this one by {self._config.method!r}; resume with "
                "the same InputsConfig"
            )
        if state is not None and state["rank"] != list(self._rank):
            raise StateError(
                "the saved inputs are those of rank {} of {}, and this is rank {} of {}; resume on as many ranks, each "
                "from its own state".format(*state["rank"], *self._rank)
            )
        if state is not None and self._stream is not None:
            raise StateError("a stream of inputs is open; load the state before inputs() is called")

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from :meth:`state_dict`, which :meth:`check` found right, in the next stream."""
        self._saved = state
        if state is not None:
            self._tally.load_state_dict(state["tally"])
