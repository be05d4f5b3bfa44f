"""TBE providers taking turns: one optimizer's tables, built where there is room for them, and what was measured."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import GIB, Memories, floor_ms, step_bytes
from benchmarks.harness import Row, Timing, interleaved
from benchmarks.tbe_providers import Provider, Whole, build, not_run
from benchmarks.tbe_traffic import Profile, Shape, Traffic
from torchrec_slipstream.tbe.finding import TBE

# The part of a card's memory that is left for outputs, gradients, caches and overlays.
_KEPT_FREE = 0.1


class Bench:
    """One optimizer's tables, its traffic, and what was measured of a point so far."""

    def __init__(self, args: argparse.Namespace, optimizer: str, memories: Memories) -> None:
        self.args, self.optimizer, self.memories = args, optimizer, memories
        self.device: str = args.device
        self.shape = Shape(args.tables, args.rows, args.dim, args.batch, args.zipf, args.seed)
        self.traffic = Traffic(self.shape, self.device)
        self.profile = Profile(self.traffic, range(args.profile))
        self.number = args.profile
        torch.manual_seed(self.shape.seed + 1)
        self.gradient = torch.randn(self.shape.bags, self.shape.tables * self.shape.dim, device=self.device)
        self.tbes: dict[str, TBE] = {}
        self.not_run = {name: why for name, why in not_run(self.device).items() if name not in args.leave_out}
        self.not_run |= dict.fromkeys(args.leave_out, "left out by --leave-out")
        self.set_up_seconds: dict[str, float] = {}
        self.samples: dict[str, list[float]] = {}
        self.hits: dict[str, list[float]] = {}
        self.shown: set[str] = set()

    def wants(self, *names: str) -> bool:
        """Whether any of these providers can run here and was not left out."""
        return any(name not in self.not_run for name in names)

    def tbe(self, backing: str, *names: str) -> TBE | None:
        """The TBE of a backing, built on first use; None, and the providers ``names`` are not run, without room."""
        if backing not in self.tbes:
            began = time.perf_counter()
            try:
                check_room(backing, self.shape, self.optimizer, self.device, self.tbes, self.args.host_gib)
                self.tbes[backing] = build(backing, self.shape, self.optimizer, self.device)
            except (MemoryError, RuntimeError) as error:  # ours, or CUDA's
                self.not_run |= dict.fromkeys(names, str(error).splitlines()[0])
                return None
            self.set_up_seconds[backing] = time.perf_counter() - began
            print(f"{self.optimizer}, {backing}: set up in {self.set_up_seconds[backing]:.1f} s", file=sys.stderr)
        return self.tbes[backing]

    def whole(self, backing: str) -> dict[str, Provider]:
        """The provider of a backing's TBE alone, by its name; none without room."""
        if not self.wants(backing) or (tbe := self.tbe(backing, backing)) is None:
            return {}
        return {backing: Whole(tbe, self.traffic, self.gradient, in_own=backing == "torchrec_fused")}

    def batches(self, count: int) -> list[Tensor]:
        """The next ones that nobody has seen."""
        self.number += count
        return [self.traffic.batch(number) for number in range(self.number - count, self.number)]

    def warm(self, provider: Provider) -> None:
        """Let a cache see traffic that is not timed."""
        provider.ready()
        until = time.perf_counter() + self.args.seconds
        for _ in range(self.args.warm):
            provider.step(self.batches(1)[0])
            if time.perf_counter() > until:
                break

    def take_turns(self, providers: dict[str, Provider]) -> None:
        """Time steps until the point's seconds are used up; at least ``--rounds`` rounds."""
        args, drawn = self.args, dict[str, list[Tensor]]()

        def before(name: str, turn: int) -> None:
            providers[name].ready()
            drawn[name] = self.batches(args.steps)
            served = float(providers[name].served(drawn[name][0]).float().mean())
            self.hits.setdefault(name, []).append(served)

        def run(name: str, turn: int) -> None:
            for indices in drawn[name]:
                providers[name].step(indices)

        turns = {name: partial(run, name) for name in providers}
        began, rounds, warmup = time.perf_counter(), 0, 1
        while rounds == 0 or (rounds < args.most_rounds and time.perf_counter() - began < args.seconds):
            taken = interleaved(
                turns, args.rounds, warmup, device=self.device, title=", ".join(providers), before=before
            )
            for name, timing in taken.items():
                self.samples.setdefault(name, []).extend(1e3 * one / args.steps for one in timing.samples)
            rounds, warmup = rounds + args.rounds, 0
        for name in providers if args.kernels else ():
            if name not in self.shown:
                self.shown.add(name)
                before(name, 0)
                print(f"{self.optimizer}, {name}, {args.steps} steps:\n{_kernels(turns[name], args)}", flush=True)

    def floor(self, hot: Tensor | None, live: Tensor | None) -> float:
        """Milliseconds; ``hot`` and ``live`` bool ``[tables * rows]``, None: no row and every row."""
        batches = self.batches(2)
        total = 0.0
        for indices in batches:
            rows = torch.unique(indices + self.traffic.begins)
            is_hot = hot[rows] if hot is not None else torch.zeros_like(rows, dtype=torch.bool)
            is_live = live[rows] if live is not None else torch.ones_like(is_hot)
            moved = step_bytes(
                cold=int((~is_hot).sum()),
                cold_live=int((~is_hot & is_live).sum()),
                hot=int(is_hot.sum()),
                hot_live=int((is_hot & is_live).sum()),
                lookups=indices.numel(),
                bags=indices.numel(),
                dim=self.shape.dim,
                optimizer=self.optimizer,
            )
            total += floor_ms(self.memories, moved)
        return total / len(batches)


class Point:
    """The measurements at one budget, and the rows that are made of them, however far it came."""

    def __init__(self, bench: Bench, budget: float) -> None:
        self.bench, self.budget = bench, budget
        bench.samples, bench.hits = {}, {}
        self.floors: dict[str, float | None] = {}
        self.quality: dict[str, dict[str, Any]] = {}

    def note(self, name: str, provider: Provider, floor: float | None, **quality: Any) -> None:
        """What is known of a provider besides its times."""
        self.floors[name] = floor
        self.quality[name] = {"own_bytes": provider.own_bytes, **quality}

    def rows(self) -> list[Row]:
        bench, args = self.bench, self.bench.args
        stock = bench.samples.get("torchrec_fused")
        rows = []
        for name, samples in bench.samples.items():
            if name not in self.floors:  # a candidate that was not taken
                continue
            timing, floor = Timing(tuple(samples)), self.floors[name]
            on_bus = floor is not None and bench.device != "cpu"
            quality = {
                "hit_rate": sum(bench.hits[name]) / len(bench.hits[name]),
                "floor_ms": floor if on_bus else None,
                "floor_multiple": timing.p50 / floor if floor is not None and on_bus else None,
                "stock_ms": Timing(tuple(stock)).p50 if stock else None,
            }
            parameters = {
                **asdict(bench.shape),
                **{"budget": self.budget, "optimizer": bench.optimizer, "rounds": len(samples)},
                **{"steps": args.steps, "profile": args.profile},
            }
            quality |= self.quality[name]
            rows.append(Row("hbm_budget", name, parameters, timing, "ms", quality, bench.device))
        return rows


def _kernels(turn: Callable[[int], None], args: argparse.Namespace) -> str:
    """A table of where one turn's time goes, the longest ``--kernels`` of them."""
    on_gpu = args.device != "cpu"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]) as taken:
        turn(0)
        if on_gpu:
            torch.cuda.synchronize()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return str(taken.key_averages().table(sort_by=by, row_limit=args.kernels, max_name_column_width=90))


def check_room(backing: str, shape: Shape, optimizer: str, device: str, others: Iterable[str], host_gib: float) -> None:
    """Refuse a backing for which there is no room beside the ``others`` (backings of equal shape that are allocated).

    Args:
        host_gib: what all tables in host memory may take together. Managed tables must fit the card's free memory too.

    Raises:
        MemoryError: what is wanted, and what is there.
    """
    if device == "cpu":
        return
    size = shape.tables * shape.rows * shape.row_bytes(optimizer)
    free, total = torch.cuda.mem_get_info()
    room = free - int(_KEPT_FREE * total)
    if backing == "torchrec_fused":
        if size > room:
            raise MemoryError(f"{backing}: {size / GIB:.1f} GiB of HBM, but {room / GIB:.1f} GiB are to be had")
        return
    in_host = [one for one in others if one != "torchrec_fused"]
    managed = [one for one in (*in_host, backing) if one != "uvm_host_mapped"]
    wanted = size * (1 + len(in_host))
    if wanted > host_gib * GIB:
        raise MemoryError(f"{backing}: {wanted / GIB:.1f} GiB of host memory in all, --host-gib {host_gib:g}")
    if backing != "uvm_host_mapped" and size * len(managed) > room:
        raise MemoryError(
            f"{backing}: {size * len(managed) / GIB:.1f} GiB of managed memory in all, but {room / GIB:.1f} GiB of the "
            "card are to be had"
        )
