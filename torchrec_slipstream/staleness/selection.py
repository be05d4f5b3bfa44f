"""From signals to a choice: which rows are stale, so that a target share of the look-ups is left out.

All functions work on one rank's rows and agree across ranks through ``total``, which sums a float64 tensor over the
ranks in place (the identity on one rank). Every rank calls them with the same arguments otherwise, and gets the same
scale or threshold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]

# Scores are binned by their binary logarithm, 32 bins an octave: a bin is 2% wide, and only rows whose duty saturates
# inside their own bin are counted inexactly.
_OCTAVE_BINS = 32
_LOWEST_OCTAVE = -80
_BINS = 140 * _OCTAVE_BINS


def proportional_scale(score: Tensor, rate: Tensor, target: Tensor, least: float, total: Total) -> float:
    """The ``c`` for which ``sum(rate * (1 - clamp(c * score, least, 1)))`` over all ranks is the target.

    Args:
        score: float32 ``[n]``, at least 0; NaN ones do not count.
        rate: float32 ``[n]``, at least 0.
        target: float64 scalar, over all ranks.
        least: lower bound of what is multiplied with the rate, in ``[0, 1]``.
        total: sums over ranks.

    Returns:
        The scale, to within the 2% of a bin where scores saturate. Where even ``least`` everywhere leaves too little
        for the target, a scale so small that it is ``least`` everywhere.
    """
    known = score.isfinite()
    clean = torch.where(known, score, 0.0)
    weight = torch.where(known, rate, 0.0).double()
    octave = clean.clamp(min=2.0**_LOWEST_OCTAVE).double().log2()
    bins = ((octave - _LOWEST_OCTAVE) * _OCTAVE_BINS).long().clamp(0, _BINS - 1)
    mass = total(torch.stack([_sums_by(bins, weight, _BINS), _sums_by(bins, weight * clean, _BINS)])).cpu()
    mass = mass[:, mass[0] > 0]
    weights, products = mass[0], mass[1]
    means = products / weights.clamp(min=1e-300)
    wanted = float(target)
    low, high = -float(_BINS / _OCTAVE_BINS), 100.0
    for _ in range(45):
        middle = (low + high) / 2
        kept = (means * 2.0**middle).clamp(least, 1.0)
        if float((weights * (1.0 - kept)).sum()) > wanted:
            low = middle
        else:
            high = middle
    return float(2.0**high)


def _sums_by(place: Tensor, weight: Tensor, places: int) -> Tensor:
    """float64 ``[places]``; also on a rank that has nothing, where bincount gives int64 whatever the weights are."""
    return torch.bincount(place, weights=weight, minlength=places).double()


def duty_cycles(score: Tensor, rate: Tensor, target: Tensor, min_duty: float, total: Total) -> Tensor:
    """Fraction of the steps in which each row is live, proportional to its score, one scale for all ranks.

    The look-ups left out, ``sum(rate * (1 - duty))`` over all ranks, reach the target.

    Args:
        score: float32 ``[n]``, at least 0; NaN rows stay live.
        rate: float32 ``[n]``, look-ups an interval.
        target: float64 scalar, look-ups an interval to leave out, over all ranks.
        min_duty: lower bound of a row's duty.
        total: sums over ranks.

    Returns:
        float32 ``[n]`` in ``[min_duty, 1]``.
    """
    scale = proportional_scale(score, rate, target, min_duty, total)
    duty = (score.double() * scale).clamp(min_duty, 1.0).float()
    return torch.where(score.isfinite(), duty, 1.0)


def quantile_threshold(score: Tensor, rate: Tensor, target: Tensor, total: Total) -> float:
    """Largest threshold below which the rows of all ranks have at most ``target`` look-ups an interval; exact.

    Radix selection on the bits of the scores (which order like the scores, as these are not negative): four rounds,
    each one sum of 256 counters over the ranks, whatever the number of rows.
    """
    known = score.isfinite()
    keys = score[known].contiguous().view(torch.int32).long()
    weight = rate[known].double()
    prefix, below = 0, 0.0
    for shift in (24, 16, 8, 0):
        inside = (keys >> (shift + 8)) == prefix
        digit = (keys[inside] >> shift) & 255
        mass = total(_sums_by(digit, weight[inside], 256)).cpu()
        upto = mass.cumsum(0) + below
        # The first digit whose rows would not fit any more; where all fit, the last.
        chosen = int((upto <= float(target)).sum().clamp(max=255))
        below += float(mass[:chosen].sum())
        prefix = (prefix << 8) | chosen
    return float(torch.tensor(min(prefix, 0x7F800000), dtype=torch.int32).view(torch.float32))


def bisect_threshold(
    score: Tensor, rate: Tensor, target: Tensor, window: Tensor, total: Total, iterations: int = 25
) -> float:
    """Slipstream's search (arXiv 2404.04270, step 4 of the artefact): halve ``[0, high]`` until within the window.

    Where the artefact starts from a fixed 0.1 this starts from the largest score, and where it fails silently this
    returns the best threshold met: the one whose look-ups come nearest to the target.

    Args:
        score, rate, target, total: as for :func:`duty_cycles`.
        window: float64 scalar, accepted distance from the target in look-ups an interval.
        iterations: most halvings.
    """
    known = score.isfinite()
    scores, weight = score[known].double(), rate[known].double()
    # The largest score of any rank, by sums alone: an exponent has a counter each.
    counts = torch.zeros(320, dtype=torch.float64, device=score.device)
    if scores.numel():
        octave = scores.clamp(min=2.0**-149).log2().ceil().long().clamp(-149, 128) + 150
        counts.scatter_add_(0, octave, torch.ones_like(scores))
    used = total(counts).nonzero()
    low, high = 0.0, 2.0 ** (int(used.max()) - 150) if used.numel() else 1.0
    best, nearest = 0.0, float("inf")
    for _ in range(iterations):
        middle = (low + high) / 2
        dropped = float(total((weight * (scores < middle)).sum().view(1)))
        distance = abs(dropped - float(target))
        if distance < nearest:
            best, nearest = middle, distance
        if distance <= float(window):
            break
        low, high = (middle, high) if dropped < float(target) else (low, middle)
    return best


def cap_duty(duty: Tensor, rate: Tensor, table: Tensor, table_rate: Tensor, max_share: float) -> Tensor:
    """Raise duties so that of no table more than ``max_share`` of the look-ups is left out.

    Args:
        duty, rate: float32 ``[n]``.
        table: int64 ``[n]``, the table of each row.
        table_rate: float64 ``[tables]``, look-ups of each table an interval.
        max_share: in ``(0, 1]``.
    """
    left_out = torch.zeros_like(table_rate).index_add_(0, table, rate.double() * (1.0 - duty.double()))
    factor = (max_share * table_rate / left_out.clamp(min=1e-30)).clamp(max=1.0)
    return 1.0 - (1.0 - duty) * factor.float().index_select(0, table)


# ---------------------------------------------------------------------------------- duty cycles as step patterns

PHASES = 8
"""Steps in a pattern: bit k of a row's byte says whether the row is live in steps k, k + 8, k + 16 ..."""
_GOLDEN = 0.6180339887498949


def _pattern_table() -> Tensor:
    """uint8 ``[9, 8]``: ``[live steps, rotation]`` to a byte with that many bits, evenly spread, rotated."""
    table = torch.zeros(PHASES + 1, PHASES, dtype=torch.uint8)
    for live in range(PHASES + 1):
        for rotation in range(PHASES):
            table[live, rotation] = sum(1 << ((k * PHASES // live + rotation) % PHASES) for k in range(live))
    return table


_PATTERNS = _pattern_table()


def step_patterns(duty: Tensor, rows: Tensor, decision: int) -> Tensor:
    """uint8 ``[n]``, one byte a row, whose set bits are on average ``duty`` of all.

    A duty between two eighths is met over time: the count is rounded up in as many decisions as its fraction says,
    evenly spread (golden-ratio steps from a start that is a hash of the row, so that rows do not move together).
    Deterministic in (rows, decision), hence a resumed run repeats it.
    """
    mixed = rows * -7046029254386353131  # 2^64 over the golden ratio; int64 wraps
    mixed = (mixed ^ (mixed >> 32)) * -4417276706812531889
    start = ((mixed >> 20) & 0xFFFFFF).double() / 2.0**24
    dither = (start + decision * _GOLDEN) % 1.0
    live = (duty.double() * PHASES + dither).floor().long().clamp(0, PHASES)
    rotation = ((mixed >> 48) + 5 * decision) & (PHASES - 1)
    return _PATTERNS.to(rows.device)[live, rotation]
