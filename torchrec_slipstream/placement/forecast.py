"""What each row will be worth until the next re-plan, and which rows are hot then.

A forecast is made from live access counts alone, in two stages, and both are learnt while the run goes on: whenever a
window has been counted, what had been forecast for it is held against what came.

1. A row's rate (look-ups a step) is a mixture of its recent rate, which fades by half in 1.5 windows, and its lasting
   one, which takes 32. How much of each, every table learns by least squares: the recent one counts where traffic
   drifts, the lasting one has less noise.
2. Rows of few look-ups come back less often than they were seen, those of some tables (sessions) never. So a rate is
   corrected by what rows of such a count and table had of what was forecast for them (held-out estimation, see
   :mod:`torchrec_slipstream.access.recurrence`); rows never seen are worth what such rows had.

A row costs eight bytes besides its running access count, and nothing between two re-plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrec_slipstream.tbe.compaction import positions_of

# How much of a row's look-ups is left after one more window: recent, and lasting.
_FADE = (0.5 ** (1 / 1.5), 0.5 ** (1 / 32))
# And of what was learnt: the mixtures, and the corrections, which are less steady.
_KEEP_MIXTURE, _KEEP_CORRECTION = 0.95, 0.8
# A correction is held to 1 as by so many look-ups that came as forecast.
_PRIOR = 100.0
# Classes by binary logarithm of the faded count, class 0 below 2^-11.7 (not whole: 1, 2, 4 shall be on no edge).
_CLASSES, _LEAST = 48, 11.7
# Forecasts are summed in whole parts of a look-up: the sums do not depend on the order then, on a GPU either.
_PART = 1 << 16
# Becomes 0 as a float16, but not before: a CPU takes roots and logarithms of zeros ten times as slowly as of others.
_TINY = 2.0**-100
# The square of float16's largest: a lasting count is some 46 windows' look-ups, which may be more.
_HUGE = 65504.0**2
# Rows at a time: bounds the memory besides the state.
_CHUNK = 1 << 20


class Forecast:
    """The forecast for a pool of rows: the shards of several tables, one after the other, on one device.

    Args:
        begins: where each shard begins, and as the last the number of rows.

    Attributes:
        before: int32 ``[rows]``, the running access counts when last observed.
        recent, lasting: float16 ``[rows]``, square roots of faded access counts, which end at some 2^32.
    """

    def __init__(self, begins: Sequence[int], device: torch.device) -> None:
        self.begins = list(begins)
        rows, tables = self.begins[-1], len(self.begins) - 1
        self.before = torch.zeros(rows, dtype=torch.int32, device=device)
        self.recent, self.lasting = (torch.zeros(rows, dtype=torch.float16, device=device) for _ in range(2))
        # Steps, faded as the counts are. What is by table is little, and float64 on the CPU.
        self._steps = torch.zeros(2, dtype=torch.float64)
        # Of each mixture: the three different entries of its normal matrix, and the two of its right side.
        self._normal = torch.zeros(tables, 5, dtype=torch.float64)
        self._mixture = torch.full((tables, 2), 0.5, dtype=torch.float64)
        # By class: rows times steps, look-ups that were forecast before correction, look-ups that came.
        self._tally = torch.zeros(3, tables, _CLASSES, dtype=torch.float64)

    @property
    def was_seen(self) -> Tensor:
        """bool ``[rows]``, which rows have been looked up so far."""
        return self.before != 0

    def observe(self, touches: Tensor, steps: int) -> None:
        """Take in the running access counts, int32 ``[rows]``, at a re-plan moment.

        ``steps``: how many were counted since the last call. Where one step in so many is counted, only those.
        """
        if steps < 1:
            return
        known, device = bool(self._steps[1]), touches.device
        mixture = self._mixture.float().T.to(device)
        moments = torch.zeros(len(self.begins) - 1, 2, 3, dtype=torch.float64, device=device)
        tally = torch.zeros(3, self._tally[0].numel(), dtype=torch.int64, device=device)
        # Rows that were never looked up know nothing but that: they are told by their number alone.
        seen = positions_of(touches != 0)
        tally[0].view(-1, _CLASSES)[:, 0] = self._unlisted(seen)
        for piece in self._pieces(seen):
            rows = piece.rows
            now = touches.index_select(0, rows)
            came = (now - self.before.index_select(0, rows)).clamp_(min=0)
            if known:
                recent, lasting = self._rates(rows)
                # A count varies by as much as it is; where few look-ups were seen, by that of one.
                weight = (recent + lasting).mul_(0.5).add_(1 / steps).reciprocal_()
                # float64: the two rates are at first so much alike that rounding would decide the mixture.
                rates = torch.stack([recent, lasting, came / steps]).double()
                weighted = rates[:2] * weight
                for table, begin, end in piece.tables:  # their sums do not depend on the order of a GPU's threads
                    moments[table] += weighted[:, begin:end] @ rates[:, begin:end].T
                tables = piece.table_of_rows(device)
                mixed = _mix(recent, lasting, mixture, tables)
                place = self._place(mixed).long().add_(tables, alpha=_CLASSES)
                forecast = mixed.mul_(steps * _PART).round_().long()
                for sums, part in zip(tally, (torch.ones_like(place), forecast, came.long()), strict=True):
                    sums.scatter_add_(0, place, part)
            for roots, fade in zip((self.recent, self.lasting), _FADE, strict=True):
                faded = roots.index_select(0, rows).float().square_().mul_(fade).add_(came)
                roots.index_copy_(0, rows, faded.clamp_(min=_TINY, max=_HUGE).sqrt_().half())
            self.before.index_copy_(0, rows, now)
        if known:
            self._normal = self._normal * _KEEP_MIXTURE + moments.flatten(1)[:, [0, 1, 4, 2, 5]].cpu()
            self._mixture = _solve(self._normal)
            unit = torch.tensor([steps, 1 / _PART, 1.0], dtype=torch.float64)
            self._tally = self._tally * _KEEP_CORRECTION + tally.view_as(self._tally).cpu() * unit[:, None, None]
        self._steps = self._steps * torch.tensor(_FADE, dtype=torch.float64) + steps

    def worth(self, of_rows: Tensor | None = None) -> Tensor:
        """float32 ``[n]``, look-ups a step that rows (int64 ``[n]``, ascending; None: all) can expect until the next
        re-plan."""
        device = self.before.device
        if of_rows is None:
            of_rows = torch.arange(self.begins[-1], device=device)
        worth = torch.zeros(of_rows.numel(), dtype=torch.float32, device=device)
        if not self._steps[1]:
            return worth
        exposure, forecast, came = self._tally
        mixture = self._mixture.float().T.to(device)
        unseen = (came[:, 0] / exposure[:, 0].clamp(min=1)).float().to(device)
        corrections = ((_blurred(came) + _PRIOR) / (_blurred(forecast) + _PRIOR)).float().view(-1).to(device)
        for piece in self._pieces(of_rows):
            recent, lasting = self._rates(piece.rows)
            tables = piece.table_of_rows(device)
            mixed = _mix(recent, lasting, mixture, tables)
            place = self._place(mixed)
            at = (place - 0.5).clamp_(1, _CLASSES - 1.01)
            low = at.long()  # from class to class linear: a jump would put rows into a wrong order
            at -= low
            low.add_(tables, alpha=_CLASSES)
            correction = torch.lerp(corrections.index_select(0, low), corrections.index_select(0, low.add_(1)), at)
            worth[piece.begin : piece.begin + piece.rows.numel()] = torch.where(
                place < 1, unseen.index_select(0, tables), mixed.mul_(correction)
            )
        return worth

    def lower(self, rows: Tensor, taken: Tensor) -> None:
        """Follow :meth:`RowCounts.lower_high`: ``taken`` (int32 ``[n]``) was taken off the counts of ``rows``."""
        self.before[rows] -= taken

    def state_dict(self) -> dict[str, Tensor]:
        """All that it knows; the tensors are its own, not copies."""
        names = ("before", "recent", "lasting", "_steps", "_normal", "_mixture", "_tally")
        return {name.lstrip("_"): getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on as what gave ``state`` would have. ValueError, and nothing loaded, where that had other tables."""
        own = self.state_dict()
        for name, tensor in own.items():
            found = list(state[name].shape) if name in state else "missing"
            if found != list(tensor.shape):
                raise ValueError(f"{name} is {found}; give a state with {list(tensor.shape)}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def _pieces(self, rows: Tensor) -> Iterator[_Piece]:
        """The rows (int64 ``[n]``, ascending) in pieces."""
        for begin in range(0, rows.numel(), _CHUNK):
            part = rows[begin : begin + _CHUNK]
            yield _Piece(begin, part, self._bounds(part))

    def _bounds(self, rows: Tensor) -> list[int]:
        """Where each table begins among ascending rows, and their number."""
        begins = torch.tensor(self.begins, device=rows.device)
        return torch.searchsorted(rows, begins).tolist()

    def _unlisted(self, rows: Tensor) -> Tensor:
        """int64 ``[tables]``, how many rows of each table are not among ``rows``."""
        all_rows, listed = torch.tensor(self.begins).diff(), torch.tensor(self._bounds(rows)).diff()
        return (all_rows - listed).to(rows.device)

    def _rates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """float32 ``[n]`` each, look-ups a step, recent and lasting."""
        recent, lasting = (roots.index_select(0, rows).float().square_() for roots in (self.recent, self.lasting))
        return recent.div_(float(self._steps[0])), lasting.div_(float(self._steps[1]))

    def _place(self, mixed: Tensor) -> Tensor:
        """float32 ``[n]``: the whole part is the class, the fraction where in it."""
        # By count, not rate: how far to trust a rate depends on how many look-ups it comes from.
        return (mixed * float(self._steps[1])).clamp_(min=_TINY).log2_().add_(_LEAST + 1).clamp_(0, _CLASSES - 1)


def _mix(recent: Tensor, lasting: Tensor, mixture: Tensor, tables: Tensor) -> Tensor:
    """float32 ``[n]``, the rates mixed as each row's table does: ``mixture`` is ``[2, tables]``. Takes ``recent``."""
    return recent.mul_(mixture[0].index_select(0, tables)).addcmul_(lasting, mixture[1].index_select(0, tables))


@dataclass(frozen=True)
class _Piece:
    """A piece of work: rows (int64 ``[n]``, ascending), the first of which is number ``begin`` of all; where each
    table's begin among them, and ``n``."""

    begin: int
    rows: Tensor
    bounds: list[int]

    @property
    def tables(self) -> list[tuple[int, int, int]]:
        """Of each table that has rows here, its number, and where its rows begin and end."""
        parts = enumerate(itertools.pairwise(self.bounds))
        return [(table, begin, end) for table, (begin, end) in parts if begin < end]

    def table_of_rows(self, device: torch.device) -> Tensor:
        """int64 ``[n]``."""
        lengths = torch.tensor(self.bounds).diff().to(device)
        tables = torch.arange(lengths.numel(), device=device)
        return tables.repeat_interleave(lengths, output_size=self.rows.numel())


def choose(worth: Tensor, hot: Tensor, capacity: int, *, keep: float = 1.1, margin: float = 0.0) -> Tensor:
    """The rows of most worth, where hot rows are preferred. Exact: of equals what is hot first, then the lower ids.

    Args:
        worth: float32 ``[rows]``, finite, at least 0.
        hot: bool ``[rows]``, which rows are hot now.
        capacity: how many may be.
        keep: a cold row has to be worth this many times what a hot one is to take its place ...
        margin: ... and so many look-ups a step more: the cost of moving a row over the steps in which it pays off.

    Returns:
        bool ``[rows]``, the new hot rows, ``min(capacity, rows)`` of them.
    """
    rows = worth.numel()
    if not 0 < capacity < rows:
        return torch.full_like(hot, capacity > 0)
    score = torch.where(hot, worth * keep + margin, worth)
    bar = score.topk(capacity, sorted=False).values.min()
    chosen, ties = score > bar, score == bar
    for some in (ties & hot, ties & ~hot):
        chosen[some.nonzero().squeeze(1)[: capacity - int(chosen.sum())]] = True
    return chosen


def _solve(normal: Tensor) -> Tensor:
    """float64 ``[tables, 2]``, each table's mixture, held to that of all tables as by as much traffic as its own."""
    total = normal.sum(dim=0, keepdim=True)
    size = (normal[:, 0] + normal[:, 2])[:, None]
    of_all = _least_squares(total)
    aa, ab, bb = total[0, :3]
    pull = torch.stack([aa, ab, bb, aa * of_all[0, 0] + ab * of_all[0, 1], ab * of_all[0, 0] + bb * of_all[0, 1]])
    own = _least_squares(normal + size / (aa + bb).clamp(min=1e-30) * pull)
    return torch.where(size > 0, own, of_all)


def _least_squares(normal: Tensor) -> Tensor:
    """float64 ``[n, 2]``, none of it negative."""
    aa, ab, bb, a, b = normal.T
    ridge = 1e-9 * (aa + bb) + 1e-30  # towards halves where the two rates are the same, as they are at first
    aa, bb, a, b = aa + ridge, bb + ridge, a + ridge / 2, b + ridge / 2
    determinant = aa * bb - ab * ab
    recent, lasting = (bb * a - ab * b) / determinant, (aa * b - ab * a) / determinant
    # Where one would be negative, the best has none of it.
    both = torch.where(lasting < 0, a / aa, recent), torch.where(recent < 0, b / bb, lasting)
    return torch.stack(both, dim=1).clamp_(min=0)


def _blurred(tally: Tensor) -> Tensor:
    """Half of each neighbouring class added: rows of about as many look-ups tell the same. Class 0 stays alone."""
    seen = torch.nn.functional.pad(tally[:, 1:], (1, 1))
    return torch.cat([tally[:, :1], seen[:, 1:-1] + (seen[:, :-2] + seen[:, 2:]) / 2], dim=1)
