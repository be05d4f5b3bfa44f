"""Deferred updates: several micro-batches of one batch make one fused update, as the whole batch would.

FBGEMM updates the rows in the backward, so that a batch trained in two parts would be updated twice. Here a TBE's
forward gives the stock output without a graph, and an autograd function of ours that only keeps the gradient which
comes back. When all parts are through, their look-ups and gradients are put together in the order of the whole batch,
and one forward and backward of it are run whose forward gathers nothing (``Call.gathers``): FBGEMM runs over as many
bags, all empty, and its backward is shown the joint look-ups instead, by the hooks that the update filter uses anyway.
So the update is the stock one of the whole batch, bit for bit where the gradients are; what the filter decides (stale
rows, sampling, counts, hot rows) it decides once, on the joint batch; and no row changes before all parts succeeded.

(Why the forward has the joint batch's bags: autograd refuses a gradient of another shape than the output's, also from
a node's prehook. Why not the last part's own forward: it may lack look-ups, of which FBGEMM then saves nothing to
recognise, on one of an overlay's two sides above all.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed.embedding_kernel import BaseEmbedding
from torchrec.optim.fused import FusedOptimizerModule

from torchrec_slipstream.errors import AttachError, InputError
from torchrec_slipstream.tbe.finding import TBE, Attached, modules_of
from torchrec_slipstream.tbe.joining import join, put_together
from torchrec_slipstream.tbe.part import Call
from torchrec_slipstream.tbe.update_filter import UpdateFilter
from torchrec_slipstream.tbe.versions import check_overlay


def check_can_defer(model: nn.Module, filters: Sequence[UpdateFilter]) -> None:
    """Raises AttachError unless all fused updates of ``model`` are the filters', and can be deferred."""
    attached = {id(one.tbe) for one in filters}
    for path, module in modules_of(model):
        tbe = getattr(module, "emb_module", None) if isinstance(module, BaseEmbedding) else module
        is_kernel = isinstance(module, BaseEmbedding) and isinstance(module, FusedOptimizerModule)
        if (is_kernel or isinstance(module, SplitTableBatchedEmbeddingBagsCodegen)) and id(tbe) not in attached:
            raise AttachError(
                f"the tables of {path} are not the session's (exclude_tables), so they would be updated once for each "
                "micro-batch; attach them as well, with StalenessConfig(target_share=0) if none may skip updates"
            )
    for one in filters:
        tbe, tables = one.tbe, ", ".join(sorted({shard.table for shard in one.shards}))
        check_overlay(tbe)
        if tbe.prefetch_pipeline:
            raise AttachError(
                f"table(s) {tables}: prefetch_pipeline=True moves cache locations with every prefetched batch, which "
                "two micro-batches in one step do not go with; build the tables without"
            )
        if tbe.use_writeback_bwd_prehook or tbe.enable_raw_embedding_streaming:
            raise AttachError(
                f"table(s) {tables}: FBGEMM's write-back hook and its streaming of rows look at the last forward's "
                "batch, and would miss the first micro-batch; switch them off"
            )


class DeferredUpdates:
    """The updates of a model's TBEs, put off while this context is entered.

    ::

        with DeferredUpdates(filters) as updates:
            for micro_batch in micro_batches:
                updates.next_micro_batch()
                ...                                   # its forward, and its backward now or later
            updates.apply(positions)

    Without :meth:`apply`, as after an error, nothing is updated or counted.

    Raises:
        AttachError: on entering, if a filter is not attached any more.
    """

    def __init__(self, filters: Sequence[UpdateFilter]) -> None:
        self._deferred = [Deferral(one) for one in filters]

    def __enter__(self) -> DeferredUpdates:
        if not all(isinstance(one.filter.tbe, Attached) for one in self._deferred):
            raise AttachError(
                "the session was detached, so the tables would be updated once for each micro-batch; call backward() "
                "on the loss yourself, or attach anew"
            )
        for one in self._deferred:
            if one.filter.overlay is not None:
                one.filter.overlay.hold()  # or the first forward would, beside which others may read
            one.filter.deferred = one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        for one in self._deferred:
            one.filter.deferred = None

    def next_micro_batch(self) -> None:
        """The forwards to come are of another micro-batch."""
        for one in self._deferred:
            one.micro_batches.append([])

    def check_calls(self) -> None:
        """Raises InputError if a TBE was called more often in one micro-batch than in another. For after the last
        forward, where no gradient is there yet; :meth:`apply` checks it as well."""
        for one in self._deferred:
            one.check_calls()

    def apply(self, positions: Sequence[Tensor]) -> None:
        """Update all rows, once.

        Args:
            positions: int64 ``[n]`` for each micro-batch: where its samples are in the whole batch (of all ranks, one
                behind another). They decide the order in which gradients are added up, and no more; a TBE whose bags
                are not the batch's samples takes the micro-batches one behind another.

        Raises:
            InputError: a TBE was called more often in one micro-batch than in another. Nothing was updated.
            RuntimeError: look-ups were overwritten since. Nothing was updated.
        """
        updates = [update for one in self._deferred for update in one.updates(positions)]
        self._leave()
        outputs, gradients = [], []
        for update_filter, stock, call, gradient in updates:
            with torch.enable_grad():
                output = update_filter.forward(stock, call)
            if gradient is not None and output.grad_fn is not None:
                outputs.append(output)
                gradients.append(gradient)
        if outputs:
            torch.autograd.backward(outputs, gradients)


# A filter, its TBE's own forward, the joint look-ups, and the gradient of their output.
Update = tuple[UpdateFilter, Callable[..., Tensor], Call, Tensor | None]


class Deferral:
    """What one TBE looked up in each micro-batch, and the gradients that came back.

    Attributes:
        micro_batches: for each the calls of the TBE's forward, in order.
    """

    def __init__(self, update_filter: UpdateFilter) -> None:
        self.filter = update_filter
        self.micro_batches: list[list[_Held]] = []
        self._anchor = torch.empty(0, device=update_filter.device, requires_grad=True)

    def hold(self, stock: Callable[..., Tensor], call: Call) -> Tensor:
        """The TBE's output, whose gradient will be kept.

        Raises:
            InputError: the call is of a kind that cannot be put together with another. Nothing was changed.
        """
        self._check(call)
        held = _Held(stock, call)
        self.micro_batches[-1].append(held)

        def run() -> Tensor:
            with _steps_uncounted(self.filter.tbe):
                output = self.filter.forward(stock, call)
            held.ran(output)
            return output

        return _KeepGradient.apply(self._anchor, run, held)

    def _check(self, call: Call) -> None:
        what = None
        if torch.compiler.is_compiling():
            what = "torch.compile traces the model"
        elif not self.micro_batches:
            what = "a forward outside of any micro-batch"
        elif call.batch_sizes is not None:
            what = "batches of variable size (a KeyedJaggedTensor with stride_per_key)"
        elif call.weights is not None and call.weights.requires_grad:
            what = "per-sample weights that need a gradient"
        elif more := [name for name, value in call.more.items() if value is not None]:
            what = f"forward({', '.join(more)}=)"
        elif self.filter.tbe.lxu_cache_locations_list:
            what = "batches that FBGEMM has prefetched"
        if what is not None:
            tables = ", ".join(sorted({shard.table for shard in self.filter.shards}))
            raise InputError(
                f"table(s) {tables}: {what}: such a batch cannot be trained in micro-batches with one update. Nothing "
                "was updated. Train it whole"
            )

    def check_calls(self) -> None:
        """Raises InputError if the micro-batches have different numbers of calls."""
        if len({len(calls) for calls in self.micro_batches}) > 1:
            tables = ", ".join(sorted({shard.table for shard in self.filter.shards}))
            raise InputError(
                f"table(s) {tables}: looked up in {[len(calls) for calls in self.micro_batches]} times in the "
                "micro-batches of one batch. Nothing was updated. Train such a model with whole batches"
            )

    def updates(self, positions: Sequence[Tensor]) -> list[Update]:
        """For each call of the TBE in the whole batch: its look-ups and its gradient, None if none came back."""
        self.check_calls()
        return [self._join(calls, positions) for calls in zip(*self.micro_batches, strict=True)]

    def _join(self, parts: tuple[_Held, ...], positions: Sequence[Tensor]) -> Update:
        features = len(self.filter.feature_table)
        for part in parts:
            part.check_unwritten()
        joint = join([part.call for part in parts], features, positions)
        call = replace(joint.call, gathers=False)
        if all(part.gradient is None for part in parts):
            return self.filter, parts[0].stock, call, None
        rows = joint.lookups if self.filter.tbe.pooling_mode == PoolingMode.NONE else joint.samples
        return self.filter, parts[0].stock, call, put_together([part.gradient_or_zeros() for part in parts], rows)


class _Held:
    """One call of a TBE's forward."""

    def __init__(self, stock: Callable[..., Tensor], call: Call) -> None:
        self.stock = stock
        self.call = call
        self.gradient: Tensor | None = None
        self._versions: list[int] = []
        self._like = torch.empty(0)
        self._shape = self._like.shape

    def ran(self, output: Tensor) -> None:
        self._versions = [tensor._version for tensor in self._tensors()]  # FBGEMM's bounds check may write
        self._like, self._shape = output.new_empty(0), output.shape  # not the output, whose memory is the caller's

    def check_unwritten(self) -> None:
        if [tensor._version for tensor in self._tensors()] != self._versions:
            raise RuntimeError(
                "the look-ups of a micro-batch were modified by an inplace operation before the batch was through. "
                "Nothing was updated; clone() them first"
            )

    def gradient_or_zeros(self) -> Tensor:
        return self._like.new_zeros(self._shape) if self.gradient is None else self.gradient

    def _tensors(self) -> list[Tensor]:
        call = self.call
        return [call.indices, call.offsets, *([call.weights] if call.weights is not None else [])]


class _KeepGradient(torch.autograd.Function):
    """A TBE's output, with a backward that keeps the gradient and updates nothing."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, run: Callable[[], Tensor], held: _Held) -> Tensor:
        ctx.held = held
        return run()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        held = ctx.held
        held.gradient = gradient if held.gradient is None else held.gradient + gradient
        return None, None, None


@contextmanager
def _steps_uncounted(tbe: TBE) -> Iterator[None]:
    """A forward inside does not count as a step of an optimizer that counts them (Adam). The joint batch's does."""
    if not hasattr(tbe, "iter_cpu"):
        yield
        return
    kept = tbe.iter_cpu, tbe.iter
    tbe.iter_cpu, tbe.iter = (count.clone() for count in kept)
    try:
        yield
    finally:
        tbe.iter_cpu, tbe.iter = kept
