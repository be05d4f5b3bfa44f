"""The methods by name: which selector and scheduler a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from torchrec_slipstream.access import AccessProfile, Calibration
from torchrec_slipstream.config import InputsConfig, SlipstreamInputs
from torchrec_slipstream.errors import InputError
from torchrec_slipstream.inputs.blind import NegativeSampling, RandomDrop
from torchrec_slipstream.inputs.choice import OneLane, Scheduler, Selector
from torchrec_slipstream.inputs.fae import FaeSelector, ShuffleScheduler
from torchrec_slipstream.inputs.hot import hot_of_calibration, hot_of_overlays, hot_of_placement, hot_of_profile
from torchrec_slipstream.inputs.rows import RowSets
from torchrec_slipstream.inputs.slipstream import SlipstreamSelector
from torchrec_slipstream.loaders import length_of
from torchrec_slipstream.placement import Placement
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.report.inputs import SearchReport
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
        moves: re-plans so far that moved hot rows, the same on all ranks; None where hot rows stay what they are.
        scale: look-ups that a counted one stands for.
        profile: the counts so far; a collective call.
    """

    model: nn.Module
    filters: Sequence[UpdateFilter]
    ranks: Ranks
    placement: Placement | None
    moves: Callable[[], int] | None
    scale: int
    profile: Callable[[], AccessProfile]


def make(config: InputsConfig, around: Surroundings, loader: Iterable[Any], **things: Any) -> Parts:
    """The selector and scheduler of ``config.method`` (not "off"): a collective call.

    Args:
        config: of the inputs.
        around: the session.
        loader: the first that the user gave to ``Slipstream.inputs``.
        things: what else the user gave there: an access ``profile``, and for "fae" its ``calibration`` and a
            ``test_loss``.

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
    return builder(config, around, loader, **things)


def _random(config: InputsConfig, around: Surroundings, _: Iterable[Any]) -> Parts:
    weighs = config.weigh is True
    return RandomDrop(config.drop_share, seed=config.seed, rank=around.ranks.mine, weighs=weighs), OneLane()


def _negatives(config: InputsConfig, around: Surroundings, _: Iterable[Any], *, weighs: bool) -> Parts:
    selector = NegativeSampling(
        config.drop_share,
        seed=config.seed,
        rank=around.ranks.mine,
        weighs=weighs if config.weigh is None else config.weigh,
        positive_weight=config.positive_weight,
        min_probability=config.min_probability,
    )
    return selector, OneLane()


def _slipstream(
    config: InputsConfig, around: Surroundings, loader: Iterable[Any], *, profile: AccessProfile | None = None
) -> Parts:
    tables = model_tables(around.model)
    hot: RowSets | Callable[[], RowSets] | None = None
    if (budget := config.slipstream.hot_bytes) is not None:
        own = around.profile
        hot = (
            hot_of_profile(tables, profile, budget)
            if profile is not None
            else lambda: hot_of_profile(tables, own(), budget)
        )
    elif profile is not None:
        raise InputError(
            "the profile says which rows are the hot ones that fit SlipstreamInputs.hot_bytes, which is None: all rows "
            "are hot. Give hot_bytes, or no profile"
        )
    selector = SlipstreamSelector(
        _in_steps(config.slipstream, loader, around.ranks),
        tables,
        watched_shards(around.filters),
        hot,
        around.ranks,
        drop_share=config.drop_share,
        seed=config.seed,
        scale=around.scale,
    )
    return selector, OneLane()


def _in_steps(config: SlipstreamInputs, loader: Iterable[Any], ranks: Ranks) -> SlipstreamInputs:
    """The same with ``snapshot_steps`` for its ``snapshot_share``, of the shortest loader of all ranks."""
    if config.snapshot_share is None:
        return config
    length = length_of(loader)
    (batches,) = ranks.least([length if length is not None else -1])
    if batches < 0:
        raise InputError(
            f"snapshot_share={config.snapshot_share} is of the batches of an epoch, and a {type(loader).__name__} has "
            "no length (on this rank or another); give snapshot_steps instead"
        )
    return replace(config, snapshot_steps=max(1, round(config.snapshot_share * batches)), snapshot_share=None)


def _fae(
    config: InputsConfig,
    around: Surroundings,
    _: Iterable[Any],
    *,
    profile: AccessProfile | None = None,
    calibration: Calibration | None = None,
    test_loss: Callable[[], float] | None = None,
) -> Parts:
    tables, ranks = model_tables(around.model), around.ranks
    _check_fae(config.fae.hot_bytes, profile, calibration)
    if calibration is not None and profile is not None:
        selector = FaeSelector(hot_of_calibration(tables, calibration, profile))
    elif profile is not None and config.fae.hot_bytes is not None:
        selector = FaeSelector(hot_of_profile(tables, profile, config.fae.hot_bytes))
    elif around.moves is not None and profile is None:
        selector = FaeSelector(partial(hot_of_overlays, tables, around.filters, around.placement, ranks), around.moves)
    elif around.placement is not None and profile is None:
        selector = FaeSelector(hot_of_placement(tables, around.placement))
    else:
        raise InputError(
            "method='fae' has to know which rows are hot: attach the session with a placement or hbm_budget, or give "
            "inputs() a profile, and FaeInputs hot_bytes or inputs() a calibration"
        )
    return selector, ShuffleScheduler(config.fae, test_loss, ranks.total)


def _check_fae(hot_bytes: int | float | str | None, profile: AccessProfile | None, calibration: object) -> None:
    """Raises InputError where something that was given to say which rows are hot would not be heeded."""
    if calibration is not None and hot_bytes is not None:
        raise InputError(
            f"both FaeInputs(hot_bytes={hot_bytes}) and the calibration say which rows are hot; give one of the two"
        )
    if profile is None and calibration is not None:
        raise InputError("a calibration has no counts of rows; give inputs() the profile that it was made from as well")
    if profile is None and hot_bytes is not None:
        raise InputError(
            f"FaeInputs(hot_bytes={hot_bytes}) is filled with the rows that a profile has most look-ups of; give "
            "inputs() a profile, or leave hot_bytes at None to take the session's hot rows"
        )


def told_by(selector: Selector) -> dict[str, Any]:
    """What the report shows of a method besides counts of samples and look-ups: arguments of :meth:`Tally.report`."""
    if isinstance(selector, FaeSelector):
        return {"lanes": ("cold", "hot")}
    if isinstance(selector, SlipstreamSelector):
        searches = [
            SearchReport(step=one.step, stale_rows=one.stale_rows, **asdict(one.found)) for one in selector.searches
        ]
        return {"searches": searches, "classified": selector.shares.remaining, "hot": selector.shares.hot}
    return {}


_METHODS: dict[str, tuple[Callable[..., Parts], tuple[str, ...]]] = {
    "random": (_random, ()),
    "negatives": (partial(_negatives, weighs=True), ()),
    "thinning": (partial(_negatives, weighs=False), ()),
    "slipstream": (_slipstream, ("profile",)),
    "fae": (_fae, ("profile", "calibration", "test_loss")),
}
