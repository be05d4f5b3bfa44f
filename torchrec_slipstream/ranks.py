"""The ranks that share a model, and what they tell each other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group, with the device that it wants its tensors on; None: this process alone.

    All methods but the numbers are collective calls.
    """

    group: dist.ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """Those of a group, with the device of its backend."""
        if group is not None and "nccl" in dist.get_backend(group):
            return cls(group, torch.device("cuda", torch.cuda.current_device()))
        return cls(group)

    @property
    def number(self) -> int:
        """How many there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def mine(self) -> int:
        """This process's."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks, where ``values`` are; in place if that is the group's device."""
        if self.number == 1:
            return values
        moving = values.to(self.device)
        dist.all_reduce(moving, group=self.group)
        return moving.to(values.device)

    def least(self, values: Sequence[int]) -> list[int]:
        """The least over the ranks, of each."""
        if self.number == 1:
            return list(values)
        moving = torch.tensor(values, device=self.device)
        dist.all_reduce(moving, op=dist.ReduceOp.MIN, group=self.group)
        return moving.tolist()

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's, by rank. For small things: it is pickled."""
        if self.number == 1:
            return [mine]
        gathered: list[Any] = [None] * self.number
        dist.all_gather_object(gathered, mine, group=self.group)
        return gathered

    def rest(self) -> None:
        """For after the last of several collectives, which may be the last of the program.

        HACK: gloo's thread still holds the tensors of the last one, and needs Python's lock to let them go. A program
        that ends before it has had that, as after printing a report, is aborted by C++ (torch 2.11 to 2.13).
        """
        if self.number > 1:
            time.sleep(0.005)  # which hands the lock over

    def each(self, mine: npt.NDArray[np.uint8], sizes: Sequence[int]) -> Iterator[npt.NDArray[np.uint8]]:
        """Every rank's bytes in turn; ``sizes``: how many each has."""
        for rank, size in enumerate(sizes):
            if size == 0:
                yield np.empty(0, dtype=np.uint8)
                continue
            chunk = torch.from_numpy(mine) if rank == self.mine else torch.empty(size, dtype=torch.uint8)
            yield self.move(chunk, rank, None).numpy()

    def move(self, chunk: Tensor, owner: int, dst: int | None) -> Tensor:
        """The owner's chunk on rank ``dst``, or (None) on all; anything on the others. On the CPU."""
        group = self.group
        if group is None or self.number == 1 or owner == dst:
            return chunk
        moving = chunk.to(self.device)
        source = dist.get_global_rank(group, owner)
        if dst is None:
            dist.broadcast(moving, source, group=group)
        elif self.mine == owner:
            dist.send(moving, dist.get_global_rank(group, dst), group=group)
        elif self.mine == dst:
            dist.recv(moving, source, group=group)
        return moving.cpu()
