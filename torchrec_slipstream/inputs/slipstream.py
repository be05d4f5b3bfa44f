"""Slipstream's input skipping (arXiv 2404.04270): inputs that look up nothing but stale rows are left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from torchrec_slipstream.config import SlipstreamInputs
from torchrec_slipstream.errors import ConfigError, StateError
from torchrec_slipstream.inputs.batches import kjts_of, size_of
from torchrec_slipstream.inputs.choice import Choice
from torchrec_slipstream.inputs.draws import Draws
from torchrec_slipstream.inputs.movement import (
    Scale,
    ShardMovement,
    Snapshot,
    WatchedShard,
    movements_of,
    snapshots,
)
from torchrec_slipstream.inputs.rows import RowSets
from torchrec_slipstream.inputs.search import (
    Found,
    Sample,
    Search,
    bisect,
    critical_movement,
    is_stale,
    rows_looked_up,
)
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe.features import ModelTable


@dataclass(frozen=True)
class SlipstreamShares:
    """Inputs that a rank read.

    Attributes:
        inputs: all.
        remaining: those read while a set of stale rows was there.
        hot: of the remaining, those whose look-ups are all of hot rows.
        dropped: of the hot ones.
    """

    inputs: int = 0
    remaining: int = 0
    hot: int = 0
    dropped: int = 0

    def __add__(self, other: SlipstreamShares) -> SlipstreamShares:
        return SlipstreamShares(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


class SlipstreamSelector:
    """Drops hot inputs whose look-ups are of stale rows.

    The method: S0, the hot rows' weights before step ``start``; S1, after ``snapshot_steps`` more. A row is stale if
    its largest movement in a dimension, ``|S1 - S0|``, is below a threshold T. T is found by bisection of
    ``[0, max_threshold]``, at most 25 halvings, until the share of sampled hot inputs with at least ``stale_lookups``
    stale look-ups is within ``search_window`` of ``drop_share``. From then on such inputs are dropped, if they are hot
    (all their look-ups are of hot rows); the others never are.

    Where this leaves the artefact:

    * a row with fewer than ``min_touches`` look-ups between the snapshots is not stale; there an untouched row is, as
      it moved by 0;
    * a search that fails keeps the best threshold it met, and warns; there it leaves T = 0 and says nothing;
    * no batch is trained twice; there the window's last is;
    * inputs keep the loader's order, hot or not; there all cold batches are trained first. The search's sample is drawn
      from the inputs read up to then, there from all hot inputs. What a pipeline has read ahead of the search is not
      dropped;
    * look-ups of tables whose rows no rank watches (data parallel, excluded, sketched) do not count; there are none;
    * an input without look-ups is never dropped;
    * :class:`SlipstreamShares` tells what was dropped of all inputs, of those that remained, and of the hot ones among
      them; there the share is of all hot inputs, while D is of the remaining ones;
    * ``movement="per_touch"`` takes out that movement shrinks by itself under Adagrad; ``"relative"`` and ``per_table``
      are two readings of the paper's "feature normalisation", which the artefact lacks;
    * ``again`` thaws all rows and searches anew; there it is done once and never undone.

    An update that the session leaves out (``StalenessConfig``) moves no row, so its row looks stale here: to see what
    the inputs alone would do, attach with ``target_share=0``.

    Memory: the hot rows' weights once more on their device from S0 to the search, the sampled inputs' look-ups, and two
    :class:`RowSets`.

    Args:
        config: the numbers; ``hot_bytes`` and ``snapshot_share`` are not read.
        tables: the model's, the same on all ranks.
        shards: this rank's shards that train and are counted. Rows of others are never stale.
        hot: which rows are hot; or what says so when the snapshot is taken, a collective call of all ranks; None: all.
        ranks: who agrees.
        drop_share: D, share of the hot inputs that the search aims at, in ``[0, 1)``.
        seed: of the search's sample.
        scale: look-ups that a counted one stands for (``AccessConfig.scale``).

    Raises:
        ConfigError: hot rows are to be asked for before the first step.
    """

    lanes = 1
    weighs = False

    def __init__(
        self,
        config: SlipstreamInputs,
        tables: Sequence[ModelTable],
        shards: Iterable[WatchedShard],
        hot: RowSets | Callable[[], RowSets] | None,
        ranks: Ranks,
        *,
        drop_share: float,
        seed: int = 0,
        scale: int = 1,
    ) -> None:
        if callable(hot) and config.start == 0:
            raise ConfigError(
                "start=0: before the first step no look-up is counted, so no row is hot. Give start the steps that the "
                "counts need, or give a profile, a placement, or hot_bytes=None (all rows)"
            )
        self.config = config
        self._drop_share, self._seed = drop_share, seed
        self.stale: RowSets | None = None
        self.searches: list[Search] = []
        self.shares = SlipstreamShares()
        self._tables = {table.fqn: table for table in tables}
        self._shards = list(shards)
        self._all_hot = hot is None  # then a batch's look-ups need not be looked for among them
        self._ask_hot = hot if callable(hot) else None
        self._hot = hot if isinstance(hot, RowSets) else None if callable(hot) else RowSets.all_rows(tables)
        self._ranks = ranks
        self._scale = scale
        self._begin: int | None = config.start
        self._before: list[Snapshot] | None = None
        self._draws = Draws(seed, ranks.mine)
        self._steps = 0
        self._sampled = Sample()

    # ------------------------------------------------------------------------------------------- a batch

    def choose(self, batch: Any) -> Choice:
        """Drop the batch's inputs that are hot and stale; before the search, keep some for it."""
        if self._begin == 0 and self._before is None:
            self._take_snapshots()
        size, features = size_of(batch), kjts_of(batch)
        keep = torch.ones(size, dtype=torch.bool)
        self.shares = replace(self.shares, inputs=self.shares.inputs + size)
        if self._begin is not None:
            self._sample(features, size)
        if self.stale is not None and self._hot is not None:
            stale = self.stale.samples(features)
            config = self.config
            drop = is_stale(stale, self.stale, config.stale_lookups, each_table=config.each_table)
            inside = None if self._all_hot else self._hot.samples(features).all_inside
            hot = size if inside is None else int(inside.sum())
            keep = ~(drop if inside is None else drop & inside).cpu()
            self.shares += SlipstreamShares(0, size, hot, size - int(keep.sum()))
        return Choice(keep)

    def _sample(self, features: Sequence[KeyedJaggedTensor], size: int) -> None:
        chosen = (self._draws.uniform(size) < self.config.sample_share).nonzero().squeeze(1)
        self._sampled.add(features, chosen)

    # ------------------------------------------------------------------------------------------- a step

    @torch.no_grad()
    def step(self, steps: int) -> None:
        """Take the snapshot, or search, when it is time; the search is collective."""
        self._steps += 1  # not the session's, which may have trained before it chose
        if self._begin is None or self._steps < self._begin:
            return
        if self._before is None:
            self._take_snapshots()
        if self._steps == self._begin + self.config.snapshot_steps:
            self._search(steps)

    def _take_snapshots(self) -> None:
        """Of all rows that are hot now; all are thawed."""
        self.stale = None
        if self._ask_hot is not None:
            self._hot = self._ask_hot()
        assert self._hot is not None
        self._before = snapshots(self._shards, self._hot)

    def _search(self, steps: int) -> None:
        assert self._before is not None
        assert self._begin is not None
        config = self.config
        least = -(-config.min_touches // self._scale) * self._scale
        moved = [one.movement(config.movement, least, self._scale) for one in self._before]
        watched = {fqn for of_rank in self._ranks.gather({one.at.fqn for one in self._shards}) for fqn in of_rank}
        tables = [table for table in self._tables.values() if table.fqn in watched]
        found, thresholds = self._find(moved, RowSets(tables, {}))
        below = [one.below(thresholds[one.shard.at.fqn]) for one in moved]
        self.stale = RowSets.gathered(tables, below, self._ranks)
        self.searches.append(Search(steps, found, thresholds, sum(self.stale.sizes().values())))
        if not found.met and self._ranks.mine == 0:
            warnings.warn(
                f"Slipstream's search found no threshold that drops {self._drop_share:.0%} +- "
                f"{config.search_window:.0%} of {found.samples} sampled hot inputs; the best, {found.threshold:.3g}, "
                f"drops {found.share:.1%}. Sample more (sample_share), wait longer (start, snapshot_steps), or widen "
                "search_window or max_threshold",
                stacklevel=2,
            )
        self._before = None
        self._sampled.clear()
        self._begin = self._begin + config.again if config.again else None

    def _find(self, moved: Sequence[ShardMovement], watched: RowSets) -> tuple[Found, dict[str, float]]:
        """How the search went, and the threshold of every watched table."""
        config = self.config
        assert self._hot is not None
        sampled = self._sampled.hot(self._hot)
        movements = movements_of(rows_looked_up(sampled, watched), watched.tables, moved, self._ranks)
        highest = config.max_threshold
        scales = {fqn: Scale.of(one) for fqn, one in movements.items()} if config.per_table else {}
        if config.per_table:
            movements = {fqn: scales[fqn].shares(one) for fqn, one in movements.items()}
            highest = 1.0
        elif highest is None:
            finite = [one.moved[np.isfinite(one.moved)].max(initial=0.0) for one in movements.values()]
            highest = float(np.nextafter(max([0.0, *finite]), np.inf))
        critical = np.empty(0)
        if sampled:
            least, each_table = config.stale_lookups, config.each_table
            critical = critical_movement(sampled, movements, watched, least, each_table=each_table)
        found = bisect(critical, self._drop_share, config.search_window, highest, self._ranks.total)
        if not config.per_table:
            return found, dict.fromkeys(watched.tables, found.threshold)
        # Nothing was sampled of a table without a scale: nothing is known of its rows.
        thresholds = dict.fromkeys(watched.tables, 0.0)
        return found, thresholds | {fqn: scale.threshold(found.threshold) for fqn, scale in scales.items()}

    # ------------------------------------------------------------------------------------------- its state

    def state_dict(self) -> dict[str, Any]:
        """Snapshots of this rank's shards, sampled inputs, and the sets of rows; small once the search is over."""
        return {
            "selector": "slipstream",
            "knobs": self._knobs(),
            "shares": asdict(self.shares),
            "searches": [asdict(one) for one in self.searches],
            "begin": self._begin,
            "draws": self._draws.batches,
            "steps": self._steps,
            "hot": None if self._hot is None else self._hot.state_dict(),
            "stale": None if self.stale is None else self.stale.state_dict(),
            "watched": None if self.stale is None else sorted(self.stale.tables),
            "before": None if self._before is None else {one.shard.at.key: one.state_dict() for one in self._before},
            "sampled": self._sampled.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            StateError: it is of another selector, other knobs, tables or shards. Nothing was changed.
        """
        if state.get("selector") != "slipstream":
            raise StateError(f"this is the state of another selector ({state.get('selector')!r}), not of Slipstream's")
        if differing := [name for name, value in self._knobs().items() if state["knobs"].get(name) != value]:
            raise StateError(f"the saved state was made with another configuration: {differing} differ; use the same")
        before = state["before"]
        keys = {one.at.key for one in self._shards}
        if before is not None and before.keys() != keys:
            raise StateError(
                f"the saved snapshots are of shards {sorted(before)[:3]}, this rank has {sorted(keys)[:3]}; resume "
                "with the plan and the rank that it was saved with"
            )
        hot = None if state["hot"] is None else RowSets.from_state(self._tables.values(), state["hot"])
        stale = None
        if state["stale"] is not None:
            watched = [table for fqn, table in self._tables.items() if fqn in state["watched"]]
            stale = RowSets.from_state(watched, state["stale"])
        self._hot, self.stale = hot, stale
        self.shares = SlipstreamShares(**state["shares"])
        self.searches = [Search(**{**one, "found": Found(**one["found"])}) for one in state["searches"]]
        self._begin, self._draws.batches, self._steps = state["begin"], state["draws"], state["steps"]
        if before is not None:
            before = [Snapshot.from_state(one, before[one.at.key]) for one in self._shards]
        self._before = before
        self._sampled.load_state_dict(state["sampled"])

    def _knobs(self) -> dict[str, Any]:
        return asdict(self.config) | {"drop_share": self._drop_share, "seed": self._seed}
