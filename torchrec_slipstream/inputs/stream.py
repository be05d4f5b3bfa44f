"""One epoch of batches made of the samples that a method keeps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.errors import InputError, StateError
from torchrec_slipstream.inputs.batches import device_of, is_pinned, select, size_of, with_weights
from torchrec_slipstream.inputs.choice import Choice, Scheduler, Selector
from torchrec_slipstream.inputs.dealing import Lockstep, batch_size, evened, waiting
from torchrec_slipstream.inputs.packing import pack, unpack
from torchrec_slipstream.inputs.queues import HandedOut, Lane
from torchrec_slipstream.inputs.reading import Reader
from torchrec_slipstream.inputs.schema import Schema
from torchrec_slipstream.inputs.tally import Tally

_READING, _OVER, _FAILED = range(3)
_END = object()


class InputStream(Iterator[Any]):
    """Reads a loader, lets a selector choose, and deals the kept samples into full batches, in lockstep over the ranks.

    Every rank gets the same number of batches, of the same lanes in the same order, whatever its loader's length and
    whatever it kept: those with too many samples send some to those with too few. A batch is as large as the loader's
    first, but for the last of each lane: a rest that is less than half of one shares evenly with the batch before, so
    that no step goes by a few samples. All are of one size on all ranks (TorchRec's row-wise sharding over gloo takes
    no other); the samples that this leaves, fewer than there are ranks, are left over. So each sample is handed out
    once, or dropped, or left over.

    Args:
        loader: of this rank; its batches as ``batches.py`` says, their first of the same size on all ranks.
        selector, scheduler: what is kept, and in which order it goes out.
        ranks: in lockstep with which.
        tally: counts what passes.
        handed_out: keeps the batches until they were trained on.

    Attributes:
        selector: as given; may be replaced by one with the same lanes.
        again: batches that an interrupted run had handed out but not trained on; they go out first.
        ended: the epoch is over.

    Raises (from ``next``):
        InputError: a batch cannot be cut by samples or joined with the first, or ranks differ in batch size or fields,
            or another rank's loader raised. An exception of this rank's loader or selector comes as it is. Either way
            no rank is left waiting, and the stream is of no more use. Only what a scheduler's test loss raises is told
            to no other rank: let it raise on all ranks or none.
        InputError: too many batches wait for the session's ``step()``. None is lost: after a step the stream goes on.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        selector: Selector,
        scheduler: Scheduler,
        ranks: Lockstep,
        tally: Tally,
        handed_out: HandedOut,
    ) -> None:
        self._reader, self.selector, self._scheduler = Reader(loader), selector, scheduler
        self._ranks, self._tally, self._handed_out = ranks, tally, handed_out
        self._lanes = [Lane() for _ in range(selector.lanes)]
        self._counts = [[0] * selector.lanes for _ in range(ranks.ranks)]
        self._first_size = self._size = 0
        self._schema = Schema()
        self._until_deal = scheduler.window
        self._exhausted = self._all_exhausted = False
        self._stopped = ""  # why nothing more may be asked
        self._pins: bool | None = None  # nobody knows before the first batch
        self.again: deque[Any] = deque()
        self.ended = False

    @property
    def buffered(self) -> int:
        """Samples of this rank that wait for a batch."""
        return sum(lane.samples for lane in self._lanes)

    def __next__(self) -> Any:
        if self._stopped:
            raise InputError(f"this stream {self._stopped}; take a new one from the session's inputs()")
        if self.ended and not self.again:
            raise StopIteration
        self._handed_out.check_room()
        if self.again:
            self._handed_out.add(self.again[0])
            return self.again.popleft()
        try:
            lane = self._next_lane()
            if lane is None:
                self._end()
                raise StopIteration
            batch = self._deal(lane)
        except StopIteration:
            raise
        except BaseException:
            self._stopped = "broke off with an error"
            raise
        self._tally.hand_out(lane, size_of(batch))
        self._handed_out.add(batch)
        return batch.pin_memory() if self._pins and not is_pinned(batch) else batch

    def leave(self) -> None:
        """No more is asked for, as there is a newer stream. Unless all was handed out, the epoch breaks off here:
        samples that wait are left over, and batches that no step has confirmed are forgotten, and stay counted as
        used."""
        if not self.ended or self.again:
            self._stopped = self._stopped or "was left for a newer one"
            self._handed_out.clear()
            self.again.clear()
            self._clear()

    def _end(self) -> None:
        self.ended = True
        self._tally.epochs += 1
        self._clear()

    def _clear(self) -> None:
        self._tally.left_over += self.buffered
        self._lanes = [Lane() for _ in self._lanes]

    # --------------------------------------------------------------------------------------------------- dealing

    def _next_lane(self) -> int | None:
        """The lane of the next batch, read for as long as it takes; None at the end. The same on every rank."""
        while True:
            if self._until_deal == 0 or self._all_exhausted:
                ready = waiting(self._counts, self._size, over=self._all_exhausted) if self._size else []
                if any(ready):
                    lane = self._scheduler.next(ready)
                    if not 0 <= lane < len(ready) or not ready[lane]:
                        raise InputError(f"the scheduler chose lane {lane}, but full batches by lane are {ready}")
                    return lane
                if self._all_exhausted:
                    return None
                self._until_deal = self._scheduler.window
            self._read_round()
            self._until_deal -= 1

    def _deal(self, number: int) -> Any:
        lane, counts = self._lanes[number], [of_rank[number] for of_rank in self._counts]
        size = batch_size(sum(counts) // len(counts), self._size, over=self._all_exhausted)
        if min(counts) < size:
            transfers = evened(counts)
            self._ranks.exchange(transfers, lane.take_last, lane.add)
            for one in transfers:
                counts[one.source] -= one.samples
                counts[one.target] += one.samples
        for of_rank, count in zip(self._counts, counts, strict=True):
            of_rank[number] = count - size
        return lane.take(size)

    # --------------------------------------------------------------------------------------------------- reading

    def _read_round(self) -> None:
        """Every rank reads an input batch, if it has one more, and says what it holds now."""
        error: Exception | None = None
        if not self._exhausted:
            try:
                self._exhausted = not self._read_one()
            except Exception as raised:  # to be raised once the other ranks know
                error = raised
        status = _FAILED if error is not None else _OVER if self._exhausted else _READING
        told = self._ranks.gather(
            [status, self._first_size, self._schema.digest, *(lane.samples for lane in self._lanes)]
        )
        if error is not None:
            raise error
        failed = [rank for rank, (of_rank, *_) in enumerate(told) if of_rank == _FAILED]
        if failed:
            raise InputError(
                f"rank {failed[0]} could not read its next input batch; see what it raised. This rank stops with it, "
                "as ranks train on the same number of batches"
            )
        self._schema.check_ranks([digest for _, _, digest, *_ in told])
        self._counts = [counts for _, _, _, *counts in told]
        self._all_exhausted = all(of_rank == _OVER for of_rank, *_ in told)
        self._size = self._size or _common({rank: size for rank, (_, size, *_) in enumerate(told) if size})

    def _read_one(self) -> bool:
        """Read, choose and buffer one input batch; False where there is none."""
        batch = next(self._reader, _END)
        if batch is _END:
            return False
        if not (size := size_of(batch)):
            return True
        self._first_size = self._first_size or size
        self._schema.check(batch)
        if self._pins is None:
            self._pins = is_pinned(batch)
            if self._ranks.ranks > 1:  # may have to be sent: find out here, where all ranks hear of it
                pack(select(batch, torch.empty(0, dtype=torch.int64)))
        choice = self.selector.choose(batch)
        self._check(choice, size)
        self._buffer(batch, choice)
        return True

    def _check(self, choice: Choice, size: int) -> None:
        weighs = self.selector.weighs
        parts = [("keep", choice.keep, torch.bool), ("lane", choice.lane, torch.uint8)]
        for name, tensor, dtype in [*parts, ("weight", choice.weight if weighs else None, torch.float32)]:
            if tensor is not None and (tensor.shape != (size,) or tensor.dtype != dtype):
                raise InputError(
                    f"{type(self.selector).__name__} chose with {name} {tensor.dtype} {tuple(tensor.shape)}; give "
                    f"{dtype} ({size},)"
                )
        if choice.lane is not None and int(choice.lane.max()) >= len(self._lanes):
            raise InputError(f"lane {int(choice.lane.max())} is not below the selector's {len(self._lanes)} lanes")

    def _buffer(self, batch: Any, choice: Choice) -> None:
        weight, kept = None, []
        if self.selector.weighs:
            weight = choice.weight if choice.weight is not None else torch.ones(choice.keep.shape)
        for number, lane in enumerate(self._lanes):
            part = _chosen(batch, self._members(choice, number), weight)
            if part is not None:
                lane.add(part)
                kept.append(part)
        self._tally.count(batch, choice.keep, weight, kept)

    def _members(self, choice: Choice, lane: int) -> Tensor:
        if choice.lane is None:
            return choice.keep if lane == 0 else torch.zeros_like(choice.keep)
        return choice.keep & (choice.lane == lane)

    # ----------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is: the loader's state, the buffered samples, and what the ranks know of each other. Not the
        selector's and scheduler's.

        Raises:
            StateError: the batches' class is defined inside a function.
        """
        wholes = [lane.all() for lane in self._lanes]
        return {
            "reader": self._reader.state_dict(),
            "first_size": self._first_size,
            "size": self._size,
            "schema": dict(self._schema.of_first),
            "until_deal": self._until_deal,
            "exhausted": self._exhausted,
            "all_exhausted": self._all_exhausted,
            "ended": self.ended,
            "counts": [list(of_rank) for of_rank in self._counts],
            "lanes": [pack(whole) if whole is not None else None for whole in wholes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, in a stream that nothing was read from.

        Raises:
            StateError: it is of other lanes or another number of ranks. Nothing was changed.
        """
        shape = (len(state["counts"]), len(state["lanes"]))
        if shape != (self._ranks.ranks, len(self._lanes)):
            raise StateError(
                f"the saved stream was of {shape[0]} ranks and {shape[1]} lanes, and this one is of "
                f"{self._ranks.ranks} and {len(self._lanes)}; resume on as many ranks with the same InputsConfig"
            )
        lanes = [unpack(packed) if packed is not None else None for packed in state["lanes"]]
        self._reader.load_state_dict(state["reader"])
        self._first_size, self._size = state["first_size"], state["size"]
        self._schema.of_first = dict(state["schema"])
        self._until_deal = state["until_deal"]
        self._exhausted, self._all_exhausted, self.ended = state["exhausted"], state["all_exhausted"], state["ended"]
        self._counts = [list(of_rank) for of_rank in state["counts"]]
        for lane, samples in zip(self._lanes, lanes, strict=True):
            if samples is not None:
                lane.add(samples)


def _common(sizes: dict[int, int]) -> int:
    """The size of the first batches, by the ranks that have read one; 0 where none has."""
    if len(set(sizes.values())) > 1:
        raise InputError(f"the loaders' first batches have {sizes} samples by rank; give all ranks the same batch size")
    return next(iter(sizes.values()), 0)


def _chosen(batch: Any, members: Tensor, weight: Tensor | None) -> Any | None:
    """The samples where ``members`` (bool [B]) is set; the batch itself where it is everywhere; None where nowhere."""
    samples = members.nonzero().view(-1)
    if samples.numel() == 0:
        return None
    part = batch if samples.numel() == members.numel() else select(batch, samples)
    return with_weights(part, weight[samples].to(device_of(batch))) if weight is not None else part
