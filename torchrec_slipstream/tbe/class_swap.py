"""Attaching in place: the TBE's class becomes a subclass of its own, as FSDP2's ``fully_shard`` does with modules.

isinstance checks, ``state_dict``, ``flush`` and the fused optimizer see the stock TBE that they always saw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchrec_slipstream.errors import AttachError, LookupRangeError
from torchrec_slipstream.tbe.finding import ATTACHED_ALREADY, TBE, Attached, modules_of
from torchrec_slipstream.tbe.part import Call
from torchrec_slipstream.tbe.preparing import bounds_unchecked, without_hot
from torchrec_slipstream.tbe.versions import MORE_ARGUMENTS

if TYPE_CHECKING:
    from torchrec_slipstream.tbe.update_filter import UpdateFilter


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
        *rest: Any,
        **more: Any,
    ) -> Tensor:
        if len(rest) > len(MORE_ARGUMENTS):
            raise TypeError(f"forward() takes at most {5 + len(MORE_ARGUMENTS)} arguments, not {5 + len(rest)}")
        # Named here, so that a call by position and one by name reach FBGEMM alike.
        more |= zip(MORE_ARGUMENTS, rest, strict=False)
        try:
            call = Call(
                indices, offsets, per_sample_weights, feature_requires_grad, batch_size_per_feature_per_rank, more
            )
            # The TBE's own class comes next in the order of resolution.
            return self._slipstream.forward(super().forward, call)  # type: ignore[misc]
        except RuntimeError as error:
            if torch.compiler.is_compiling():
                raise
            why = _out_of_range(self._slipstream, indices, offsets, batch_size_per_feature_per_rank)
            if why is None:
                raise
            raise LookupRangeError(why) from error

    def prefetch(
        self,
        indices: Tensor,
        offsets: Tensor,
        forward_stream: torch.cuda.Stream | None = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
    ) -> None:
        if (overlay := self._slipstream.overlay) is None:
            super().prefetch(indices, offsets, forward_stream, batch_size_per_feature_per_rank)  # type: ignore[misc]
            return
        if overlay.released and forward_stream is not None:
            # The hot rows will be read anew, after what was written meanwhile.
            torch.cuda.current_stream().wait_stream(forward_stream)
        call = Call(indices, offsets, None, None, batch_size_per_feature_per_rank)
        call = without_hot(self._slipstream, overlay, call)
        with bounds_unchecked(self._slipstream.tbe):
            super().prefetch(call.indices, call.offsets, forward_stream, call.batch_sizes)  # type: ignore[misc]

    def flush(self) -> None:
        self._release()
        super().flush()  # type: ignore[misc]

    # What FBGEMM gives away of its tables, or lets be written: the truth of all rows has to be there.

    def split_embedding_weights(self) -> list[Tensor]:
        self._release()
        return super().split_embedding_weights()  # type: ignore[misc]

    def split_optimizer_states(self) -> list[list[Tensor]]:
        self._release()
        return super().split_optimizer_states()  # type: ignore[misc]

    def get_optimizer_buffer(self, state: str) -> Tensor:
        self._release()
        return super().get_optimizer_buffer(state)  # type: ignore[misc]

    def reset_embedding_weight_momentum(self, *arguments: Any, **more: Any) -> None:
        self._release()
        super().reset_embedding_weight_momentum(*arguments, **more)  # type: ignore[misc]

    def _release(self) -> None:
        if (overlay := self._slipstream.overlay) is not None:
            overlay.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise AttachError("a TBE with a Slipstream session attached cannot be copied; detach() the session first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AttachError(
            "a TBE with a Slipstream session attached cannot be pickled; save the model's state_dict() instead, "
            "or detach() first"
        )


_CLASSES: dict[type, type] = {}


def swap_in(tbe: TBE, update_filter: UpdateFilter) -> None:
    """Let the TBE's forward go through the filter. Raises AttachError if one is attached already."""
    if isinstance(tbe, Attached):
        raise AttachError(ATTACHED_ALREADY)
    stock = type(tbe)
    if stock not in _CLASSES:
        _CLASSES[stock] = type(f"Slipstream{stock.__name__}", (_FilteredTbe, stock), {"__module__": __name__})
    tbe.__dict__["_slipstream"] = update_filter
    tbe.__class__ = _CLASSES[stock]


def swap_out(tbe: TBE) -> None:
    """Make the TBE stock again; nothing if it is."""
    if isinstance(tbe, Attached):
        tbe.__class__ = type(tbe).__bases__[1]
        del tbe.__dict__["_slipstream"]


def detach(model: nn.Module) -> None:
    """Make a model stock again, whoever attached to it: ``Slipstream.detach()`` of every session on a table of it.

    For a model whose session object nobody has any more: nothing else can detach it. A stock model stays as it is. A
    session that is attached to more than ``model`` is detached from all of it.

    Args:
        model: as it was attached to, or any module tree with it in it.

    Raises:
        AttachError: ``model`` is no module.
        StateError: as ``Slipstream.detach()``. The session concerned is still attached.
    """
    for _, module in list(modules_of(model)):
        if isinstance(module, _FilteredTbe):  # still, as a session takes all its TBEs with it
            one = module._slipstream
            (one.end_session or one.detach)()


def _out_of_range(
    update_filter: UpdateFilter, indices: Tensor, offsets: Tensor, batch_sizes: list[list[int]] | None
) -> str | None:
    """If a look-up is out of its table's range, a message that says which; FBGEMM's own names neither."""
    if update_filter.device.type != "cpu":
        return None  # the device's assertion has left it unusable
    features = len(update_filter.feature_table)
    bags = (offsets.numel() - 1) // features
    ends = 0
    for feature, table in enumerate(update_filter.feature_table):
        begins, ends = ends, ends + (bags if batch_sizes is None else sum(batch_sizes[feature]))
        looked_up = indices[int(offsets[begins]) : int(offsets[ends])]
        shard = update_filter.shards[table]
        bad = looked_up[(looked_up < 0) | (looked_up >= shard.rows)]
        if bad.numel():
            return (
                f"table {shard.table}: look-up of row {int(bad[0])}, but it has rows 0 to {shard.rows - 1} on "
                "this rank. Nothing was updated. Hash or clip the ids into the table's range."
            )
    return None
