"""Watches, or breaks, what torch does: which tensors it makes, and one operation after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Notes the largest memory that an operation takes for its result.

    Attributes:
        bytes: of any tensor.
        row_bytes: of one of floating point, as rows and their states are; row numbers are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.row_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
                size = made.untyped_storage().nbytes()
                self.bytes = max(self.bytes, size)
                if made.dtype.is_floating_point:
                    self.row_bytes = max(self.row_bytes, size)
        return result


class InjectedError(Exception):
    """What :class:`FailingAt` raises."""


class FailingAt(TorchDispatchMode):
    """Lets operation number ``at`` fail, before it has done anything, and all after it pass; None: none fails.

    Attributes:
        operations: how many were asked for.
    """

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at = at
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations - 1 == self.at:
            raise InjectedError(f"at {func}")
        return func(*args, **(kwargs or {}))
