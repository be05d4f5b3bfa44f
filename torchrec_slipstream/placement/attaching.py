"""Giving a model its hot rows on all ranks, or on none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.placement.hot_rows import HotRows


def attach_hot_rows(
    make: Callable[[], HotRows], total: Callable[[Tensor], Tensor], device: torch.device, *, collective: bool
) -> HotRows:
    """The hot rows that ``make`` gives this rank, attached.

    Args:
        total: sums a float64 tensor over the ranks in place and returns it.
        device: where ``total`` wants its tensors.
        collective: whether the ranks hear of each other, as they must with a placement or a budget: where one rank
            cannot have its hot rows, all refuse, instead of waiting for it in the first step.

    Raises:
        AttachError: the placement or the budget does not fit the model, on this rank or on another. Nothing changed.
    """
    # Of this rank: whether it cannot have its hot rows, and its slots.
    mine = torch.tensor([1.0, 0.0], dtype=torch.float64)
    try:
        hot = make()
        hot.attach()
        mine = torch.tensor([0.0, float(hot.slots)], dtype=torch.float64)
    finally:
        refused, slots = total(mine.to(device)).tolist() if collective else (0.0, 0.0)
    try:
        if refused:
            raise AttachError(
                f"{refused:.0f} other rank(s) cannot have the hot rows of this placement or hbm_budget; their errors "
                "say why. No rank is attached"
            )
        if hot.config.hbm_budget is not None and not slots:
            raise AttachError(
                f"hbm_budget={hot.config.hbm_budget}: no table can have hot rows: they are in HBM whole, or counted by "
                "sketches, which do not tell which rows are hot. Leave hbm_budget out, or count rows one by one"
            )
    except AttachError:
        hot.withdraw()
        raise
    return hot
