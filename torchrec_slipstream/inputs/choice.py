"""What says which samples are trained on, and in which order: the protocols that all methods of this room meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from torchrec_slipstream.errors import StateError


@dataclass(frozen=True)
class Choice:
    """What becomes of the B samples of one input batch.

    Attributes:
        keep: bool [B], the samples to train on; the others are dropped for this epoch.
        weight: float32 [B], what a kept sample's loss counts for (those of dropped ones are not read); None: 1.
        lane: uint8 [B], which kind of batch a kept sample goes into, below the selector's ``lanes``; None: 0.
    """

    keep: Tensor
    weight: Tensor | None = None
    lane: Tensor | None = None


class Selector(Protocol):
    """Chooses among the samples of input batches.

    Attributes:
        lanes: kinds of batches; samples of different lanes never share a batch.
        weighs: whether choices have weights, so that batches come as ``WeightedBatch``.
    """

    lanes: int
    weighs: bool

    def choose(self, batch: Any) -> Choice:
        """Choose among the samples of one input batch of this rank, on the CPU. Local to the rank: no collective, and
        ranks call it at different times. Called once for every input batch, in the loader's order."""
        ...

    def step(self, steps: int) -> None:
        """``steps`` training steps are over. All ranks call it after each of them, so it may be collective."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, all that the choices to come depend on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            StateError: the state is of another selector. Nothing was changed.
        """
        ...


class Scheduler(Protocol):
    """Says in which order the lanes' full batches go out.

    Attributes:
        window: input batches that a rank reads before the first batch of a window goes out, at least 1: from them the
            scheduler has some to choose from. 1: batches go out as they fill.
    """

    window: int

    def begin(self) -> None:
        """A new epoch begins, which is not one resumed in its middle: nothing waits of the last, which may have been
        broken off anywhere."""
        ...

    def next(self, waiting: Sequence[int]) -> int:
        """The lane of the next batch.

        Args:
            waiting: full batches of each lane over all ranks, the same on every rank; at least one is positive. At the
                epoch's end the short batches count as well.

        Returns:
            A lane that has one waiting, the same on every rank.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values, all that the order to come depends on."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            StateError: the state is of another scheduler. Nothing was changed.
        """
        ...


class OneLane:
    """The default scheduler: batches go out as they fill, the first lane's first."""

    window = 1

    def begin(self) -> None:
        """Nothing is carried over."""

    def next(self, waiting: Sequence[int]) -> int:
        """The first lane with a batch waiting."""
        return next(lane for lane, count in enumerate(waiting) if count > 0)

    def state_dict(self) -> dict[str, Any]:
        """Nothing but the scheduler's name."""
        return {"scheduler": "one lane"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the state is of this scheduler."""
        if state != self.state_dict():
            raise StateError(f"this is the state of another scheduler ({state!r}); resume with the same inputs method")
