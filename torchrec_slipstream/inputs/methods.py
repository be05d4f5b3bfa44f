"""The methods by name: which selector and scheduler a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import nn

from torchrec_slipstream.access import AccessProfile, Calibration
from torchrec_slipstream.config import InputsConfig
from torchrec_slipstream.errors import InputError
from torchrec_slipstream.inputs.blind import NegativeSampling, RandomDrop
from torchrec_slipstream.inputs.choice import OneLane, Scheduler, Selector
from torchrec_slipstream.inputs.fae import FaeSelector
from torchrec_slipstream.inputs.hot import hot_of_calibration, hot_of_placement, hot_of_profile
from torchrec_slipstream.inputs.rows import Ranks, RowSets
from torchrec_slipstream.inputs.shuffle import ShuffleScheduler
from torchrec_slipstream.inputs.slipstream import SlipstreamSelector
from torchrec_slipstream.inputs.slipstream_knobs import SlipstreamKnobs
from torchrec_slipstream.placement import Placement
from torchrec_slipstream.tbe import UpdateFilter
from torchrec_slipstream.tbe.features import model_tables
from torchrec_slipstream.tbe.watched import watched_shards

Parts = tuple[Selector, Scheduler]


@dataclass(frozen=True)
class Surroundings:
    """What of a session the methods look at.

    Attributes:
        model: that trains.
        filters: of its TBEs.
        ranks: who agrees.
        placement: that the session was attached with.
        scale: look-ups that a counted one stands for.
        profile: the counts so far; a collective call.
    """

    model: nn.Module
    filters: Sequence[UpdateFilter]
    ranks: Ranks
    placement: Placement | None
    scale: int
    profile: Callable[[], AccessProfile]


def make(config: InputsConfig, around: Surroundings, **things: Any) -> Parts:
    """The selector and scheduler of ``config.method`` (not "off").

    Args:
        config: of the inputs.
        around: the session.
        things: what the user gave to ``Slipstream.inputs`` besides the loader: an access ``profile``, and for "fae" its
            ``calibration`` and a ``test_loss``.

    Raises:
        InputError: the method takes no such thing, or lacks one.
        ProfileError: the profile, calibration or placement is of another model.
    """
    builder, takes = _METHODS[config.method]
    if unknown := sorted(things.keys() - set(takes)):
        raise InputError(
            f"method={config.method!r} takes no {', '.join(unknown)}; give it "
            f"{'nothing but the loader' if not takes else 'the loader, and where wanted ' + ', '.join(takes)}"
        )
    return builder(config, around, **things)


def _random(config: InputsConfig, around: Surroundings) -> Parts:
    weighs = config.weigh is True
    return RandomDrop(config.drop_share, seed=config.seed, rank=around.ranks.mine, weighs=weighs), OneLane()


def _negatives(config: InputsConfig, around: Surroundings, *, weighs: bool = True) -> Parts:
    selector = NegativeSampling(
        config.drop_share,
        seed=config.seed,
        rank=around.ranks.mine,
        weighs=weighs if config.weigh is None else config.weigh,
        min_probability=config.min_probability,
    )
    return selector, OneLane()


def _slipstream(config: InputsConfig, around: Surroundings, *, profile: AccessProfile | None = None) -> Parts:
    knobs = SlipstreamKnobs(**{one.name: getattr(config, one.name) for one in fields(SlipstreamKnobs)})
    tables = model_tables(around.model)
    hot: RowSets | Callable[[], RowSets] | None = None
    if (budget := config.hot_bytes) is not None:
        own = around.profile
        hot = hot_of_profile(tables, profile, budget) if profile else lambda: hot_of_profile(tables, own(), budget)
    shards = watched_shards(around.filters)
    return SlipstreamSelector(knobs, tables, shards, hot, around.ranks, scale=around.scale), OneLane()


def _fae(
    config: InputsConfig,
    around: Surroundings,
    *,
    profile: AccessProfile | None = None,
    calibration: Calibration | None = None,
    test_loss: Callable[[], float] | None = None,
) -> Parts:
    tables = model_tables(around.model)
    if calibration is not None and profile is not None:
        hot = hot_of_calibration(tables, calibration, profile)
    elif profile is not None and config.hot_bytes is not None:
        hot = hot_of_profile(tables, profile, config.hot_bytes)
    elif around.placement is not None and profile is None:
        hot = hot_of_placement(tables, around.placement)
    else:
        raise InputError(
            "method='fae' has to know which rows are hot: attach the session with a placement, or give inputs() a "
            "profile, and InputsConfig hot_bytes or inputs() a calibration"
        )
    total = around.ranks.total
    return FaeSelector(hot), ShuffleScheduler(config.window, config.rate, config.patience, test_loss, total)


_METHODS: dict[str, tuple[Callable[..., Parts], tuple[str, ...]]] = {
    "random": (_random, ()),
    "negatives": (_negatives, ()),
    "thinning": (partial(_negatives, weighs=False), ()),
    "slipstream": (_slipstream, ("profile",)),
    "fae": (_fae, ("profile", "calibration", "test_loss")),
}
