"""How far an overlay's TBE is from the stock one after a few steps of small batches, where all else is measured."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.tbe_providers import Attached, build, states_of
from benchmarks.tbe_traffic import Profile, Shape, Traffic


def difference(backing: str, optimizer: str, device: str, *, dim: int, bag: int, steps: int = 4) -> float:
    """Largest difference between ours over a backing and the stock TBE, over the largest value, of outputs, weights and
    optimizer state, after ``steps`` of small batches with ``bag`` look-ups a bag. 0: bit for bit.

    Batches are small enough for FBGEMM's CUDA backward not to split a row's run over blocks, whose sums meet in no
    fixed order (runs of more than 1024 look-ups).
    """
    shape = Shape(3, 2000, dim, 3 * 480, seed=7)
    traffic = Traffic(shape, device)
    profile = Profile(traffic, range(2))
    stock, mine = (build(kind, shape, optimizer, device) for kind in ("torchrec_fused", backing))
    attached = Attached(mine, profile, 300)
    offsets = traffic.offsets[::bag]
    worst = 0.0
    for number in range(2, 2 + steps):
        indices = traffic.batch(number)
        one, other = stock(indices, offsets), mine(indices, offsets)
        gradient = torch.randn(one.shape, generator=torch.Generator().manual_seed(number)).to(device)
        one.backward(gradient)
        other.backward(gradient)
        worst = max(worst, _apart(other.detach(), one.detach()))
    hit = int(attached.overlay.hits.sum())
    attached.detach()
    mine.flush()
    for ours, theirs in zip(states_of(mine), states_of(stock), strict=True):
        worst = max(worst, _apart(ours, theirs))
    if not 0 < hit < steps * shape.lookups:
        raise RuntimeError(f"{hit} of {steps * shape.lookups} look-ups were hot: this compares nothing")
    return worst


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
