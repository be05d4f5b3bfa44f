"""What the update filter puts in the way of FBGEMM's fused backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torchrec_slipstream.tbe.compaction import Compaction
from torchrec_slipstream.tbe.finding import TBE
from torchrec_slipstream.tbe.sampling import Layout, variable_blocks


class Cut(Protocol):
    """What the backward is to see of a batch: a compaction of it, its beginning, or all."""

    def take(self, values: Tensor) -> Tensor: ...

    def offsets(self) -> Tensor: ...


@dataclass(frozen=True)
class Beginning:
    """All look-ups of a batch that has padding behind them; how many they are is known when the backward asks."""

    chosen: Compaction
    batch_offsets: Tensor

    @property
    def count(self) -> int:
        return self.chosen.count

    def take(self, values: Tensor) -> Tensor:
        return values.narrow(0, 0, self.count)

    def offsets(self) -> Tensor:
        return self.batch_offsets


@dataclass(frozen=True)
class Whole:
    """All look-ups of a batch."""

    batch_offsets: Tensor

    def take(self, values: Tensor) -> Tensor:
        return values

    def offsets(self) -> Tensor:
        return self.batch_offsets


class SavedLookups:
    """Hooks that let the fused backward unpack a part of the look-ups only.

    A saved tensor is one of ours if it is the same memory, shape and dtype as what the TBE handed to its C++
    function: by size alone, ``indices`` could not be told from a weight table.

    Args:
        weights: the per-sample weights, if there are any.
        are_ones: whether they are all 1, for FBGEMM's sake only.
        shown: what the backward is to see instead of what the TBE looked up: "indices", "offsets" and "weights".

    Attributes:
        cut: the part, to be set before the backward.
    """

    def __init__(
        self, tbe: TBE, weights: Tensor | None, *, are_ones: bool, shown: Mapping[str, Tensor | None] | None = None
    ) -> None:
        self._tbe = tbe
        self._weights = weights
        self._are_ones = are_ones
        self._shown = shown
        self._met: set[str] = set()
        self.cut: Cut | None = None
        self._factor: Tensor | None = None

    def pack(self, tensor: Tensor) -> Tensor | tuple[str, Tensor, int]:
        tbe = self._tbe
        for name, ours in (
            ("offsets", tbe._offsets),
            ("indices", tbe._indices),
            ("weights", self._weights),
            ("lxu_cache_locations", tbe.lxu_cache_locations),
        ):
            if ours is not None and ours.numel() > 0 and _same_memory(tensor, ours):
                self._met.add(name)
                seen = self._seen_instead(name, tensor) if self._shown else tensor
                return name, seen, seen._version
        return tensor

    def _seen_instead(self, name: str, tensor: Tensor) -> Tensor:
        assert self._shown is not None
        if name == "lxu_cache_locations":
            indices, offsets = self._shown["indices"], self._shown["offsets"]
            assert indices is not None
            assert offsets is not None
            return cache_locations(self._tbe, indices, offsets)
        shown = self._shown[name]
        return tensor if shown is None else shown

    def unpack(self, packed: Tensor | tuple[str, Tensor, int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        name, tensor, version = packed
        # Autograd's own check does not see through hooks. FBGEMM's prefetching moves cache locations on purpose.
        if tensor._version != version and name != "lxu_cache_locations":
            raise RuntimeError(
                f"the {name} of a look-up were modified by an inplace operation between its forward and its backward; "
                "clone() them first"
            )
        assert self.cut is not None  # set after the forward, or by the hook that precedes this backward
        if name == "offsets":
            return self.cut.offsets()
        if name == "weights" and self._factor is not None:
            factor = self.cut.take(self._factor)
            return factor if self._are_ones else self.cut.take(tensor) * factor
        return self.cut.take(tensor)

    def scale_weights(self, factor: Tensor) -> None:
        """Let the backward see the per-sample weights times ``factor`` (float32 ``[look-ups]``)."""
        self._factor = factor

    def check(self) -> None:
        """Fail in the forward, when nothing has changed yet, if FBGEMM did not save what we cut down."""
        needed = {"offsets"}
        if self._tbe._indices.numel() > 0:  # the side of a batch that has none has nothing to cut down
            needed |= {"indices"} | ({"weights"} if self._weights is not None else set())
        if self._tbe.lxu_cache_locations.numel() > 0:
            needed.add("lxu_cache_locations")
        if missing := needed - self._met:
            raise RuntimeError(
                f"this FBGEMM saves {sorted(missing)} for its backward in a way that the update filter does not "
                "know, so look-ups cannot be left out of it. Call detach() to train on, and report the version."
            )


def cache_locations(tbe: TBE, indices: Tensor, offsets: Tensor) -> Tensor:
    """int32 ``[look-ups]``, where FBGEMM's cache has the rows now, -1 where it has not: as its own prefetch finds."""
    numbers = torch.ops.fbgemm.linearize_cache_indices(tbe.cache_hash_size_cumsum, indices, offsets)
    return torch.ops.fbgemm.lxu_cache_lookup(numbers, tbe.lxu_cache_state, int(tbe.total_cache_hash_size), False)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype


def prehook(node: Any, mend: Callable[[Tensor], Tensor]) -> None:
    """Run ``mend`` on the gradient that enters a ``grad_fn``, and on no other's."""
    node.register_prehook(lambda gradients: (mend(gradients[0]), *gradients[1:]))


def scale_bags(gradient: Tensor, factor: Tensor, layout: Layout) -> Tensor:
    """Multiply every bag of a pooled output, or of its gradient, by the bag's factor (``[bags]``, feature-major)."""
    if layout.batch_sizes is None:
        by_feature = factor.view(len(layout.dims), -1).t()
        # A plain list of widths: nothing to count on the device.
        expanded = torch.cat([by_feature[:, f : f + 1].expand(-1, dim) for f, dim in enumerate(layout.dims)], dim=1).to(
            gradient.dtype
        )
        return gradient * expanded
    scaled = gradient.clone()
    for block, first in variable_blocks(scaled, layout):
        block.mul_(factor[first : first + block.shape[0], None])
    return scaled


def clipped(tbe: TBE, gradient: Tensor) -> Tensor:
    """The gradient as the TBE would clip it: what we scale has to be clipped before, at its full size."""
    arguments = tbe.optimizer_args
    if not arguments.gradient_clipping:
        return gradient
    return gradient.clamp(-arguments.max_gradient, arguments.max_gradient)


class WeightGradient(torch.autograd.Function):
    """Identity on a TBE's output that gives per-sample weights their gradient over *all* look-ups.

    Runs before the TBE's own backward, so it sees the rows as the forward did.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, weights: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.gradient = gradient
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad_output, ctx.gradient(grad_output), None


def weight_gradient(
    tbe: TBE,
    feature_requires_grad: Tensor | None,
    batch_sizes: list[list[int]] | None,
    more: dict[str, Any],
) -> Callable[[Tensor], Tensor]:
    """FBGEMM's own gradient of the per-sample weights for the forward just run, as its stock backward calls it."""
    indices, offsets, locations = tbe._indices, tbe._offsets, tbe.lxu_cache_locations
    undefined = torch.empty(0, dtype=torch.int32, device=indices.device)
    wanted = undefined if feature_requires_grad is None else feature_requires_grad
    if feature_requires_grad is None and tbe.use_cpu:
        wanted = torch.ones(tbe.D_offsets.numel() - 1, dtype=torch.int32)
    variable: tuple[Any, ...] = ()
    if batch_sizes is not None:
        vbe = tbe._generate_vbe_metadata(offsets, batch_sizes, more.get("vbe_output"), more.get("vbe_output_offsets"))
        row_output_offsets, bag_map = torch.ops.fbgemm.generate_vbe_metadata(
            vbe.B_offsets,
            vbe.B_offsets_rank_per_feature,
            vbe.output_offsets_feature_rank,
            tbe.D_offsets,
            -1,
            False,
            vbe.max_B_feature_rank,
            tbe.info_B_num_bits,
            offsets.numel() - 1,
            more.get("vbe_output_offsets"),
        )
        variable = (
            row_output_offsets,
            bag_map,
            tbe.info_B_num_bits,
            tbe.info_B_mask,
            vbe.B_offsets_rank_per_feature,
            vbe.max_B,
        )
    name = f"split_embedding_codegen_grad_indice_weights{'_vbe' if variable else ''}_pt2_wrapper"
    operator = getattr(torch.ops.fbgemm, name)

    def gradient(grad_output: Tensor) -> Tensor:
        return operator(
            clipped(tbe, grad_output),
            tbe.weights_host,
            tbe.weights_dev,
            tbe.weights_uvm,
            tbe.lxu_cache_weights,
            tbe.weights_placements,
            tbe.weights_offsets,
            tbe.D_offsets,
            tbe.max_D,
            indices,
            offsets,
            locations,
            wanted,
            *variable,
        )

    return gradient
