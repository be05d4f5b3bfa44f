"""The update filter: one TBE's forward, arranged so that its fused backward leaves stale rows out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor, nn

from torchrec_slipstream.errors import AttachError, LookupRangeError
from torchrec_slipstream.staleness.compaction import Compaction
from torchrec_slipstream.staleness.selection import ALWAYS_LIVE
from torchrec_slipstream.tbe.backward import SavedLookups, WeightGradient, prehook, scale_vbe, weight_gradient
from torchrec_slipstream.tbe.finding import Attached, FoundTbe


class UpdateFilter:
    """Leaves the updates of stale rows out of one TBE's fused backward, and counts its look-ups.

    Args:
        found: the TBE with its shards. Nothing is changed until :meth:`attach`.

    Attributes:
        patterns: uint8 ``[rows of the TBE]``; bit ``phase`` of a row's byte says whether the row is live in the
            coming step. 255, always live, at first. Change it with :meth:`set_patterns`, between two steps.
        phase: which bit counts, 0 to 7.
        touches: int32 ``[rows of the TBE]``, look-ups of every row in the steps for which ``counting`` was True.
        counting: whether the coming steps are counted in ``touches``.
        lookups, skipped: int64 ``[features]``, look-ups seen by training steps, and those left out.
    """

    def __init__(self, found: FoundTbe) -> None:
        tbe = found.tbe
        self.tbe = tbe
        self.shards = found.shards
        self.device = tbe.current_device
        rows = sum(shard.rows for shard in found.shards)
        self.patterns = torch.full((rows,), ALWAYS_LIVE, dtype=torch.uint8, device=self.device)
        self.phase = 0
        self.touches = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self.counting = False
        self.any_stale = False
        self.feature_table: list[int] = list(tbe.feature_table_map)
        features = len(self.feature_table)
        self._feature_begin = torch.tensor(
            [found.shards[t].row_begin for t in self.feature_table], dtype=torch.int64, device=self.device
        )
        self._feature_dims = torch.tensor(
            [found.shards[t].dim for t in self.feature_table], dtype=torch.int64, device=self.device
        )
        self.lookups = torch.zeros(features, dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros(features, dtype=torch.int64, device=self.device)

    def attach(self) -> None:
        """Make the TBE use this filter from its next forward on."""
        if isinstance(self.tbe, Attached):
            raise AttachError("a Slipstream session is attached to this TBE already; detach() it first")
        self.tbe.__dict__["_slipstream"] = self
        self.tbe.__class__ = _filtered_class(type(self.tbe))

    def detach(self) -> None:
        """Make the TBE stock again. A backward that is still to come keeps what its forward decided."""
        if isinstance(self.tbe, Attached):
            self.tbe.__class__ = _stock_class(type(self.tbe))
            del self.tbe.__dict__["_slipstream"]

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
        """bool ``[N]``, which of the look-ups of ``rows`` (int64 ``[N]`` in the TBE's row space) are live."""
        word = self.patterns.index_select(0, rows)
        return word.bitwise_and_(1 << self.phase).ne_(0).view(torch.bool)

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
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or indices.numel() == 0:
            return stock(indices, offsets, per_sample_weights, **batch)
        if not self.any_stale:
            output = stock(indices, offsets, per_sample_weights, **batch)
            self._observe()
            return output
        if per_sample_weights is not None:
            # The cast that FBGEMM would do, done here so that the saved tensor is recognised by identity.
            per_sample_weights = per_sample_weights.float()
        weights_differentiable = per_sample_weights is not None and per_sample_weights.requires_grad
        weights = per_sample_weights.detach() if per_sample_weights is not None else None
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
        rows, bounds = self._observe()
        saved.compaction = compaction = Compaction(self.choose_live(rows), tbe._offsets)
        self.skipped += bounds.diff() - compaction.live_before(bounds).diff()
        self._mend_gradient(output, compaction, weights, batch_size_per_feature_per_rank, more)
        if weights_differentiable:
            gradient = weight_gradient(tbe, feature_requires_grad, batch_size_per_feature_per_rank, more)
            output = WeightGradient.apply(output, per_sample_weights, gradient)
        return output

    def explain(self, indices: Tensor, offsets: Tensor, batch_sizes: list[list[int]] | None) -> str | None:
        """If a look-up is out of its table's range, a message that says which; FBGEMM's own names neither."""
        if self.device.type != "cpu":
            return None  # the device's assertion has left it unusable
        features = len(self.feature_table)
        bags = (offsets.numel() - 1) // features
        ends = 0
        for feature, table in enumerate(self.feature_table):
            begins, ends = ends, ends + (bags if batch_sizes is None else sum(batch_sizes[feature]))
            looked_up = indices[int(offsets[begins]) : int(offsets[ends])]
            shard = self.shards[table]
            bad = looked_up[(looked_up < 0) | (looked_up >= shard.rows)]
            if bad.numel():
                return (
                    f"table {shard.table}: look-up of row {int(bad[0])}, but it has rows 0 to {shard.rows - 1} on "
                    "this rank. Nothing was updated. Hash or clip the ids into the table's range."
                )
        return None

    def _observe(self) -> tuple[Tensor, Tensor]:
        """Count the look-ups of the forward just run; their rows in the TBE's row space, and feature bounds."""
        # What FBGEMM made of the arguments: casts done, out-of-range indices put right by its bounds check.
        indices, offsets = self.tbe._indices, self.tbe._offsets
        bag_bounds = self.tbe._vbe_B_offsets
        if bag_bounds is not None and bag_bounds.numel() > 0:
            bounds = offsets.index_select(0, bag_bounds)
        else:
            bounds = offsets[:: max(1, (offsets.numel() - 1) // len(self.feature_table))]
        lengths = bounds.diff()
        self.lookups += lengths
        rows = bounds
        if self.any_stale or self.counting:
            rows = torch.repeat_interleave(self._feature_begin, lengths, output_size=indices.numel())
            rows += indices
        if self.counting:
            one = torch.ones((), dtype=torch.int32, device=self.device)
            self.touches.scatter_add_(0, rows, one.expand(rows.numel()))
        return rows, bounds

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
            return scale_vbe(gradient, factor, batch_sizes, self._feature_dims, more.get("vbe_output_offsets"))

        prehook(output, mend)


class _FilteredTbe(Attached):
    """Mixin that the TBE's class gets while attached."""

    _slipstream: UpdateFilter

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
        total_unique_indices: int | None = None,
        **more: Any,
    ) -> Tensor:
        try:
            return self._slipstream.forward(
                super().forward,  # type: ignore[misc]  # the TBE's own class comes next in the order of resolution
                indices,
                offsets,
                per_sample_weights,
                feature_requires_grad,
                batch_size_per_feature_per_rank,
                **more,
            )
        except RuntimeError as error:
            why = self._slipstream.explain(indices, offsets, batch_size_per_feature_per_rank)
            if why is None:
                raise
            raise LookupRangeError(why) from error

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise AttachError("a TBE with a Slipstream session attached cannot be copied; detach() the session first")


_CLASSES: dict[type, type] = {}


def _filtered_class(stock: type) -> type:
    if stock not in _CLASSES:
        _CLASSES[stock] = type(f"Slipstream{stock.__name__}", (_FilteredTbe, stock), {"__module__": __name__})
    return _CLASSES[stock]


def _stock_class(filtered: type) -> type:
    return filtered.__bases__[1]
