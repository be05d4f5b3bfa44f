"""Batches as plain values and tensors: for files that ``torch.load(weights_only=True)`` reads, and for other ranks."""

from __future__ import annotations

import io
import sys
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_slipstream.errors import StateError


def pack(batch: Any) -> dict[str, Any]:
    """The batch as plain values and tensors of their own in host memory.

    Raises:
        StateError: its class is not found by its name, as one defined inside a function.
    """
    kind = type(batch)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if _class_of(name) is not kind:
        raise StateError(f"a batch of {name} cannot be saved; define its class at the top level of a module")
    return {"class": name, "fields": {one.name: _pack(getattr(batch, one.name)) for one in fields(batch)}}


def unpack(packed: dict[str, Any]) -> Any:
    """The batch that :func:`pack` took apart, in host memory.

    Raises:
        StateError: this program has no such class.
    """
    kind = _class_of(packed["class"])
    if kind is None:
        raise StateError(
            f"a saved batch is a {packed['class']}, which this program has not imported; import it, or start the epoch "
            "afresh without the saved state"
        )
    return kind(**{name: _unpack(value) for name, value in packed["fields"].items()})


def to_bytes(batch: Any) -> Tensor:
    """The batch as uint8 [n]."""
    file = io.BytesIO()
    torch.save(pack(batch), file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def from_bytes(content: Tensor) -> Any:
    """The batch of :func:`to_bytes`."""
    return unpack(torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True))


def _class_of(name: str) -> type | None:
    """The dataclass of that name, of modules imported already: a file shall not make us import one."""
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and is_dataclass(found) else None


def _pack(value: Any) -> Any:
    if isinstance(value, KeyedJaggedTensor):
        parts = {"values": value.values(), "lengths": value.lengths(), "weights": value.weights_or_none()}
        return {"keys": list(value.keys()), "stride": value.stride()} | {k: _pack(one) for k, one in parts.items()}
    # A view's file would hold the whole tensor.
    return value.detach().to("cpu", copy=True).contiguous() if isinstance(value, Tensor) else value


def _unpack(value: Any) -> Any:
    return KeyedJaggedTensor(**value) if isinstance(value, dict) else value
