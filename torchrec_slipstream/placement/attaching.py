"""Giving a model its hot rows on all ranks, or on none."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchrec_slipstream.config import PlacementConfig
from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.placement.hot_rows import HotRows
from torchrec_slipstream.placement.placement import Placement
from torchrec_slipstream.tbe import UpdateFilter


def attach_hot_rows(
    filters: Sequence[UpdateFilter],
    config: PlacementConfig,
    placement: Placement | None,
    *,
    rank: int,
    counted: Callable[[int, int], int],
    total: Callable[[Tensor], Tensor],
    group_device: torch.device,
) -> HotRows:
    """The hot rows of one rank, attached; the arguments are those of :class:`HotRows`.

    With a placement or a budget this is a collective call: where one rank cannot have its hot rows, all refuse, instead
    of waiting for it in the first step.

    Raises:
        AttachError: the placement or the budget does not fit the model, on this rank or on another. Nothing changed.
    """
    alone = placement is None and config.hbm_budget is None
    # Of this rank: whether it cannot have its hot rows, and its slots.
    mine = torch.tensor([1.0, 0.0], dtype=torch.float64)
    try:
        hot = HotRows(filters, config, placement, rank=rank, counted=counted, total=total, group_device=group_device)
        hot.attach()
        mine = torch.tensor([0.0, float(hot.slots)], dtype=torch.float64)
    finally:
        refused, slots = (0.0, 0.0) if alone else total(mine.to(group_device)).tolist()
    try:
        if refused:
            raise AttachError(
                f"{refused:.0f} other rank(s) cannot have the hot rows of this placement or hbm_budget; their errors "
                "say why. No rank is attached"
            )
        if config.hbm_budget is not None and not slots:
            raise AttachError(
                f"hbm_budget={config.hbm_budget}: no table can have hot rows: they are in HBM whole, or counted by "
                "sketches, which do not tell which rows are hot. Leave hbm_budget out, or count rows one by one"
            )
    except AttachError:
        hot.withdraw()
        raise
    return hot
