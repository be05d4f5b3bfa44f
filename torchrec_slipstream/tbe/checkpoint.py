"""Checkpoints of a model with overlays: one logical table, wherever its rows are.

TorchRec's ``state_dict`` and the fused optimizer's state are views of the backing TBE's memory, so nobody has to copy
a table: it is enough that the overlay is released before anybody gets hold of a view, or loads into one. TorchRec
flushes its TBEs before a ``state_dict``, and ours release then, as they do before their own methods give a table away
(``class_swap.py``); the fused optimizers do not, and nor does loading.

A view is current until the next forward. Who keeps one for longer reads hot rows as they were then, as stock TorchRec
has it with tables in FBGEMM's cache; who writes into one is found out (``Overlay``). That holds for ``parameters()`` as
well, which are views, too, and too often asked for to release the overlay each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
            handle = module.register_load_state_dict_pre_hook(self._release)
            # Before TorchRec's own, which may copy what is to be loaded: it can be a view of our table.
            module._load_state_dict_pre_hooks.move_to_end(handle.id, last=False)  # type: ignore[union-attr]
            self._handles.append(handle)
        self._optimizers = list(_optimizers_of(found))
        for optimizer in self._optimizers:
            _swap_in(optimizer, overlay)

    def remove(self) -> None:
        """Leave the modules as they were."""
        for handle in self._handles:
            handle.remove()
        for optimizer in self._optimizers:
            _swap_out(optimizer)

    def _release(self, module: nn.Module, *arguments: Any) -> None:
        self._overlay.release()


def _optimizers_of(found: FoundTbe) -> Iterator[KeyedOptimizer]:
    """The TBE's fused optimizer, and those of single tables that hang on the parameters of its collection."""
    if found.optimizer is not None:
        yield found.optimizer
    for parameter in found.owner.parameters() if found.owner is not None else ():
        for optimizer in getattr(parameter, "_in_backward_optimizers", ()):
            if getattr(optimizer, "_emb_module", None) is found.tbe:
                yield optimizer


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
