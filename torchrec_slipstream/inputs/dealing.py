"""Ranks in lockstep: each takes the same number of batches of the same kind, whatever it kept itself.

All ranks know how many samples each of them holds in each lane (one small gather a read round), so they come to the
same decisions without asking: which lane may go out, and who gives samples to whom first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from torchrec_slipstream.inputs.packing import from_bytes, to_bytes


@dataclass(frozen=True)
class Transfer:
    """``samples`` that rank ``source`` sends to rank ``target``."""

    source: int
    target: int
    samples: int


def evened(counts: Sequence[int]) -> list[Transfer]:
    """What to send so that ranks with ``counts`` samples differ by one at most. Ranks send or receive, never both."""
    share, odd = divmod(sum(counts), len(counts))
    richest = sorted(range(len(counts)), key=lambda rank: (-counts[rank], rank))
    spare = [0] * len(counts)
    for place, rank in enumerate(richest):
        spare[rank] = counts[rank] - share - (place < odd)
    transfers, source = [], 0
    for target in [rank for rank, more in enumerate(spare) if more < 0]:
        while spare[target] < 0:
            while spare[source] <= 0:
                source += 1
            samples = min(spare[source], -spare[target])
            spare[source] -= samples
            spare[target] += samples
            transfers.append(Transfer(source, target, samples))
    return transfers


def waiting(counts: Sequence[Sequence[int]], size: int, *, over: bool) -> list[int]:
    """Batches of each lane that can go out now.

    Until all loaders are read, the last full batch of a lane waits: :func:`batch_size` shares it with what comes after.
    So a rank that holds less than a batch waits for its own loader until two batches a rank have come together, and
    ranks that keep about as much as each other need next to no transfers.

    Args:
        counts: samples by rank and lane.
        size: samples of a full batch.
        over: no rank has anything left to read.
    """
    by_rank = [sum(lane) // len(counts) for lane in zip(*counts, strict=True)]
    return [-(-samples // size) if over else max(0, samples // size - 1) for samples in by_rank]


def batch_size(samples: int, size: int, *, over: bool) -> int:
    """Samples of a lane's next batch, of the ``samples`` that a rank has.

    At the end no batch is less than half a full one, if the lane has so many: a rest of a few samples would be a step
    like any other, with a mean loss of next to nothing but noise.
    """
    if over and size < samples and 2 * samples < 3 * size:
        return -(-samples // 2)
    return min(size, samples)


class Lockstep:
    """This process among the ranks that train together.

    Args:
        group: of them; a gloo group of one's own is made for what is sent (collective: every rank makes its Lockstep at
            the same time), since batches may be read while the group's own collectives are in flight. None: this
            process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.rank, self.ranks, self._group = 0, 1, None
        if group is not None and dist.get_world_size(group) > 1:
            self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
            members = dist.get_process_group_ranks(group)
            self._group = dist.new_group(members, backend="gloo", use_local_synchronization=True)

    def gather(self, mine: Sequence[int]) -> list[list[int]]:
        """Every rank's numbers, by rank."""
        if self._group is None:
            return [list(mine)]
        parts = torch.empty(self.ranks, len(mine), dtype=torch.int64)
        dist.all_gather(list(parts.unbind()), torch.tensor(mine, dtype=torch.int64), group=self._group)
        return parts.tolist()

    def exchange(
        self, transfers: Sequence[Transfer], give: Callable[[int], Any], receive: Callable[[Any], None]
    ) -> None:
        """Carry out the transfers, in their order: ``give(samples)`` for what leaves this rank, ``receive(batch)`` for
        what comes."""
        for one in transfers:
            if one.source == self.rank:
                content = to_bytes(give(one.samples))
                dist.send(torch.tensor([content.numel()]), group=self._group, group_dst=one.target)
                dist.send(content, group=self._group, group_dst=one.target)
            elif one.target == self.rank:
                length = torch.empty(1, dtype=torch.int64)
                dist.recv(length, group=self._group, group_src=one.source)
                content = torch.empty(int(length), dtype=torch.uint8)
                dist.recv(content, group=self._group, group_src=one.source)
                receive(from_bytes(content))
