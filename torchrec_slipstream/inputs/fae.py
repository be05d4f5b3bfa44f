"""FAE's input classifier (arXiv 2103.00686): an input is hot if all its look-ups are."""

from __future__ import annotations

from typing import Any

import torch

from torchrec_slipstream.errors import StateError
from torchrec_slipstream.inputs.batches import kjts_of, size_of
from torchrec_slipstream.inputs.choice import Choice
from torchrec_slipstream.inputs.rows import RowSets

COLD, HOT = 0, 1
"""The lanes."""


class FaeSelector:
    """Deals samples into cold and hot batches, and drops none.

    A hot batch looks up hot rows only: with the same rows in an overlay, the backing TBE gets no look-up of it. Where
    the hot rows change in the run (re-plans), set :attr:`hot` anew, on all ranks alike; batches that are waiting keep
    the lane they got.

    Args:
        hot: the hot rows of all tables (``inputs/hot.py``).
    """

    lanes = 2
    weighs = False

    def __init__(self, hot: RowSets) -> None:
        self.hot = hot

    def choose(self, batch: Any) -> Choice:
        """Keep all; lane 1 for hot samples (one without look-ups is hot), 0 for the others."""
        return Choice(
            keep=torch.ones(size_of(batch), dtype=torch.bool),
            lane=self.hot.samples(kjts_of(batch)).all_inside.to(torch.uint8),
        )

    def step(self, steps: int) -> None:
        """Nothing changes from step to step."""

    def state_dict(self) -> dict[str, Any]:
        """A checksum of the hot rows, which a resumed run finds by itself."""
        return {"selector": "fae", "hot": self.hot.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the hot rows are the same.

        Raises:
            StateError: they are not, or the state is of another selector.
        """
        if state.get("selector") != "fae":
            raise StateError(f"this is the state of another selector ({state.get('selector')!r}), not of FAE's")
        if state.get("hot") != self.hot.digest:
            raise StateError(
                "the saved state was made with other hot rows; resume with the profile or placement of that run"
            )
