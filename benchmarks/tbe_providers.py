"""One TBE's step under every scheme that keeps large tables in host memory: equal weights, equal traffic.

A *provider* runs steps (forward and fused backward) on batches that it is given, and says of a batch which look-ups it
will serve from the device's own memory:

``torchrec_fused``          the tables whole in HBM (``DEVICE``).
``uvm``, ``uvm_host_mapped`` all rows in host memory, managed or host-mapped (``MANAGED``, ``uvm_host_mapped``).
``uvm_caching_lru``, ``_lfu`` FBGEMM's cache of weights in HBM over managed tables (``MANAGED_CACHING``).
``ours``                    an overlay of the hottest rows of a profile over managed tables; ``ours_host_mapped`` and
                            ``ours_caching`` over the other two (the latter with a small cache for the cold rows).
``ours_skip``               ``ours`` with half of the look-ups' updates left out: rows at random, their patterns 0.
``ours_skip_sampling``      the same, sampled as the default configuration does.

On a CPU ``HOST`` stands in for ``DEVICE`` and ``MANAGED``; the others are not run there, and :func:`not_run` says why.
What is assumed of FBGEMM's CUDA-only parts was read in its source at v1.6.0.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice
from torch import Tensor, nn

from benchmarks.tbe_traffic import SKIPPED_SHARE, Profile, Shape, Traffic
from torchrec_slipstream import StalenessConfig
from torchrec_slipstream.placement.migration import migrate
from torchrec_slipstream.tbe import Sampling, UpdateFilter, find_tbes
from torchrec_slipstream.tbe.finding import TBE
from torchrec_slipstream.tbe.overlay import Overlay

OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
}
CPU_OPTIMIZERS = ("rowwise_adagrad", "sgd")
# What a TBE is built with, by the name of the scheme that has it for itself.
BACKINGS: dict[str, dict[str, Any]] = {
    "torchrec_fused": {"location": EmbeddingLocation.DEVICE},
    "uvm": {"location": EmbeddingLocation.MANAGED},
    "uvm_host_mapped": {"location": EmbeddingLocation.MANAGED, "uvm_host_mapped": True},
    # The least cache: resize_cache makes it what it shall be.
    "uvm_caching": {"location": EmbeddingLocation.MANAGED_CACHING, "cache_sets": 1},
}
ALGORITHMS = {"lru": CacheAlgorithm.LRU, "lfu": CacheAlgorithm.LFU}
# Slots of a set of FBGEMM's cache: a warp.
WAYS = 32
_CHUNK_BYTES = 64 << 20
# Look-ups that fill a cache at a time.
_FILL_ROWS = 1 << 20


def not_run(device: str) -> dict[str, str]:
    """By provider, why it cannot run on the device."""
    if device != "cpu":
        return {}
    managed = "FBGEMM has no MANAGED tables without CUDA"
    reasons = dict.fromkeys(("uvm", "uvm_host_mapped", "ours_host_mapped"), managed)
    cached = dict.fromkeys(("uvm_caching_lru", "uvm_caching_lfu", "ours_caching"), "FBGEMM's UVM cache is CUDA only")
    return reasons | cached


def build(backing: str, shape: Shape, optimizer: str, device: str, **more: Any) -> TBE:
    """A TBE of one of ``BACKINGS``, weights seeded: two calls with equal shapes give equal ones on one device."""
    on_cpu = device == "cpu"
    settings = BACKINGS[backing] | more
    location = EmbeddingLocation.HOST if on_cpu else settings.pop("location")
    settings = {} if on_cpu else settings
    tbe = TBE(
        [(shape.rows, shape.dim, location, ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA)] * shape.tables,
        optimizer=OPTIMIZERS[optimizer],
        learning_rate=0.01,
        eps=1e-8,
        pooling_mode=PoolingMode.SUM,
        device=torch.device("cpu") if on_cpu else torch.device(device, torch.cuda.current_device()),
        **settings,
    )
    torch.manual_seed(shape.seed)
    for weights in tbe.split_embedding_weights():
        weights.uniform_(-0.1, 0.1)
    return tbe


def states_of(tbe: TBE) -> list[Tensor]:
    """Weights and optimizer states of all tables: views."""
    sgd = tbe.optimizer == EmbOptimType.EXACT_SGD
    states = [] if sgd else [state for table in tbe.split_optimizer_states() for state in table]
    return [tensor.detach() for tensor in (*tbe.split_embedding_weights(), *states)]


def free() -> None:
    """Give back the memory of what nobody holds any more: TBEs refer to themselves."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Provider(ABC):
    """Runs steps of one TBE; ``ready`` is called before each turn, untimed."""

    def __init__(self, tbe: TBE, traffic: Traffic, gradient: Tensor) -> None:
        self.tbe, self.traffic, self.gradient = tbe, traffic, gradient

    def ready(self) -> None:  # noqa: B027  # most have nothing to do
        """Get ready for a turn."""

    def step(self, indices: Tensor) -> None:
        self.tbe(indices, self.traffic.offsets).backward(self.gradient)

    @abstractmethod
    def served(self, indices: Tensor) -> Tensor:
        """bool ``[look-ups]``, whose row the device's own memory has as the batch arrives."""

    @property
    @abstractmethod
    def own_bytes(self) -> int:
        """Of the device's own memory for rows, and for finding them."""


class Whole(Provider):
    """The tables where one TBE has them: all rows in the device's own memory, or none."""

    def __init__(self, tbe: TBE, traffic: Traffic, gradient: Tensor, *, in_own: bool) -> None:
        super().__init__(tbe, traffic, gradient)
        self.in_own = in_own

    def served(self, indices: Tensor) -> Tensor:
        return torch.full_like(indices, self.in_own, dtype=torch.bool)

    @property
    def own_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in states_of(self.tbe)) if self.in_own else 0


class Cached(Provider):
    """FBGEMM's cache, given what the profile knows: the hottest rows are in it, and LFU has their counts."""

    def __init__(
        self, tbe: TBE, traffic: Traffic, gradient: Tensor, profile: Profile, algorithm: str, slots: int
    ) -> None:
        super().__init__(tbe, traffic, gradient)
        resize_cache(tbe, slots, algorithm)
        if algorithm == "lfu":
            tbe.lxu_state[: profile.counts.numel()] = profile.counts
        hottest = profile.order[: min(slots, profile.counts.numel())]
        for rows in reversed(hottest.split(_FILL_ROWS)):  # the hottest are the last used
            self._fetch(profile.by_table(rows.sort().values))

    def _fetch(self, rows: dict[int, Tensor]) -> None:
        lengths = torch.tensor([0, *(len(some) for some in rows.values())], device=self.traffic.device)
        self.tbe.prefetch(torch.cat(list(rows.values())), lengths.cumsum(0))
        self.tbe.lxu_cache_locations_list.clear()  # no forward will ask for them
        self.tbe.timesteps_prefetched.clear()
        self.tbe.lxu_cache_locking_counter.zero_()

    def served(self, indices: Tensor) -> Tensor:
        # Its own statistics say nothing of LFU's misses: lfu_cache_populate does not take them.
        tbe = self.tbe
        linear = torch.ops.fbgemm.linearize_cache_indices(tbe.cache_hash_size_cumsum, indices, self.traffic.offsets)
        found: Tensor = torch.ops.fbgemm.lxu_cache_lookup(
            linear, tbe.lxu_cache_state, int(tbe.total_cache_hash_size), False
        )
        return found >= 0

    @property
    def own_bytes(self) -> int:
        return cache_bytes(self.tbe)


def resize_cache(tbe: TBE, slots: int, algorithm: str) -> None:
    """Give a ``MANAGED_CACHING`` TBE an empty cache of another size and kind, its rows written back before.

    Building it anew would touch all of its tables' pages again. FBGEMM's kernels take the number of sets from
    ``lxu_cache_state`` (``C`` in ``lru_cache_find.cu`` and its neighbours), and its module keeps
    it nowhere else; these are the buffers that ``_apply_cache_state`` registers.
    """
    tbe.flush()
    sets = max(1, -(-slots // WAYS))
    dim, dtype = tbe.lxu_cache_weights.shape[1], tbe.lxu_cache_weights.dtype
    device, lfu = tbe.current_device, algorithm == "lfu"
    for name in ("lxu_cache_weights", "lxu_cache_state", "lxu_state"):
        setattr(tbe, name, torch.empty(0, device=device))  # the old one goes before the new one comes
    tbe.cache_algorithm = ALGORITHMS[algorithm]
    tbe.lxu_cache_state = torch.full((sets, WAYS), -1, dtype=torch.int64, device=device)
    tbe.lxu_cache_weights = torch.zeros(sets * WAYS, dim, dtype=dtype, device=device)
    state = (int(tbe.total_cache_hash_size) + 1,) if lfu else (sets, WAYS)
    tbe.lxu_state = torch.zeros(state, dtype=torch.int64, device=device)
    if tbe.prefetch_pipeline:
        tbe.lxu_cache_locking_counter = torch.zeros(sets, WAYS, dtype=torch.int32, device=device)
    tbe.lxu_cache_locations_list.clear()
    tbe.timesteps_prefetched.clear()


def cache_bytes(tbe: TBE) -> int:
    """Bytes of FBGEMM's cache, and of what finds rows in it."""
    names = ("lxu_cache_weights", "lxu_cache_state", "lxu_state", "cache_index_table_map")
    return sum(getattr(tbe, name).nbytes for name in names)


class Attached:
    """An overlay over a TBE, with the profile's hottest rows in it, that several providers take turns with.

    Attributes:
        filter: attached until :meth:`detach`.
        overlay: its overlay.
    """

    def __init__(self, tbe: TBE, profile: Profile, slots: int, *, skips: bool = True) -> None:
        self.profile = profile
        found = find_tbes(nn.ModuleList([tbe]), skips=skips)[0]
        self.filter = UpdateFilter(found)
        self.filter.overlay = self.overlay = Overlay(found, {profile.shape.dim: slots})
        self.filter.attach()
        migrate(self.overlay, profile.by_table(profile.hottest(slots)), _CHUNK_BYTES)
        self._mode = "all"
        # By mode, look-ups that were left out, and all.
        self._seen: dict[str, list[int]] = {}
        self._before = [0, 0]

    def skipped_share(self, mode: str) -> float:
        """Of the look-ups of the steps so far in this mode, those left out."""
        self._note()
        skipped, lookups = self._seen.get(mode, (0, 0))
        return skipped / max(1, lookups)

    def _note(self) -> None:
        now = [int(counts.sum()) for counts in (self.filter.skipped, self.filter.lookups)]
        seen = self._seen.setdefault(self._mode, [0, 0])
        self._seen[self._mode] = [a + b - c for a, b, c in zip(seen, now, self._before, strict=True)]
        self._before = now

    def detach(self) -> None:
        """Write the hot rows back; the TBE is stock again."""
        self.filter.detach()

    def leave_out(self, mode: str) -> None:
        """What is left out from now on: of "all" live rows nothing, random rows ("skip"), or sampled ("sampling")."""
        one = self.filter
        one.step += 1
        if mode == self._mode:
            return
        self._note()
        self._mode = mode
        if mode == "skip":
            rows = self.profile.stale
        else:
            rows = torch.arange(one.patterns.numel() if mode == "sampling" else 0, device=one.device)
        one.set_patterns(rows, torch.zeros(rows.numel(), dtype=torch.uint8, device=one.device))
        # The benchmark's gradients are all of about one size, so the scale is the share that is kept.
        keeps = Sampling(scale=1.0 - SKIPPED_SHARE, least=StalenessConfig().min_probability)
        one.sampling = keeps if mode == "sampling" else None


class Ours(Provider):
    """An overlay's TBE; ``mode`` as :meth:`Attached.leave_out` takes it."""

    def __init__(self, attached: Attached, traffic: Traffic, gradient: Tensor, mode: str = "all") -> None:
        super().__init__(attached.filter.tbe, traffic, gradient)
        self.attached, self.mode = attached, mode

    def ready(self) -> None:
        self.attached.leave_out(self.mode)

    def served(self, indices: Tensor) -> Tensor:
        return self.attached.overlay.words[indices + self.traffic.begins] >= 0

    def live(self) -> Tensor | None:
        """bool ``[tables * rows]``, who is updated; None where that is drawn."""
        self.ready()
        return None if self.mode == "sampling" else self.attached.filter.patterns != 0

    @property
    def own_bytes(self) -> int:
        below = cache_bytes(self.tbe) if self.tbe.lxu_cache_weights.numel() else 0
        return self.attached.overlay.hbm_bytes + below
