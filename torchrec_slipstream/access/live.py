"""Counting the look-ups of a run: which steps are counted, what fades when, and what it all comes to."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from torchrec_slipstream.access.counters import is_counted
from torchrec_slipstream.access.merging import Part, PartInfo, merge
from torchrec_slipstream.access.profile import AccessProfile
from torchrec_slipstream.access.sketch import RowSketch
from torchrec_slipstream.config import AccessConfig
from torchrec_slipstream.errors import ProfileError, StateError
from torchrec_slipstream.ranks import Ranks

if TYPE_CHECKING:  # tbe/ counts with our counters, and so imports this room
    from torchrec_slipstream.tbe import TableShard
    from torchrec_slipstream.tbe.counting import LookupCounter

_SKETCH_LISTS = ("sketch.rows", "sketch.counts")


def has_row_counts(shard: TableShard, config: AccessConfig) -> bool:
    """Whether every row of the shard's table gets a count of its own; alike for all shards of a table."""
    return config.counter in ("exact", "sampled") and not _is_sketched(shard, config)


def _is_sketched(shard: TableShard, config: AccessConfig) -> bool:
    if config.counter in ("sketch", "off"):
        return config.counter == "sketch"
    too_large = config.max_counted_rows is not None and shard.table_rows > config.max_counted_rows
    return too_large or shard.table in config.sketch_tables


class LiveCounts:
    """The access counts of one rank's tables, while they are trained.

    Args:
        filters: one a TBE of this rank, with slots as :func:`has_row_counts` says.
        config: the knobs.

    Raises:
        AttachError: a table needs a sketch and datasketches is not installed.
    """

    def __init__(self, filters: Sequence[LookupCounter], config: AccessConfig) -> None:
        self.config = config
        self._filters = list(filters)
        for one in self._filters:
            for place, shard in enumerate(one.shards):
                # Column shards see the same look-ups; one of them lists the rows for all.
                if _is_sketched(shard, config) and shard.col_offset == 0:
                    one.sketches[place] = RowSketch(config.sketch_rows)
        self.prepare(0)

    def step(self, steps: int) -> None:
        """Call after every training step, ``steps`` of which are over now."""
        half_life = self.config.half_life
        if half_life is not None and steps % half_life == 0:
            self._halve(steps // half_life)
        self.prepare(steps)

    def prepare(self, step: int) -> None:
        """Say whether the coming step, number ``step`` from 0, is counted."""
        config = self.config
        for one in self._filters:
            one.counting = config.counter != "off" and is_counted(step, config.scale)

    @overload
    def profile(self, ranks: Ranks) -> AccessProfile: ...
    @overload
    def profile(self, ranks: Ranks, dst: int | None) -> AccessProfile | None: ...
    def profile(self, ranks: Ranks, dst: int | None = None) -> AccessProfile | None:
        """The counts so far of all ``ranks``, on rank ``dst`` or (None) on all: a collective call.

        Raises:
            ProfileError: nothing is counted, or there is no rank ``dst``.
        """
        if self.config.counter == "off":
            raise ProfileError(
                "AccessConfig(counter='off') counts no look-ups, so there is no profile; attach with 'sampled', "
                "'exact' or 'sketch'"
            )
        if dst is not None and dst not in range(ranks.number):
            raise ProfileError(
                f"dst={dst!r}; give a rank of the session's process group, 0 to {ranks.number - 1}, or None"
            )
        return merge(self.parts(), self.config.scale, ranks, dst)

    def counted_steps(self, begin: int, end: int) -> int:
        """How many of the steps ``begin`` to ``end - 1`` are counted."""
        if self.config.counter == "off":
            return 0
        return sum(is_counted(step, self.config.scale) for step in range(begin, end))

    @torch.no_grad()
    def _halve(self, time: int) -> None:
        """Halve everything that is counted; ``time`` is the how manieth time this is."""
        for one in self._filters:
            one.samples /= 2
            for place, shard in enumerate(one.shards):
                seed = zlib.crc32(f"{shard.collection}.{shard.table}/{time}".encode())
                if shard.counted:
                    one.counts.halve(shard.slots.start, shard.slots.stop, seed, shard.row_offset)
                elif place in one.sketches:
                    one.sketches[place].halve(seed, shard.row_offset)

    # ------------------------------------------------------------------------------------------- what it comes to

    def parts(self) -> list[Part]:
        """This rank's counts, scaled to all steps: one part a shard, but for column shards of what another has."""
        return [
            self._part(one, place, shard)
            for one in self._filters
            for place, shard in enumerate(one.shards)
            if shard.col_offset == 0 and shard.rows > 0 and (shard.counted or place in one.sketches)
        ]

    def _part(self, one: LookupCounter, place: int, shard: TableShard) -> Part:
        scale = self.config.scale
        samples = [float(one.samples[f]) for f, table in enumerate(one.feature_table) if table == place]
        info = PartInfo(
            collection=shard.collection,
            table=shard.table,
            table_rows=shard.table_rows,
            embedding_dim=shard.table_dim,
            element_size=one.element_size,
            optimizer_bytes=one.optimizer_bytes(shard.table_dim),
            begin=shard.row_offset,
            rows=shard.rows,
            samples=max(samples, default=0.0) * scale,
        )
        if shard.counted:
            first = shard.slots.start
            return Part.dense(info, lambda begin, end: one.counts.counts(first + begin, first + end).cpu() * scale)
        rows, counts = one.sketches[place].items()
        return Part.sparse(info, rows, counts * scale, one.sketches[place].total * scale)

    # ------------------------------------------------------------------------------------------- its state

    def state_dict(self) -> dict[str, Any]:
        """What the counts depend on besides the touches, which are saved with staleness. Tensors keyed by shard."""
        shards = {}
        for one in self._filters:
            for place, shard in enumerate(one.shards):
                faded = one.counts.faded
                saved = {
                    "faded": torch.empty(0, dtype=torch.int64) if faded is None else faded[shard.slots].clone(),
                    "samples": one.samples[[table == place for table in one.feature_table]],
                }
                if place in one.sketches:
                    saved |= one.sketches[place].state()
                shards[shard.key] = saved
        return {"config": asdict(self.config), "shards": shards}

    def check_config(self, state: dict[str, Any]) -> None:
        """Raise StateError if the saved state was counted in another way."""
        mine, saved = asdict(self.config), state.get("config", {})
        if differing := [name for name, value in mine.items() if saved.get(name) != value]:
            raise StateError(
                f"the saved state was made with another configuration: {differing} differ. Use the same AccessConfig "
                "to resume, or start without the session's state."
            )

    def check(self, state: dict[str, Any]) -> None:
        """Raise StateError unless the saved state fits this rank's shards."""
        shards = state.get("shards", {})
        slots = {s.key: s.slots.stop - s.slots.start for one in self._filters for s in one.shards}
        for key, expected in self.state_dict()["shards"].items():
            saved = shards.get(key, {})
            if missing := sorted(expected.keys() - saved.keys()):
                raise StateError(f"shard {key}: the saved access state is incomplete, it lacks {missing}")
            for name, tensor in expected.items():
                # Without a half life, only counts that came near int32's end have faded.
                optional = name == "faded" and self.config.half_life is None
                _check_tensor(key, name, saved[name], tensor, any_length=optional or name in _SKETCH_LISTS)
                if optional and saved[name].numel() not in (0, slots[key]):
                    raise StateError(f"shard {key}: faded has {saved[name].numel()} rows, this model has {slots[key]}")
            if "sketch.rows" in expected and saved["sketch.rows"].shape != saved["sketch.counts"].shape:
                raise StateError(f"shard {key}: the saved sketch has not a count for every row")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`'s state, which :meth:`check` has passed; the touches are loaded already."""
        for one in self._filters:
            parts = [state["shards"][shard.key] for shard in one.shards]
            dtype = parts[0]["faded"].dtype
            has_faded = self.config.half_life is not None or any(part["faded"].numel() for part in parts)
            one.counts.faded = torch.zeros_like(one.counts.touches, dtype=dtype) if has_faded else None
            for place, part in enumerate(parts):
                if one.counts.faded is not None and part["faded"].numel():
                    one.counts.faded[one.shards[place].slots] = part["faded"].to(one.device)
                one.samples[[table == place for table in one.feature_table]] = part["samples"].cpu()
                if place in one.sketches:
                    one.sketches[place].load(part)


def _check_tensor(key: str, name: str, saved: Any, mine: Tensor, *, any_length: bool) -> None:
    if not isinstance(saved, Tensor):
        raise StateError(f"shard {key}: {name} is {type(saved).__name__} instead of a tensor")
    if saved.dtype != mine.dtype or saved.dim() != mine.dim() or not (any_length or saved.shape == mine.shape):
        raise StateError(
            f"shard {key}: the saved state has {name} of {saved.dtype} {tuple(saved.shape)}, this model needs "
            f"{mine.dtype} {tuple(mine.shape)}"
        )
