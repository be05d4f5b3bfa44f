"""One TBE's part in a forward, run so that its backward can be cut down to some of its look-ups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from torch import Tensor

from torchrec_slipstream.tbe.backward import (
    Beginning,
    SavedLookups,
    WeightGradient,
    Whole,
    clipped,
    prehook,
    scale_bags,
    weight_gradient,
)
from torchrec_slipstream.tbe.compaction import Compaction
from torchrec_slipstream.tbe.finding import TBE
from torchrec_slipstream.tbe.routing import ScaleBags, Side
from torchrec_slipstream.tbe.sampling import Layout


@dataclass(frozen=True)
class Call:
    """The arguments of a TBE's forward; ``more`` are those that only newer versions have, by name.

    ``gathers``: False where the output is not wanted, but only the backward: FBGEMM's forward is then run over empty
    bags, and its backward is shown these look-ups (``deferred.py``).
    """

    indices: Tensor
    offsets: Tensor
    weights: Tensor | None
    feature_requires_grad: Tensor | None
    batch_sizes: list[list[int]] | None
    more: dict[str, Any] = field(default_factory=dict)
    gathers: bool = True

    def run(self, forward: Callable[..., Tensor]) -> Tensor:
        return forward(
            self.indices,
            self.offsets,
            self.weights,
            feature_requires_grad=self.feature_requires_grad,
            batch_size_per_feature_per_rank=self.batch_sizes,
            **self.more,
        )

    def of_side(self, side: Side, *, first: bool) -> Call:
        """The same for the look-ups of one side; only the ``first`` writes into the output that the caller allocated.

        That one holds other TBEs' outputs as well: the second side's, to be added to it, has zeros there.
        """
        weights = side.of_batch(self.weights) if self.weights is not None else None
        more = self.more
        if not first and (shared := more.get("vbe_output")) is not None:
            more = more | {"vbe_output": torch.zeros_like(shared)}
        return replace(self, indices=side.indices, offsets=side.offsets, weights=weights, more=more)

    def emptied(self, pooling: PoolingMode) -> Call:
        """As many bags, all empty, so that the output has this call's shape.

        FBGEMM recognisably saves only tensors that have elements, hence the index behind the last bag. It is never
        read; -1 is what FBGEMM's prefetch passes over (``preparing.py``).
        """
        count = self.indices.numel() if pooling == PoolingMode.NONE else 1
        weights = self.weights.new_zeros(count) if self.weights is not None else None
        indices = torch.full((count,), -1, dtype=self.indices.dtype, device=self.indices.device)
        return replace(self, indices=indices, offsets=torch.zeros_like(self.offsets), weights=weights)


class Part:
    """One TBE's part in a forward.

    Args:
        forward: the TBE's own.
        call: its look-ups.
        layout: of its output.
        side: where they are one side of a batch.
        cuts: whether look-ups will be left out of the backward.
        samples: whether those that stay will count for others.
    """

    def __init__(
        self,
        tbe: TBE,
        forward: Callable[..., Tensor],
        call: Call,
        layout: Layout,
        *,
        side: Side | None = None,
        cuts: bool,
        samples: bool,
    ) -> None:
        self.tbe = tbe
        self._forward = forward
        self._call = call
        self._layout = layout
        self._side = side
        self._on_cpu = call.indices.device.type == "cpu"  # where FBGEMM's kernels have other habits
        # The padding behind one side's look-ups has to be cut off.
        self._is_padded = side is not None and side.chosen.is_padded
        self._cuts = cuts
        self._hooked = cuts or not call.gathers or (self._is_padded and torch.is_grad_enabled())
        self._samples = samples
        self._users_weights = call.weights is not None
        self._saved: SavedLookups | None = None
        self._compaction: Compaction | None = None
        self._row_factor: Tensor | None = None
        self._offsets: Tensor | None = None
        self._node: Any = None

    # ------------------------------------------------------------------------------------- the forward

    def run(self) -> Tensor:
        """The TBE's output, of a side of a mean-pooled batch scaled to its part of the bags."""
        output = self._run_hooked() if self._hooked else self._call.run(self._forward)
        self._node = output.grad_fn
        if self._side is not None and self._layout.pooling == PoolingMode.MEAN:
            output = self._part_of_mean(output, self._side.chosen)
        if self._hooked and output.grad_fn is not None:
            output = self._with_weight_gradient(output)
        return output

    def _run_hooked(self) -> Tensor:
        call = self._call
        users = call.weights
        weights = None
        if users is not None:
            # The cast that FBGEMM would do, done here so that the saved tensor is recognised by identity.
            users = users.float()
            weights = users.detach()
        elif self._samples and self._layout.pooling != PoolingMode.NONE:
            weights = torch.ones(call.indices.numel(), device=call.indices.device)
        wanted = call.feature_requires_grad
        if weights is not None:
            # FBGEMM would compute the weights' gradient over the kept look-ups only, in their shape.
            wanted = torch.zeros(len(self._layout.dims), dtype=torch.int32, device=call.indices.device)
        run = call = replace(call, weights=weights, feature_requires_grad=wanted)
        shown: dict[str, Tensor | None] = {}
        if not call.gathers:
            run = call.emptied(self._layout.pooling)
            shown = {"indices": call.indices, "offsets": call.offsets, "weights": weights}
        self._saved = saved = SavedLookups(self.tbe, run.weights, are_ones=not self._users_weights, shown=shown)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            output = run.run(self._forward)
        if output.grad_fn is None:
            return output
        saved.check()
        self._offsets = self.tbe._offsets if call.gathers else call.offsets
        if not call.gathers:
            saved.cut = Whole(call.offsets)
        if self._is_padded and self._side is not None:
            saved.cut = Beginning(self._side.chosen, self._offsets)
        return output

    def _with_weight_gradient(self, output: Tensor) -> Tensor:
        """The output, with a gradient for the per-sample weights: from the bag's whole gradient, as FBGEMM's is."""
        call = self._call
        if call.weights is None or not call.weights.requires_grad:
            return output
        gradient = weight_gradient(self.tbe, call.feature_requires_grad, call.batch_sizes, call.more)
        if self._side is not None and self._is_padded:
            gradient = _without_padding(gradient, self._side.chosen)
        return WeightGradient.apply(output, call.weights.float(), gradient)

    def _part_of_mean(self, output: Tensor, chosen: Compaction) -> Tensor:
        factor = chosen.mean_factor()
        if factor is None:
            return output
        backward = True
        if self._users_weights and self._on_cpu:
            # FBGEMM's CPU does not divide weighted bags by their length: in its backward, and for 16-bit outputs.
            if self.tbe.output_dtype != SparseType.FP32.as_int():
                return output
            backward = False
        return ScaleBags.apply(output, factor, self._layout, self.tbe, backward)

    # ------------------------------------------------------------------------------------- the backward

    def cut(self, live: Tensor, bounds: Tensor, factor: Tensor | None = None) -> Tensor:
        """Leave all but the live look-ups out of the backward.

        Args:
            live: bool ``[N]``, one a look-up of the batch.
            bounds: ``[features + 1]``, where the batch's features begin.
            factor: float32 ``[N]``, what the live ones count for; None: 1.

        Returns:
            ``[features]``, look-ups left out.
        """
        assert self._saved is not None
        if self._side is not None:
            bounds = self._side.bounds
            live = self._side.of_batch(live)
            if (valid := self._side.chosen.valid) is not None:
                live = live & valid
            factor = self._side.of_batch(factor) if factor is not None else None
        assert self._offsets is not None
        self._compaction = compaction = Compaction.of(live, self._offsets)
        self._saved.cut = compaction
        self._row_factor = factor
        if factor is not None and self._layout.pooling != PoolingMode.NONE:
            if self._layout.pooling == PoolingMode.MEAN:
                factor = factor * self._mean_weight(compaction)
            self._saved.scale_weights(factor)
        return bounds.diff() - compaction.live_before(bounds).diff()

    def after_backward(self, then: Callable[[], None]) -> None:
        """Call ``then`` when the TBE's backward has run. Before :meth:`fit_gradient`."""
        if self._node is not None:
            self._node.register_hook(lambda _inputs, _outputs: then())

    def fit_gradient(self) -> None:
        """Let the gradient that enters the TBE's backward fit what :meth:`cut` left, or will have left by then."""
        if self._layout.pooling != PoolingMode.SUM:
            prehook(self._node, self._fit)
        self._node = None  # which holds us, and we must not hold it

    def _fit(self, gradient: Tensor) -> Tensor:
        """Let the incoming gradient fit the compacted look-ups."""
        compaction, factor = self._compaction, self._row_factor
        assert compaction is not None
        if self._layout.pooling == PoolingMode.NONE:
            # A row of gradient a look-up: move those of live look-ups to the front. The shape must stay (autograd
            # checks it), but the rows behind are never read, so they are never written either.
            moved = torch.empty_like(gradient, memory_format=torch.contiguous_format)
            front = moved[: compaction.count]
            if factor is None:
                torch.index_select(gradient, 0, compaction.positions, out=front)
            else:
                torch.mul(compaction.take(gradient), compaction.take(factor)[:, None].to(gradient.dtype), out=front)
            return moved
        # With per-sample weights, FBGEMM's CPU backward does not divide by the length (its CUDA backward does).
        if factor is not None or (self._users_weights and self._on_cpu):
            return gradient
        of_bag = compaction.mean_factor()
        if of_bag is None:
            return gradient
        return scale_bags(clipped(self.tbe, gradient), of_bag, self._layout)

    def _mean_weight(self, compaction: Compaction) -> Tensor:
        """What a look-up's weight in the backward must be for mean pooling, float32 ``[look-ups]``.

        Given weights, FBGEMM's CPU backward does not divide by the bag's length, its CUDA backward divides by the
        compacted one. (With the user's weights the stock CPU backward does not divide either.)
        """
        lengths = compaction.full_offsets.diff()
        if self._on_cpu:
            of_bag = torch.ones(lengths.numel()) if self._users_weights else (1.0 / lengths.double()).float()
        else:
            of_bag = compaction.offsets().diff() / lengths.clamp(min=1)
        if self._is_padded:  # which counts as one more bag
            padding = compaction.lookups - compaction.full_offsets[-1:]
            lengths, of_bag = torch.cat([lengths, padding]), torch.cat([of_bag, torch.zeros_like(of_bag[:1])])
        return torch.repeat_interleave(of_bag, lengths, output_size=compaction.lookups)


def _without_padding(gradient: Callable[[Tensor], Tensor], chosen: Compaction) -> Callable[[Tensor], Tensor]:
    def masked(grad_output: Tensor) -> Tensor:
        values, valid = gradient(grad_output), chosen.valid
        return values if valid is None else torch.where(valid, values, 0.0)

    return masked
