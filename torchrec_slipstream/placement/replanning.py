"""Re-planning: from the access counts so far, which rows of one overlay should be hot until the next look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from torchrec_slipstream.config import PlacementConfig
from torchrec_slipstream.placement.forecast import Forecast, choose
from torchrec_slipstream.tbe import UpdateFilter
from torchrec_slipstream.tbe.compaction import positions_of
from torchrec_slipstream.tbe.overlay import Overlay, Pool

# Re-plans for which a row stays hot, in which it has to make good what its move cost.
_STAY = 16
# More than any row is worth: what keeps a young row hot.
_ALWAYS = 1e30


@dataclass
class Proposal:
    """What one overlay would move.

    Attributes:
        wanted: by the place of a shard, its hot rows: int64 ``[n]``, ascending.
        bytes: of the rows to move, each counted once.
    """

    wanted: dict[int, Tensor] = field(default_factory=dict)
    bytes: int = 0


@dataclass
class _Exchange:
    """Rows of a pool that may change places: int64 ``[n]``, those looked up so far or hot; bool ``[n]``, which are
    ``hot``; float32 ``[n]``, their ``worth``; int64 each, which of the ``n`` should come and leave; and how many slots
    are ``free``."""

    rows: Tensor
    hot: Tensor
    worth: Tensor
    coming: Tensor
    leaving: Tensor
    free: int

    @property
    def moves(self) -> int:
        return self.coming.numel() + self.leaving.numel()

    @property
    def gain(self) -> float:
        """Look-ups a step that would be served more."""
        return float(self.worth[self.coming].double().sum() - self.worth[self.leaving].double().sum())


class _PoolPlanner:
    """Re-plans the rows of one pool: those of its shards whose rows are counted one by one."""

    def __init__(self, overlay: Overlay, pool: Pool, counter: UpdateFilter) -> None:
        self.overlay = overlay
        self.pool = pool
        self.counter = counter
        self.places = [place for place in pool.shards if counter.shards[place].counted]
        rows = [counter.shards[place].rows for place in self.places]
        self.begins = list(accumulate(rows, initial=0))
        self.forecast = Forecast(self.begins, overlay.device)
        # Re-plan in which each slot's row came to it.
        self.since = torch.zeros(pool.slots, dtype=torch.int32, device=overlay.device)
        self._owner = pool.owner.clone()

    def observe(self, steps: int) -> None:
        self.forecast.observe(self._of_rows(self.counter.touches, [s.row_begin for s in self.counter.shards]), steps)

    def compare(self, config: PlacementConfig, now: int) -> _Exchange:
        """Which rows should come and leave, if nothing limits how many."""
        pool, overlay = self.pool, self.overlay
        hot = self._of_rows(overlay.words, overlay.space.begins) >= 0
        rows = positions_of(hot | self.forecast.was_seen)
        hot = hot[rows]
        hot_rows, taken = int(hot.sum()), overlay.taken(pool)
        others = int(taken.sum()) - hot_rows
        worth = self.forecast.worth(rows)
        margin = config.move_cost / (_STAY * config.replan_every)
        held = worth
        if config.min_age > 1:
            held = worth.clone()
            held[torch.searchsorted(rows, self._young(config, now))] = _ALWAYS
        # Two rows move where one takes another's place.
        chosen = choose(held, hot, pool.slots - others, keep=config.hysteresis, margin=2 * margin)
        # Even a free slot is only for a row that makes its move good.
        chosen &= hot | (worth > margin)
        coming, leaving = positions_of(chosen & ~hot), positions_of(hot & ~chosen)
        free = pool.slots - others - hot_rows
        return _Exchange(rows, hot, worth, *_of_most_gain(worth, coming, leaving, free, float("inf")), free)

    def propose(self, exchange: _Exchange, share: float) -> Proposal:
        """The exchange, or the ``share`` of its moves that gains most."""
        worth, chosen = exchange.worth, exchange.hot
        most = share * exchange.moves if share < 1.0 else float("inf")
        coming, leaving = _of_most_gain(worth, exchange.coming, exchange.leaving, exchange.free, most)
        chosen[coming], chosen[leaving] = True, False
        rows = exchange.rows[chosen]
        ends = torch.searchsorted(rows, torch.tensor(self.begins[1:-1], device=rows.device)).tolist()
        parts = zip(self.places, self.begins[:-1], rows.tensor_split(ends), strict=True)
        wanted = {place: part - begin for place, begin, part in parts}
        return Proposal(wanted, (coming.numel() + leaving.numel()) * self.pool.row_bytes)

    def remember(self, now: int) -> None:
        """Call after the move: which rows are new to their slots."""
        self.since[self.pool.owner != self._owner] = now
        self._owner = self.pool.owner.clone()

    def since_of_hot(self) -> Tensor:
        """int32 ``[n]``, since which re-plan each hot row is so, in the order of the rows: slots are nobody's."""
        return self.since[self._slots_of_hot()]

    def load_since(self, since: Tensor) -> None:
        """Restore :meth:`since_of_hot`."""
        self.since[self._slots_of_hot()] = since.to(self.since.device)

    def _slots_of_hot(self) -> Tensor:
        hot = dict(self.overlay.by_shard(self.pool, positions_of(self.overlay.taken(self.pool))))
        return torch.cat([self.overlay.slots_of(place, hot[place]) for place in self.places])

    def lower(self, rows: Tensor, taken: Tensor) -> None:
        """Follow the counter's ``lower_high``."""
        for place, begin in zip(self.places, self.begins[:-1], strict=True):
            slots = self.counter.shards[place].slots
            mine = (rows >= slots.start) & (rows < slots.stop)
            self.forecast.lower(rows[mine] - slots.start + begin, taken[mine])

    def _young(self, config: PlacementConfig, now: int) -> Tensor:
        """int64 ``[n]``, the pool's rows that have not been hot for long enough to go."""
        young = self.overlay.taken(self.pool) & (now - self.since < config.min_age)
        parts = [
            rows + self.begins[self.places.index(place)]
            for place, rows in self.overlay.by_shard(self.pool, positions_of(young))
            if place in self.places
        ]
        return torch.cat(parts)

    def _of_rows(self, values: Tensor, begins: list[int]) -> Tensor:
        """The entries of the pool's rows of ``values``, where each shard's begin at ``begins``: a copy."""
        shards = self.counter.shards
        return torch.cat([values[begins[place] : begins[place] + shards[place].rows] for place in self.places])


def _of_most_gain(worth: Tensor, coming: Tensor, leaving: Tensor, free: int, most_rows: float) -> tuple[Tensor, Tensor]:
    """Of the rows that should come and leave, those of most gain, if there are more than ``most_rows`` of them.

    Only so many leave as others need their slots: a row that is cold by now does no harm in a slot that nobody wants.
    """
    places = coming.numel()
    if places + max(0, places - free) > most_rows:
        # The first `free` come for one move each, the others for two.
        places = int(min(most_rows, free) + max(0.0, most_rows - free) / 2)
        coming = coming[worth[coming].topk(places).indices].sort().values
    leave = min(leaving.numel(), max(0, places - free))
    leaving = leaving[worth[leaving].topk(leave, largest=False).indices].sort().values
    return coming, leaving


class Replanner:
    """Re-plans one overlay's rows.

    Args:
        counter: counts the look-ups of the backing TBE.
        config: the knobs.
    """

    def __init__(self, overlay: Overlay, counter: UpdateFilter, config: PlacementConfig) -> None:
        self.overlay = overlay
        self.config = config
        self._pools = [_PoolPlanner(overlay, pool, counter) for pool in overlay.pools if pool.slots]
        self._pools = [pool for pool in self._pools if pool.places]
        self._exchanges: list[_Exchange] = []

    def observe(self, steps: int) -> None:
        """Take in the counts of a window of which ``steps`` steps were counted."""
        for pool in self._pools:
            pool.observe(steps)

    def compare(self, now: int) -> tuple[int, float]:
        """Find what should move in re-plan number ``now``. :meth:`propose` has to follow.

        Returns:
            Its bytes; and the look-ups a step that would be served more.
        """
        self._exchanges = [pool.compare(self.config, now) for pool in self._pools]
        moving = sum(one.moves * pool.pool.row_bytes for one, pool in zip(self._exchanges, self._pools, strict=True))
        return moving, sum(one.gain for one in self._exchanges)

    def propose(self, share: float = 1.0) -> Proposal:
        """What was found, or of each pool's moves the ``share`` that gains most: none has to wait for the others."""
        whole = Proposal()
        for pool, exchange in zip(self._pools, self._exchanges, strict=True):
            part = pool.propose(exchange, share)
            whole.wanted |= part.wanted
            whole.bytes += part.bytes
        self._exchanges = []
        return whole

    def remember(self, now: int) -> None:
        """Call after rows were moved, for whatever reason, in re-plan number ``now``."""
        for pool in self._pools:
            pool.remember(now)

    def lower(self, rows: Tensor, taken: Tensor) -> None:
        """Follow the counter's ``lower_high``; one of its ``followers``."""
        for pool in self._pools:
            pool.lower(rows, taken)

    def state_dict(self) -> list[dict[str, Tensor]]:
        """What it has learnt, a pool at a time: copies."""
        learnt = ({name: one.clone() for name, one in pool.forecast.state_dict().items()} for pool in self._pools)
        return [one | {"since": pool.since_of_hot()} for one, pool in zip(learnt, self._pools, strict=True)]

    def check(self, state: Any, hot: Mapping[int, int]) -> None:
        """Raise ValueError unless :meth:`load_state_dict` can restore ``state``, which has so many ``hot`` rows by the
        place of a shard."""
        if not isinstance(state, list) or len(state) != len(self._pools):
            raise ValueError(f"it has not the {len(self._pools)} pools of this model")
        for saved, pool in zip(state, self._pools, strict=True):
            shapes = {name: list(tensor.shape) for name, tensor in pool.forecast.state_dict().items()}
            shapes["since"] = [sum(hot[place] for place in pool.places)]
            for name, shape in shapes.items():
                if not isinstance(saved, Mapping) or name not in saved or list(saved[name].shape) != shape:
                    raise ValueError(f"{name} is missing or of another shape than {shape}")

    def load_state_dict(self, state: list[dict[str, Tensor]]) -> None:
        """Restore what :meth:`check` has passed; the rows are in slots already, though not in those they had."""
        for saved, pool in zip(state, self._pools, strict=True):
            pool.forecast.load_state_dict(saved)
            pool.remember(0)
            pool.load_since(saved["since"])
