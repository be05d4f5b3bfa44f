"""The update filter: one TBE's forward, arranged so that its fused backward leaves stale rows out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_slipstream.tbe import sampling
from torchrec_slipstream.tbe.backing import BackingRows
from torchrec_slipstream.tbe.backward import prehook
from torchrec_slipstream.tbe.class_swap import swap_in, swap_out
from torchrec_slipstream.tbe.counting import CheckedBatch, LookupCounter
from torchrec_slipstream.tbe.finding import TBE, FoundTbe
from torchrec_slipstream.tbe.overlay import Overlay
from torchrec_slipstream.tbe.part import Call, Part
from torchrec_slipstream.tbe.preparing import bounds_unchecked, checked_call, take_prefetched
from torchrec_slipstream.tbe.routing import Side, merge, route
from torchrec_slipstream.tbe.sampling import Layout
from torchrec_slipstream.tbe.stopwatch import Stopwatch

if TYPE_CHECKING:
    from torchrec_slipstream.tbe.deferred import Deferral

ALWAYS_LIVE = 255
"""The pattern of a row that is live in every step."""


@dataclass(frozen=True)
class Sampling:
    """Keep a stale look-up with probability ``clamp(scale * magnitude, least, 1)``; see ``tbe/sampling.py``."""

    scale: float
    least: float


class UpdateFilter(LookupCounter):
    """Leaves the updates of stale rows out of one TBE's fused backward, and counts its look-ups.

    Args:
        found: the TBE with its shards. Nothing is changed until :meth:`attach`.
        fades: whether the counts will be halved now and then.

    Attributes:
        patterns: uint8 ``[slots]``; bit ``phase`` of a row's byte says whether the row is live in the coming step. 255,
            always live, at first. Change it with :meth:`set_patterns`, between two steps.
        phase: which bit counts, 0 to 7.
        active: whether the coming forwards leave out what is stale; False lets them run stock, whatever the patterns.
        sampling: None, or how to sample the look-ups of rows that are not live: a :class:`Sampling`.
        watching: whether the coming backwards' gradient magnitudes are kept in ``magnitudes``.
        step: number of the coming step; sampling draws by it.
        overlay: where hot rows are; None: the TBE has all rows itself. Set it before :meth:`attach`.
        deferred: while the updates of micro-batches are put off: what keeps their look-ups and gradients.
        offered: int64 ``[features]``, look-ups of all training forwards while it was active.
        skipped: int64 ``[features]``, look-ups whose update was left out.
        stopwatch: times the coming forwards and their backwards; None: nothing does.
        end_session: while attached: detaches all of the session that this filter is of. None: it is alone.
    """

    def __init__(self, found: FoundTbe, *, fades: bool = False) -> None:
        super().__init__(found, fades=fades)
        self.patterns = torch.full((self.touches.numel(),), ALWAYS_LIVE, dtype=torch.uint8, device=self.device)
        self.phase = 0
        self.sampling: Sampling | None = None
        self.watching = False
        self.magnitudes: list[Tensor] = []
        self.step = 0
        self._draws = (0, 0)
        self.any_stale = False
        self.active = True
        self._dims = [found.shards[t].dim for t in self.feature_table]
        self.offered = torch.zeros_like(self.lookups)
        self.skipped = torch.zeros_like(self.lookups)
        self.stopwatch: Stopwatch | None = None
        self.overlay: Overlay | None = None
        self.deferred: Deferral | None = None
        self._rows = BackingRows(self.tbe)
        self.end_session: Callable[[], None] | None = None
        self._compiled = self._warned = False  # a training forward was traced; and that was said

    def attach(self, end_session: Callable[[], None] | None = None) -> None:
        """Make the TBE use this filter from its next forward on."""
        swap_in(self.tbe, self)
        self.end_session = end_session

    def detach(self) -> None:
        """Make the TBE stock again, all rows in it. A backward that is still to come keeps what its forward decided.

        With an overlay, one that is still to come is refused: it would update hot rows that are back already.
        """
        if self.overlay is not None:
            self.overlay.release(for_good=True)
        swap_out(self.tbe)
        self.stopwatch = None
        self.end_session = None  # or it would keep the session for as long as the collector likes

    def set_patterns(self, rows: Tensor, patterns: Tensor) -> None:
        """Give ``rows`` (int64 ``[n]``, distinct) their ``patterns``: uint8 ``[n]``, or ``[]``, one for all of them.

        All other rows become live.
        """
        self.patterns.fill_(ALWAYS_LIVE)
        self.patterns[rows] = patterns
        self.any_stale = rows.numel() > 0 and bool((patterns != ALWAYS_LIVE).any())

    def weights(self, place: int, rows: Tensor) -> Tensor:
        """``[n, dim]``, current weights of a shard's ``rows`` (int64 ``[n]``), wherever they are, in their dtype."""
        holder = self._rows if self.overlay is None else self.overlay
        return holder.look(place, rows, 0)

    @property
    def has_squared_gradients(self) -> bool:
        """Whether the optimizer keeps a sum of squared gradients over a row's whole life: the Adagrad family.

        Adam's running mean is something else.
        """
        return self.tbe.optimizer in (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD)

    def squared_gradients(self, place: int, rows: Tensor) -> Tensor:
        """The optimizer's sum of squared gradients of a shard's ``rows`` (int64 ``[n]``): ``[n]`` or ``[n, dim]``."""
        holder = self._rows if self.overlay is None else self.overlay
        return holder.look(place, rows, 1)

    def choose_live(self, rows: Tensor) -> Tensor:
        """bool ``[N]``, which of the look-ups of ``rows`` (int64 ``[N]``, slots) are live."""
        if self.device.type == "cpu":  # where a call of numpy's costs half of torch's
            return torch.from_numpy(self.patterns.numpy().take(rows.numpy()) & np.uint8(1 << self.phase) != 0)
        word = self.patterns.index_select(0, rows)
        return word.bitwise_and_(1 << self.phase).ne_(0).view(torch.bool)

    @property
    def can_sample(self) -> bool:
        """Whether look-ups can be given weights in the backward without changing the forward.

        A pooled look-up's weight travels as FBGEMM's per-sample weight, 1 in the forward: exact, but for mean pooling
        into a 16-bit output on a CPU, where weights switch FBGEMM's division by the length off.
        """
        tbe = self.tbe
        half_mean = tbe.pooling_mode == PoolingMode.MEAN and tbe.output_dtype != SparseType.FP32.as_int()
        return not (half_mean and self.device.type == "cpu")

    @property
    def caches_rows(self) -> bool:
        """Whether FBGEMM copies rows that are looked up into a cache of its own, and others out of it."""
        return bool(self.tbe.lxu_cache_weights.numel() > 0)

    def warn_if_compiled(self) -> None:
        """Warn, once, if a training forward was traced by torch.compile: it ran stock. Call from the session's step,
        which the user calls."""
        if self._compiled and not self._warned:
            self._warned = True
            tables = ", ".join(sorted({shard.table for shard in self.shards}))
            warnings.warn(
                f"table(s) {tables}: torch.compile has traced the look-ups, which are therefore neither counted nor is "
                "any update of theirs left out. Compile the dense part of the model only, or decorate the method that "
                "calls the embeddings with torch.compiler.disable",
                stacklevel=3,
            )

    # ----------------------------------------------------------------------------------------- one forward

    @property
    def leaves_out(self) -> bool:
        """Whether a training forward now would leave updates out of its backward."""
        return self.any_stale and self.active

    def forward(self, stock: Callable[..., Tensor], call: Call) -> Tensor:
        """Run ``stock``, the TBE's own forward, so that its backward leaves out what is stale."""
        if self.stopwatch is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._forward(stock, call)
        with self.stopwatch.forward():
            return self._forward(stock, call)

    def _forward(self, stock: Callable[..., Tensor], call: Call) -> Tensor:
        training = torch.is_grad_enabled()
        if training and self.deferred is not None:
            return self.deferred.hold(stock, call)
        if torch.compiler.is_compiling():
            if self.overlay is not None:
                raise RuntimeError("torch.compile cannot trace a TBE with hot rows; detach() first, or compile less")
            if training:
                self._compiled = True  # a warning cannot be traced: warn_if_compiled gives it
            return call.run(stock)
        if call.indices.numel() == 0 or (not training and self.overlay is None):
            output = call.run(stock)
            if training:
                self.count_samples(call.offsets, call.batch_sizes)
            return output
        layout = Layout(self.tbe.pooling_mode, self._dims, call.batch_sizes, call.more.get("vbe_output_offsets"))
        rows = None
        if self.overlay is None:
            parts, output, batch = self._run_alone(stock, call, layout)
        else:
            parts, output, batch, rows = self._run_both(stock, call, layout, self.overlay)
        if not training:
            return output
        if rows is None and self.leaves_out:
            rows = self.rows_of(batch)
        self.observe(batch, call.batch_sizes, rows=rows)
        if self.active:
            self.offered += batch.lengths
        if output.grad_fn is None:
            return output
        if self.stopwatch is not None:
            span = self.stopwatch.backward()
            output.grad_fn.register_prehook(lambda _gradients: span.start())  # before the hooks below
            for part in parts:
                part.after_backward(span.stop)
        if not self.leaves_out:
            if self.watching:
                prehook(output.grad_fn, lambda gradient: self._watch(sampling.magnitudes(gradient, layout), gradient))
            return output
        assert rows is not None
        live = self.choose_live(rows)
        if self.sampling is not None:
            self._sample_in_backward(output, parts, live, batch, layout)
            return output
        for part in parts:
            self.skipped += part.cut(live, batch.bounds)
            part.fit_gradient()
        return output

    def _part(
        self, tbe: TBE, forward: Callable[..., Tensor], call: Call, layout: Layout, side: Side | None = None
    ) -> Part:
        cuts = self.leaves_out and torch.is_grad_enabled()
        return Part(tbe, forward, call, layout, side=side, cuts=cuts, samples=self.sampling is not None)

    def _run_alone(
        self, stock: Callable[..., Tensor], call: Call, layout: Layout
    ) -> tuple[list[Part], Tensor, CheckedBatch]:
        if call.gathers:
            part = self._part(self.tbe, stock, call, layout)
            return [part], part.run(), self.checked()
        call, batch = checked_call(self, call)
        part = self._part(self.tbe, stock, call, layout)
        with bounds_unchecked(self.tbe):
            return [part], part.run(), batch

    def _run_both(
        self, stock: Callable[..., Tensor], call: Call, layout: Layout, overlay: Overlay
    ) -> tuple[list[Part], Tensor, CheckedBatch, Tensor | None]:
        """The forward of a TBE with an overlay: its parts, output, look-ups, and their slots where they are known."""
        tbe = self.tbe
        overlay.hold()
        call, batch = checked_call(self, call)
        numbers = overlay.space.of_lookups(batch.indices, batch.lengths)
        cold, hot = route(batch, overlay.words.index_select(0, numbers))
        take_prefetched(tbe, cold)
        with bounds_unchecked(tbe):
            parts = [self._part(tbe, stock, call.of_side(cold, first=True), layout, cold)]
            output = parts[0].run()
        overlay.follow()
        if not hot.is_empty:
            parts.append(self._part(overlay.tbe, overlay.tbe, call.of_side(hot, first=False), layout, hot))
            output = merge(output, parts[1].run(), cold, hot, layout)
        if torch.is_grad_enabled():
            overlay.hits += hot.bounds.diff()
            if output.grad_fn is not None:
                prehook(output.grad_fn, overlay.before_backward())
        return parts, output, batch, numbers if overlay.space.own == self.space.own else None

    # ----------------------------------------------------------------------------------------- sampling

    def _watch(self, magnitudes: Tensor, gradient: Tensor) -> Tensor:
        self.magnitudes.append(magnitudes)
        return gradient

    def _sample_in_backward(
        self, output: Tensor, parts: list[Part], live: Tensor, batch: CheckedBatch, layout: Layout
    ) -> None:
        """Decide in the backward, when the gradient is there, which stale look-ups are kept, and at what weight."""
        chosen, watching = self.sampling, self.watching
        assert chosen is not None
        step, draw = self.step, self._draws[1] + 1 if self._draws[0] == self.step else 0
        self._draws = (step, draw)
        name = self.shards[0].key
        seen = False

        def sample(gradient: Tensor) -> Tensor:
            nonlocal seen
            magnitudes = sampling.magnitudes(gradient, layout)
            if watching:
                self.magnitudes.append(magnitudes)
            probability = sampling.kept_probability(magnitudes, chosen.scale, chosen.least)
            generator = sampling.generator_for(name, step, draw, self.device)
            stands_for = sampling.stands_for(probability, generator)
            kept, factor = sampling.factors(sampling.of_lookups(stands_for, batch.offsets, layout, live.numel()), live)
            for part in parts:
                left_out = part.cut(kept, batch.bounds, factor)
                # A second backward through a retained graph draws again, but these look-ups were seen once.
                if not seen:
                    self.skipped += left_out
            seen = True
            return gradient

        prehook(output.grad_fn, sample)
        for part in parts:  # after the decision
            part.fit_gradient()
