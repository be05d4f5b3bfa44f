"""Are the copies of the next batch's cold rows hidden behind the dense part, where a pipeline prefetches?

    python -m benchmarks.prefetch_overlap --device cuda --json

A step is: forward of one TBE, a dense part of ``--dense-ms`` (products of matrices), fused backward. *Off*, the TBE
fetches a batch's rows into FBGEMM's cache in that batch's forward. *On*, as TorchRec's PrefetchTrainPipelineSparseDist
does, the next batch is prefetched on a stream beside, after this one's forward, so that the copies can run behind the
dense part. Both for ``uvm_caching_lru`` and for ``ours_caching`` (an overlay of the hot rows over a small cache, in the
same bytes of HBM), on the same tables in turns of ``--steps`` steps, whose first prefetch nothing hides.

``hidden_share`` is what *on* saves over what the prefetches take by themselves, measured where they hide nothing.

CUDA only: FBGEMM's cache is. On a CPU everything is listed as not run.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row, Timing, interleaved
from benchmarks.tbe_providers import Attached, Cached, Ours, Provider, build, free
from benchmarks.tbe_traffic import Profile, Shape, Traffic
from benchmarks.tbe_turns import check_room

QUESTION = "prefetch_overlap"
PROVIDERS = ("uvm_caching_lru", "ours_caching")
# Of ours, the part of the budget that the cache of cold rows gets: this batch's and the next one's have to fit.
_CACHE_PART = 0.3


class Dense:
    """Matrix products that take about so many milliseconds of an otherwise idle GPU."""

    def __init__(self, milliseconds: float, device: str, size: int = 4096) -> None:
        self._matrix = torch.randn(size, size, dtype=torch.bfloat16, device=device)
        self.products = 0
        if milliseconds > 0:
            self.products = 16
            self.run()  # the first one initialises what it calls
            each = _milliseconds(self.run) / self.products
            self.products = max(1, round(milliseconds / each))

    def run(self) -> None:
        for _ in range(self.products):
            torch.mm(self._matrix, self._matrix)


def _milliseconds(work: Any) -> float:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    work()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after))


class Steps:
    """Runs steps of one provider, its next batch prefetched beside or not."""

    def __init__(self, provider: Provider, dense: Dense) -> None:
        self.provider, self.dense = provider, dense
        self.beside = torch.cuda.Stream()

    def off(self, batches: list[Tensor]) -> None:
        for indices in batches:
            self._one(indices, None)

    def on(self, batches: list[Tensor]) -> None:
        self._prefetch(batches[0])
        for indices, coming in zip(batches, [*batches[1:], None], strict=True):
            torch.cuda.current_stream().wait_stream(self.beside)
            self._one(indices, coming)

    def _one(self, indices: Tensor, coming: Tensor | None) -> None:
        output = self.provider.tbe(indices, self.provider.traffic.offsets)
        if coming is not None:
            self._prefetch(coming)
        self.dense.run()
        output.backward(self.provider.gradient)

    def _prefetch(self, indices: Tensor) -> None:
        main = torch.cuda.current_stream()
        self.beside.wait_stream(main)
        with torch.cuda.stream(self.beside):
            self.provider.tbe.prefetch(indices, self.provider.traffic.offsets, main)
        indices.record_stream(self.beside)

    def alone(self, batches: list[Tensor]) -> float:
        """Milliseconds of one batch's prefetch where it hides behind nothing: median."""
        taken = []
        for indices in batches:
            work = partial(self.provider.tbe.prefetch, indices, self.provider.traffic.offsets)
            taken.append(_milliseconds(work))
            self._one(indices, None)
        return Timing(tuple(taken)).p50


def measure(args: argparse.Namespace, name: str, traffic: Traffic, profile: Profile) -> list[dict[str, Any]]:
    """Off and on for every ``--dense-ms``: times in milliseconds, and what is hidden."""
    shape = traffic.shape
    check_room("uvm_caching", shape, args.optimizer, args.device, (), args.host_gib)
    # prefetch_pipeline: lines are locked between their prefetch and their backward.
    tbe = build("uvm_caching", shape, args.optimizer, args.device, prefetch_pipeline=True)
    gradient = torch.randn(shape.bags, shape.tables * shape.dim, device=args.device)
    slots = round(args.budget * shape.tables * shape.rows)
    under = slots if name == "uvm_caching_lru" else round(_CACHE_PART * slots)
    provider: Provider = Cached(tbe, traffic, gradient, profile, "lru", under)
    attached = None
    if name == "ours_caching":
        # Nothing is left out here; the update filter cannot follow prefetch_pipeline's order of cache locations.
        attached = Attached(tbe, profile, slots - under, skips=False)
        provider = Ours(attached, traffic, gradient)
    drawn = args.profile

    def batches() -> list[Tensor]:
        nonlocal drawn
        drawn += args.steps
        return [traffic.batch(number) for number in range(drawn - args.steps, drawn)]

    Steps(provider, Dense(0.0, args.device)).off([one for _ in range(args.warm // args.steps) for one in batches()])
    found = []
    for dense_ms in args.dense_ms:
        steps = Steps(provider, Dense(dense_ms, args.device))
        alone = steps.alone(batches())
        coming: list[Tensor] = []

        def before(kind: str, turn: int, coming: list[Tensor] = coming) -> None:
            coming[:] = batches()

        def run(kind: str, turn: int, steps: Steps = steps, coming: list[Tensor] = coming) -> None:
            (steps.on if kind == "on" else steps.off)(coming)

        turns = {kind: partial(run, kind) for kind in ("off", "on")}
        timings = interleaved(turns, args.rounds, 2, device=args.device, title=f"{name}, {dense_ms} ms", before=before)
        times = {
            kind: Timing(tuple(1e3 * sample / args.steps for sample in timing.samples))
            for kind, timing in timings.items()
        }
        hidden = (times["off"].p50 - times["on"].p50) / alone
        found.append({"dense_ms": dense_ms, "alone_ms": alone, "hidden_share": hidden, "times": times})
    if attached is not None:
        attached.detach()
    return found


def _rows(args: argparse.Namespace, name: str, shape: Shape, found: dict[str, Any]) -> list[Row]:
    return [
        Row(
            question=QUESTION,
            provider=f"{name}_{kind}",
            parameters={
                **asdict(shape),
                **{"optimizer": args.optimizer, "budget": args.budget, "dense_ms": found["dense_ms"]},
                **{"steps": args.steps, "rounds": args.rounds, "warm": args.warm, "profile": args.profile},
            },
            timing=timing,
            unit="ms",
            quality={"prefetch_alone_ms": found["alone_ms"], "hidden_share": found["hidden_share"]},
            device=args.device,
        )
        for kind, timing in found["times"].items()
    ]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(
        "prefetch_overlap", "Whether a pipeline's prefetch of cold rows hides behind the dense part."
    )
    parser.add_argument("--tables", type=int, default=10)
    parser.add_argument("--rows", type=int, default=4_000_000, help="of each table")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1_000_000, help="look-ups of a batch")
    parser.add_argument("--zipf", type=float, default=1.05, help="exponent of the popularity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", choices=("rowwise_adagrad", "sgd", "adam"), default="rowwise_adagrad")
    parser.add_argument("--budget", type=float, default=0.1, help="rows in HBM, a share of all")
    parser.add_argument("--dense-ms", type=float, nargs="+", default=[0.0, 5.0, 20.0], help="of the dense part")
    parser.add_argument("--profile", type=int, default=64, help="batches counted before")
    parser.add_argument("--warm", type=int, default=32, help="steps before anything is timed")
    parser.add_argument("--steps", type=int, default=16, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds")
    parser.add_argument("--host-gib", type=float, default=100.0, help="of host memory that tables may take")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record as it goes, and print; the result that is printed."""
    args = parse_arguments(argv)
    result: dict[str, Any] = {"ms": {}, "hidden_share": {}, "not_run": {}}
    if args.device == "cpu":
        result["not_run"] = dict.fromkeys(PROVIDERS, "FBGEMM's UVM cache and its prefetch are CUDA only")
    else:
        shape = Shape(args.tables, args.rows, args.dim, args.batch, args.zipf, args.seed)
        traffic = Traffic(shape, args.device)
        profile = Profile(traffic, range(args.profile))
        for name in PROVIDERS:
            for found in measure(args, name, traffic, profile):
                if args.record:
                    harness.record(_rows(args, name, shape, found), args.csv)
                key = f"{name}.{found['dense_ms']:g}"
                result["ms"][key] = {kind: timing.p50 for kind, timing in found["times"].items()}
                result["ms"][key]["alone"] = found["alone_ms"]
                result["hidden_share"][key] = found["hidden_share"]
                print(f"{key}: {result['ms'][key]}, {found['hidden_share']:.0%} hidden", flush=True)
            free()
    for name, why in result["not_run"].items():
        print(f"not run: {name}: {why}")
    args.record = False  # the rows are there already
    return harness.finish(args, result, [])


if __name__ == "__main__":
    main()
