"""The update filter: one TBE's forward, arranged so that its fused backward leaves stale rows out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_slipstream.staleness.compaction import Compaction
from torchrec_slipstream.staleness.selection import ALWAYS_LIVE
from torchrec_slipstream.tbe import sampling
from torchrec_slipstream.tbe.backward import SavedLookups, WeightGradient, prehook, scale_vbe, weight_gradient
from torchrec_slipstream.tbe.class_swap import swap_in, swap_out
from torchrec_slipstream.tbe.counting import LookupCounter
from torchrec_slipstream.tbe.finding import FoundTbe


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
        sampling: None, or how to sample the look-ups of rows that are not live: a :class:`Sampling`.
        watching: whether the coming backwards' gradient magnitudes are kept in ``magnitudes``.
        step: number of the coming step; sampling draws by it.
        skipped: int64 ``[features]``, look-ups whose update was left out.
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
        self._dims = [found.shards[t].dim for t in self.feature_table]
        self._feature_dims = torch.tensor(self._dims, dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros_like(self.lookups)

    def attach(self) -> None:
        """Make the TBE use this filter from its next forward on."""
        swap_in(self.tbe, self)

    def detach(self) -> None:
        """Make the TBE stock again. A backward that is still to come keeps what its forward decided."""
        swap_out(self.tbe)

    def set_patterns(self, rows: Tensor, patterns: Tensor) -> None:
        """Give ``rows`` (int64 ``[n]``, distinct) their ``patterns`` (uint8 ``[n]``); all other rows become live."""
        self.patterns.fill_(ALWAYS_LIVE)
        self.patterns[rows] = patterns
        self.any_stale = bool((patterns != ALWAYS_LIVE).any())

    def weights(self) -> list[Tensor]:
        """``[rows, dim]`` a shard, the current weights in their own dtype; views, not to be written to.

        Rows that FBGEMM's UVM cache holds are written back first.
        """
        self.tbe.flush()
        return self.tbe.split_embedding_weights()

    def squared_gradients(self) -> list[Tensor] | None:
        """The optimizer's sum of squared gradients, ``[rows]`` or ``[rows, dim]`` a shard (views), or None.

        Only the Adagrad family keeps a sum over a row's whole life; Adam's running mean is something else.
        """
        if self.tbe.optimizer not in (EmbOptimType.EXACT_ROWWISE_ADAGRAD, EmbOptimType.EXACT_ADAGRAD):
            return None
        return [states[0] for states in self.tbe.split_optimizer_states()]

    def choose_live(self, rows: Tensor) -> Tensor:
        """bool ``[N]``, which of the look-ups of ``rows`` (int64 ``[N]``, slots) are live."""
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

    # ----------------------------------------------------------------------------------------- one forward

    def forward(
        self,
        stock: Callable[..., Tensor],
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        feature_requires_grad: Tensor | None,
        batch_size_per_feature_per_rank: list[list[int]] | None,
        **more: Any,
    ) -> Tensor:
        """Run ``stock``, the TBE's own forward, so that its backward leaves out what is stale."""
        batch = dict(
            feature_requires_grad=feature_requires_grad,
            batch_size_per_feature_per_rank=batch_size_per_feature_per_rank,
            **more,
        )
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return stock(indices, offsets, per_sample_weights, **batch)
        if indices.numel() == 0:
            output = stock(indices, offsets, per_sample_weights, **batch)
            self.count_samples(offsets, batch_size_per_feature_per_rank)
            return output
        if not self.any_stale:
            output = stock(indices, offsets, per_sample_weights, **batch)
            self.observe(batch_size_per_feature_per_rank, want_rows=False)
            if self.watching and output.grad_fn is not None:
                layout = self._layout(batch_size_per_feature_per_rank, more)
                prehook(output, lambda gradient: self._watch(sampling.magnitudes(gradient, layout), gradient))
            return output
        if per_sample_weights is not None:
            # The cast that FBGEMM would do, done here so that the saved tensor is recognised by identity.
            per_sample_weights = per_sample_weights.float()
        weights_differentiable = per_sample_weights is not None and per_sample_weights.requires_grad
        weights = per_sample_weights.detach() if per_sample_weights is not None else None
        pooled = self.tbe.pooling_mode != PoolingMode.NONE
        if self.sampling is not None and weights is None and pooled:
            weights = torch.ones(indices.numel(), device=self.device)
        if weights is not None:
            # FBGEMM would compute the weights' gradient over the live look-ups only, in their shape.
            batch["feature_requires_grad"] = torch.zeros(len(self.feature_table), dtype=torch.int32, device=self.device)
        tbe = self.tbe
        saved = SavedLookups(tbe, weights)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            output = stock(indices, offsets, weights, **batch)
        if output.grad_fn is None:
            return output
        saved.check()
        rows, bounds = self.observe(batch_size_per_feature_per_rank, want_rows=True)
        live = self.choose_live(rows)
        if self.sampling is not None:
            layout = self._layout(batch_size_per_feature_per_rank, more)
            self._sample_in_backward(output, saved, live, bounds, per_sample_weights is not None, layout)
        else:
            saved.compaction = compaction = Compaction(live, tbe._offsets)
            self.skipped += bounds.diff() - compaction.live_before(bounds).diff()
            self._mend_gradient(output, compaction, weights, batch_size_per_feature_per_rank, more)
        if weights_differentiable:
            gradient = weight_gradient(tbe, feature_requires_grad, batch_size_per_feature_per_rank, more)
            output = WeightGradient.apply(output, per_sample_weights, gradient)
        return output

    def _mend_gradient(
        self,
        output: Tensor,
        compaction: Compaction,
        weights: Tensor | None,
        batch_sizes: list[list[int]] | None,
        more: dict[str, Any],
    ) -> None:
        """Let the backward's incoming gradient fit the compacted look-ups."""
        tbe = self.tbe
        if tbe.pooling_mode == PoolingMode.NONE:
            # A row of gradient a look-up: move those of live look-ups to the front. The shape must stay (autograd
            # checks it), but the rows behind are never read, so they are never written either.
            def to_front(gradient: Tensor) -> Tensor:
                moved = torch.empty_like(gradient, memory_format=torch.contiguous_format)
                torch.index_select(gradient, 0, compaction.positions, out=moved[: compaction.count])
                return moved

            prehook(output, to_front)
            return
        # With per-sample weights, FBGEMM's CPU backward does not divide by the length (its CUDA backward does).
        unscaled = weights is not None and self.device.type == "cpu"
        if tbe.pooling_mode != PoolingMode.MEAN or unscaled:
            return
        factor = compaction.mean_factor()
        if factor is None:
            return
        clip = tbe.optimizer_args.max_gradient if tbe.optimizer_args.gradient_clipping else None

        def mend(gradient: Tensor) -> Tensor:
            # FBGEMM clips the gradient it is given, which must be the full bag's.
            gradient = gradient if clip is None else gradient.clamp(-clip, clip)
            if batch_sizes is None:
                by_feature = factor.view(len(self.feature_table), -1).t()
                return gradient * torch.repeat_interleave(
                    by_feature, self._feature_dims, dim=1, output_size=gradient.shape[1]
                ).to(gradient.dtype)
            return scale_vbe(gradient, factor, self._layout(batch_sizes, more))

        prehook(output, mend)

    # ----------------------------------------------------------------------------------------- sampling

    def _layout(self, batch_sizes: list[list[int]] | None, more: dict[str, Any]) -> sampling.Layout:
        return sampling.Layout(self.tbe.pooling_mode, self._dims, batch_sizes, more.get("vbe_output_offsets"))

    def _watch(self, magnitudes: Tensor, gradient: Tensor) -> Tensor:
        self.magnitudes.append(magnitudes)
        return gradient

    def _sample_in_backward(
        self,
        output: Tensor,
        saved: SavedLookups,
        live: Tensor,
        bounds: Tensor,
        users_weights: bool,
        layout: sampling.Layout,
    ) -> None:
        """Decide in the backward, when the gradient is there, which stale look-ups are kept, and at what weight."""
        tbe, offsets, chosen, watching = self.tbe, self.tbe._offsets, self.sampling, self.watching
        assert chosen is not None
        step, draw = self.step, self._draws[1] + 1 if self._draws[0] == self.step else 0
        self._draws = (step, draw)
        name = self.shards[0].key

        def sample(gradient: Tensor) -> Tensor:
            magnitudes = sampling.magnitudes(gradient, layout)
            if watching:
                self.magnitudes.append(magnitudes)
            probability = sampling.kept_probability(magnitudes, chosen.scale, chosen.least)
            generator = sampling.generator_for(name, step, draw, self.device)
            kept = torch.rand(probability.shape, generator=generator, device=self.device) < probability
            # 0 for what is dropped, so that one expansion to the look-ups tells both.
            stands_for = sampling.of_lookups(torch.where(kept, 1.0 / probability, 0.0), offsets, layout, live.numel())
            # A second backward through a retained graph draws again, but these look-ups were seen once.
            again = saved.compaction is not None
            saved.compaction = compaction = Compaction(live | (stands_for > 0), offsets)
            if not again:
                self.skipped += bounds.diff() - compaction.live_before(bounds).diff()
            factor = torch.where(live, 1.0, stands_for)
            if tbe.pooling_mode == PoolingMode.NONE:
                moved = torch.empty_like(gradient, memory_format=torch.contiguous_format)
                kept_factor = compaction.take(factor)[:, None].to(gradient.dtype)
                torch.mul(compaction.take(gradient), kept_factor, out=moved[: compaction.count])
                return moved
            if tbe.pooling_mode == PoolingMode.MEAN:
                factor = factor * self._mean_weight(compaction, users_weights)
            saved.scale_weights(factor)
            return gradient

        prehook(output, sample)

    def _mean_weight(self, compaction: Compaction, users_weights: bool) -> Tensor:
        """What a look-up's weight in the backward must be for mean pooling, float32 ``[look-ups]``.

        Given weights, FBGEMM's CPU backward does not divide by the bag's length, its CUDA backward divides by the
        compacted one. (With the user's weights the stock CPU backward does not divide either.)
        """
        lengths = compaction.full_offsets.diff()
        if self.device.type == "cpu":
            of_bag = torch.ones(lengths.numel()) if users_weights else (1.0 / lengths.double()).float()
        else:
            of_bag = compaction.offsets().diff() / lengths.clamp(min=1)
        return torch.repeat_interleave(of_bag, lengths, output_size=compaction.lookups)
