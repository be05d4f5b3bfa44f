"""When to decide, and what: from the tracked TBEs to how look-ups are sampled, or how long each row is live."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from torchrec_slipstream.config import StalenessConfig
from torchrec_slipstream.staleness import selection
from torchrec_slipstream.staleness.tracked_tbe import TrackedTbe
from torchrec_slipstream.staleness.trial import TRIAL_STEPS, begins_with
from torchrec_slipstream.tbe import Sampling


def gap(config: StalenessConfig, interval: int) -> int:
    """Intervals between two regular decisions, as of this one, counted from 1 where skipping began.

    Under sampling a decision only takes in the rows that have become trained meanwhile, and these are safe without:
    they are live. So from the 16th on, decisions become rarer as the run becomes longer: 8 an octave.
    """
    return 1 << max(0, interval.bit_length() - 4) if config.selection == "sampling" else 1


def decides(config: StalenessConfig, interval: int) -> bool:
    """Whether the end of this interval brings a decision, counted as :func:`gap` does.

    The first after a trial does: what was chosen together with those that lost is not for those that are left.
    """
    tried = interval - -(-TRIAL_STEPS // config.interval)
    after_trial = config.where == "faster" and tried > 0 and begins_with(tried)
    return after_trial or interval % gap(config, interval) == 0


def until_next(config: StalenessConfig, interval: int) -> int:
    """Intervals from this decision to the next."""
    return next(ahead for ahead in itertools.count(1) if decides(config, interval + ahead))


def choose_sampling(
    config: StalenessConfig, tbes: Sequence[TrackedTbe], wanted: Tensor, total: selection.Total
) -> tuple[Sampling, float, float]:
    """How to sample so that the wanted number of look-ups is left out.

    The gradients of the steps before stand for those to come, and stale look-ups for all of a sample's.

    Args:
        config: the knobs.
        tbes: of this rank.
        wanted: float64 scalar, look-ups an interval, over all ranks.
        total: sums over the ranks.

    Returns:
        The sampling, the share of the sampled rows' look-ups that it leaves out, and the look-ups an interval up to
        which a row is sampled.
    """
    none = torch.empty(0, device=_device(tbes))
    magnitudes = torch.cat([none, *(m for tbe in tbes for m in tbe.filter.magnitudes)])
    rate = torch.cat([none, *(tbe.pool.rate for tbe in tbes)])
    popular = float("inf")
    if config.tail_share > 0.0:
        popular = selection.quantile_threshold(rate, rate, wanted / config.tail_share, total)
    sums = torch.zeros(2, dtype=torch.float64, device=none.device)
    sums[0] = torch.where(rate < popular, rate, 0.0).sum(dtype=torch.float64)
    sums[1] = magnitudes.isfinite().sum()
    sampled_rate, watched = (float(value) for value in total(sums))
    share = min(float(wanted) / max(sampled_rate, 1.0), config.max_table_share, 1.0 - config.min_probability)
    if watched == 0.0:
        return Sampling(1.0, 1.0), 0.0, popular  # no backward has shown its gradients: keep everything
    target = torch.tensor(share * watched, dtype=torch.float64)
    scale = selection.proportional_scale(magnitudes, torch.ones_like(magnitudes), target, config.min_probability, total)
    return Sampling(scale, config.min_probability), share, popular


def choose_duties(
    config: StalenessConfig,
    tbes: Sequence[TrackedTbe],
    wanted: Tensor,
    table_rate: float,
    intervals: int,
    total: selection.Total,
) -> list[Tensor]:
    """Duty of every pool row of every TBE, before the cap a table.

    Args:
        config, tbes, wanted, total: as :func:`choose_sampling`.
        table_rate: look-ups an interval, over all ranks.
        intervals: so far, which says whose turn it is to thaw.
    """
    none = torch.empty(0, device=_device(tbes))
    score = torch.cat([none, *(tbe.comparable_score() for tbe in tbes)])
    rate = torch.cat([none, *(tbe.pool.rate for tbe in tbes)])
    sizes = [tbe.pool.rows.numel() for tbe in tbes]
    if config.selection == "duty":
        duty = selection.duty_cycles(score, rate, wanted, config.min_duty, total)
        return list(duty.split(sizes))
    turn = torch.cat([none.bool(), *(tbe.thaw_turn(intervals) for tbe in tbes)])
    score = torch.where(turn, torch.nan, score)
    if config.search == "quantile":
        threshold = selection.quantile_threshold(score, rate, wanted, total)
    else:
        window = torch.tensor(config.search_window * table_rate, dtype=torch.float64)
        threshold = selection.bisect_threshold(score, rate, wanted, window, total)
    return list(torch.where(score < threshold, 0.0, 1.0).split(sizes))


def _device(tbes: Sequence[TrackedTbe]) -> torch.device:
    return tbes[0].filter.device if tbes else torch.device("cpu")
