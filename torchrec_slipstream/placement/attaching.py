"""Attaching on all ranks, or on none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DMPCollection

from torchrec_slipstream.config import PlacementConfig
from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.placement.hot_rows import HotRows
from torchrec_slipstream.placement.placement import Placement


def wants_hot_rows(config: PlacementConfig, placement: Placement | None) -> bool:
    """Whether there shall be overlays."""
    return placement is not None or config.hbm_budget is not None


def check_can_have_hot_rows(model: nn.Module, config: PlacementConfig, placement: Placement | None) -> None:
    """Raises AttachError if hot rows are wanted by what is no placement, or in a model of replicas."""
    if placement is not None and not isinstance(placement, Placement):
        raise AttachError(
            f"placement must be a Placement, such as SlipstreamPlanner.placement, not {type(placement).__name__}"
        )
    if isinstance(model, DMPCollection) and wants_hot_rows(config, placement):
        raise AttachError(
            "a DMPCollection averages its replicas' tables behind the hot rows' back; attach without a placement "
            "and without hbm_budget, or shard with DistributedModelParallel"
        )


def attach_hot_rows(
    make: Callable[[], HotRows], total: Callable[[Tensor], Tensor], device: torch.device, *, collective: bool
) -> HotRows:
    """The hot rows that ``make`` gives this rank, attached.

    Args:
        make: does all that this rank can refuse by itself, and changes nothing of the model.
        total: sums a float64 tensor over the ranks in place and returns it.
        device: where ``total`` wants its tensors.
        collective: whether the ranks hear of each other, as they must with a placement or a budget: where ``make``
            raises on one rank, all refuse, instead of waiting for it here or in the first step.

    Raises:
        AttachError: the placement or the budget does not fit the model, or ``make`` raised on another rank; and
            whatever it raises on this one. Nothing changed.
    """
    # Of this rank: whether it refuses, and its slots.
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
                f"{refused:.0f} other rank(s) cannot have the hot rows of this placement or hbm_budget, or cannot be "
                "attached to at all; their errors say why. No rank is attached"
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
