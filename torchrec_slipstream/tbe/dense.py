"""The dense part of a model, which TorchRec wraps in DistributedDataParallel: one all-reduce for two backwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.optim.fused import FusedOptimizer

from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.tbe.finding import modules_of


class DenseGradients:
    """The all-reduce of a model's dense gradients: of DMP's dense part, and of tables that are data parallel.

    Raises:
        AttachError: dense parameters are updated within the backward, and so would be in each.
    """

    def __init__(self, model: nn.Module) -> None:
        if names := [name for name, parameter in model.named_parameters() if _is_updated_in_backward(parameter)]:
            raise AttachError(
                f"apply_optimizer_in_backward updates the dense parameters {names[:3]} in every backward, of which two "
                "micro-batches have two; give it the embedding collections' parameters alone, and step the others' "
                "optimizer yourself"
            )
        self._parts = [part for _, part in modules_of(model) if isinstance(part, DistributedDataParallel)]

    @property
    def need_whole_batch(self) -> bool:
        """Whether DDP has yet to see one backward: with ``static_graph``, as TorchRec sets it, it learns from the first
        which parameters take part, and ``no_sync`` would hide it."""
        return any(part.static_graph and not part._static_graph_delay_allreduce_enqueued for part in self._parts)

    @contextmanager
    def only_added_up(self) -> Iterator[None]:
        """Forwards and backwards inside add to the gradients, and reduce nothing."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.no_sync())
            yield

    def reduce_with(self, loss: Tensor) -> None:
        """The coming backward of ``loss``, of a forward that ran under :meth:`only_added_up`, reduces the gradients.

        What DDP's forward does otherwise, but its output is not to be had any more. (Lightning did it so for years.)
        """
        for part in self._parts:
            part.require_forward_param_sync = True
            part.reducer.prepare_for_forward()
            searched = [loss] if part.find_unused_parameters and not part.static_graph else []
            part.reducer.prepare_for_backward(searched)


def _is_updated_in_backward(parameter: Tensor) -> bool:
    # Sharded tables have one of TorchRec's, which does nothing: FBGEMM updates them.
    return any(not isinstance(one, FusedOptimizer) for one in getattr(parameter, "_in_backward_optimizers", ()))
