"""Hotline (arXiv 2204.05436): train the popular samples of a batch while the rows of the others are being gathered.

A sample is *popular* if all rows that it looks up are hot. A batch is divided into a popular micro-batch and one of the
rest; on a GPU the forward of the second, which waits for cold rows, runs beside the forward and backward of the first.
Both see the same parameters, and their gradients make one step: dense gradients add up, and the fused updates of the
tables are deferred until both are there (``tbe/deferred.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchrec_slipstream.errors import InputError
from torchrec_slipstream.inputs.batches import kjts_of, select, size_of
from torchrec_slipstream.inputs.rows import RowSets
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe.deferred import DeferredUpdates, check_can_defer
from torchrec_slipstream.tbe.dense import DenseGradients
from torchrec_slipstream.tbe.update_filter import UpdateFilter


@dataclass(frozen=True)
class Division:
    """A batch divided in two.

    Attributes:
        samples: int64 ``[n]`` each, ascending: this rank's samples of the first and second micro-batch.
        positions: the same of all ranks, where rank ``r``'s sample ``i`` of ``B`` is ``r * B + i``, on the tables'
            device.
    """

    samples: tuple[Tensor, Tensor]
    positions: tuple[Tensor, Tensor]


class Hotline:
    """Trains each batch as a popular and a non-popular micro-batch that make one step; sessions make it.

    The step is that of the whole batch but for rounding: the dense part's products are added up in another order. The
    tables' update equals stock's bit for bit where the gradients at their outputs do. Different are models of which a
    sample's loss depends on others or on chance: batch-norm takes its statistics a micro-batch (and moves its running
    ones twice a step), dropout draws other masks. Do not use it with train pipelines, which run forward and backward
    themselves, nor inside ``no_sync``.

    With several ranks each takes as many popular samples into the first micro-batch as the rank that has least, so that
    all run the same collectives with the same shapes. Where one has none, or all have nothing else, and in the very
    first step under DDP's ``static_graph`` (TorchRec's default), batches are trained whole.

    Args:
        model: the outermost module, as the optimizer and ``DistributedDataParallel`` see it.
        filters: of all its TBEs.
        popular: the hot rows, for which the batch's look-ups are told apart where it lies; or what says of a batch
            which of its samples are popular, bool ``[B]``, such as ``lambda batch: batch.popular`` where the loader
            has found it out: on a GPU the host need not wait for that.
        ranks: who shares the model.

    Raises:
        AttachError: a table's update cannot be deferred, or dense parameters are updated within the backward.

    Attributes:
        steps, divided_steps: batches trained, and those of them in two micro-batches.
        samples, first_samples: samples trained by this rank, and those of them in first micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        filters: Sequence[UpdateFilter],
        popular: RowSets | Callable[[Any], Tensor],
        ranks: Ranks | None = None,
    ) -> None:
        check_can_defer(model, filters)
        self._filters = filters
        self._popular = _popular_by(popular) if isinstance(popular, RowSets) else popular
        self._ranks = ranks if ranks is not None else Ranks()
        self._dense = DenseGradients(model)
        self._device = filters[0].device if filters else torch.device("cpu")
        self._beside = _Beside(self._device, caches=any(one.caches_rows for one in filters))
        self.steps = self.divided_steps = self.samples = self.first_samples = 0

    def backward(self, batch: Any, forward: Callable[[Any], Tensor]) -> Tensor:
        """Forward and backward of one batch; the optimizer's ``step()`` is yours, as after ``loss.backward()``.

        Args:
            batch: TorchRec's ``Batch``, or a dataclass of tensors and KJTs; of one size on all ranks.
            forward: gives the mean loss over the samples of the batch that it is given (a scalar); called once or
                twice. ``lambda batch: model(batch)[0]`` for TorchRec's ``DLRMTrain``.

        Returns:
            The mean loss of the batch, detached.

        Raises:
            InputError: the batch cannot be divided, or ranks have batches of different sizes, or the loss is no scalar,
                or a table was looked up in more often in one micro-batch than in the other. No gradient was computed
                and nothing was updated.
            AttachError: the session was detached. Nothing was updated.
        """
        size = size_of(batch)
        division = self._agree(self._popular(batch), size)
        if division is None or self._dense.need_whole_batch:
            loss = _checked_loss(forward(batch))
            loss.backward()
            loss = loss.detach()
        else:
            # On a GPU the host waits here, to know how many look-ups each part has; from here on it does not.
            parts = [select(batch, samples) for samples in division.samples]
            try:
                loss = self._train_divided(parts, forward, division)
            finally:
                self._beside.wait()  # after an error as well, or the parts' memory would be another's while it is read
            self.divided_steps += 1
            self.first_samples += division.samples[0].numel()
        self.steps += 1
        self.samples += size
        return loss

    def _train_divided(self, parts: list[Any], forward: Callable[[Any], Tensor], division: Division) -> Tensor:
        shares = [samples.numel() / sum(map(len, division.samples)) for samples in division.samples]
        with DeferredUpdates(self._filters) as updates:
            with self._dense.only_added_up():
                start = self._beside.mark()
                updates.next_micro_batch()
                first = _checked_loss(forward(parts[0])) * shares[0]
                updates.next_micro_batch()
                with self._beside.after(start):
                    second = _checked_loss(forward(parts[1])) * shares[1]
                updates.check_calls()
                first.backward()
            self._dense.reduce_with(second)
            self._beside.wait()
            second.backward()
            self._beside.wait()  # the backward's tail: gradients that it left with the tables
            updates.apply(division.positions)
        return first.detach() + second.detach()

    def _agree(self, popular: Tensor, size: int) -> Division | None:
        """How the ranks divide their batches, alike; None: not at all."""
        if popular.shape != (size,) or popular.dtype != torch.bool:
            raise InputError(
                f"popular gave {popular.dtype} {list(popular.shape)} for a batch of {size} samples; give bool [{size}]"
            )
        popular = popular.cpu()
        mine = popular.nonzero().squeeze(1)
        count, smallest, largest = self._ranks.least([mine.numel(), size, -size])
        if smallest != -largest:
            raise InputError(
                f"ranks have batches of {smallest} to {-largest} samples; give all of them the same (drop_last=True)"
            )
        if count in (0, size):
            return None
        in_first = torch.zeros(size, dtype=torch.bool)
        in_first[mine[:count]] = True
        of_all = _gathered(self._ranks, in_first)
        # Now, when the device has little to do that a copy would wait for.
        return Division(_divided(in_first), _divided(of_all.to(self._device)))


class _Beside:
    """A stream beside the current one for the second micro-batch's forward; none on a CPU, and none where FBGEMM caches
    rows: two forwards at once would evict each other's.

    Tensors need no ``record_stream``: what one stream allocated and the other reads is held until that one has been
    waited for, in both directions, once a step.
    """

    def __init__(self, device: torch.device, *, caches: bool) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and not caches else None

    def mark(self) -> torch.cuda.Event | None:
        """Now, on the current stream."""
        return torch.cuda.current_stream().record_event() if self._stream is not None else None

    def after(self, start: torch.cuda.Event | None) -> Any:
        """What is launched inside runs beside the current stream, from ``start`` on."""
        if self._stream is None or start is None:
            return nullcontext()
        self._stream.wait_event(start)
        return torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Let the current stream wait for what was launched beside it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def _popular_by(rows: RowSets) -> Callable[[Any], Tensor]:
    return lambda batch: rows.samples(kjts_of(batch)).all_inside


def _checked_loss(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"forward(batch) gave {what}; let it return the mean loss over its samples, a scalar")
    return loss


def _divided(in_first: Tensor) -> tuple[Tensor, Tensor]:
    return in_first.nonzero().squeeze(1), (~in_first).nonzero().squeeze(1)


def _gathered(ranks: Ranks, mask: Tensor) -> Tensor:
    """bool ``[ranks * B]``, every rank's mask in turn."""
    if ranks.number == 1:
        return mask
    parts = [torch.empty(mask.numel(), dtype=torch.uint8, device=ranks.device) for _ in range(ranks.number)]
    dist.all_gather(parts, mask.to(torch.uint8).to(ranks.device), group=ranks.group)
    return torch.cat(parts).bool().cpu()
