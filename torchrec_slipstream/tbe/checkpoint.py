"""Checkpoints of a model with overlays: one logical table, wherever its rows are.

TorchRec's ``state_dict`` and the fused optimizer's state are views of the backing TBE's memory, so nobody has to copy
a table: it is enough that the overlay is released before anybody gets hold of a view, or loads into one. TorchRec
flushes its TBEs before a ``state_dict``, and ours release then; the fused optimizer does not, and nor does loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from torchrec.optim.keyed import KeyedOptimizer

from torchrec_slipstream.tbe.finding import FoundTbe
from torchrec_slipstream.tbe.overlay import Overlay


class ReleaseBeforeAccess:
    """Releases an overlay whenever its table's weights or optimizer state are about to be read or loaded.

    Args:
        found: the backing TBE, with the modules that give its state away.
    """

    def __init__(self, found: FoundTbe, overlay: Overlay) -> None:
        self._overlay = overlay
        self._handles: list[RemovableHandle] = [found.tbe.register_state_dict_pre_hook(self._release)]
        for module in {id(m): m for m in (found.tbe, found.owner) if m is not None}.values():
            self._handles.append(module.register_load_state_dict_pre_hook(self._release))
        self._optimizer = found.optimizer
        if self._optimizer is not None:
            _swap_in(self._optimizer, overlay)

    def remove(self) -> None:
        """Leave the modules as they were."""
        for handle in self._handles:
            handle.remove()
        if self._optimizer is not None:
            _swap_out(self._optimizer)

    def _release(self, module: nn.Module, *arguments: Any) -> None:
        self._overlay.release()


class _ReleasingOptimizer:
    """Mixin that a TBE's fused optimizer gets: its state is read through here, by others that combine it as well."""

    @property
    def state(self) -> Mapping[Any, Any]:
        self.__dict__["_slipstream_overlay"].release()
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        self.__dict__["state"] = value


_CLASSES: dict[type, type] = {}


def _swap_in(optimizer: KeyedOptimizer, overlay: Overlay) -> None:
    stock = type(optimizer)
    if stock not in _CLASSES:
        _CLASSES[stock] = type(stock.__name__, (_ReleasingOptimizer, stock), {"__module__": stock.__module__})
    optimizer.__dict__["_slipstream_overlay"] = overlay
    optimizer.__class__ = _CLASSES[stock]


def _swap_out(optimizer: KeyedOptimizer) -> None:
    optimizer.__class__ = type(optimizer).__bases__[1]
    del optimizer.__dict__["_slipstream_overlay"]
