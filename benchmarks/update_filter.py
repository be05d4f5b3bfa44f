"""What does leaving out stale updates save, and what does it cost where nothing is stale?

    python -m benchmarks.update_filter --json

One TBE on one thread, forward and backward with its fused row-wise Adagrad, against itself without the filter: a
filter is attached for its turn only, so memory and data are the same. The JSON's keys:

``overhead_at_0``       a session with its default configuration attached and nothing stale yet, step() included, over
                        stock: medians. ``overhead_at_0_mean`` is of means, so that the rare decisions count.
``speedup``             stock over filtered, medians, by share of look-ups whose rows are stale; random rows.
``speedup_popular``     the same where the stale rows are the most looked-up ones.
``speedup_sampling``    the same where this share of all look-ups is sampled away from the least popular rows, as the
                        default configuration does; what is kept is drawn, so this is not a part of ``exact``.
``..._backward``        as the above, of the backward alone.
``speedup_by_dim``      ``speedup`` at other embedding dims.
``measured_share``      the share of look-ups that was in fact left out.
``exact``               whether outputs and live rows equalled stock's bit for bit, and stale rows stood still.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import harness
from benchmarks.harness import Row, Timing, interleaved
from benchmarks.tables import Sizes, choose_stale, count_lookups, find_difference, make_batches, make_filter, make_tbe
from torchrec_slipstream import AccessConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.tbe import Sampling, UpdateFilter

# What is left out, by the key under which its speedups stand.
KINDS = {"speedup": "random rows", "speedup_popular": "most popular rows", "speedup_sampling": "sampling"}


class Bench:
    """A TBE, its traffic, and providers that run one step of it."""

    def __init__(self, sizes: Sizes, device: str) -> None:
        self.sizes = sizes
        self.device = device
        self.batches, self.offsets = make_batches(sizes, device)
        self.counts = count_lookups(sizes, self.batches)
        self.tbe = make_tbe(sizes, device)
        generator = torch.Generator().manual_seed(sizes.seed + 1)
        self.gradient = torch.randn(sizes.batch, sizes.tables * sizes.dim, generator=generator).to(device)
        self.backward_seconds: dict[str, list[float]] = {}

    def step(self, name: str, number: int) -> None:
        """Forward and backward over one batch; on a CPU the backward's own time is kept under ``name``."""
        output = self.tbe(self.batches[number % len(self.batches)], self.offsets)
        began = time.perf_counter()
        output.backward(self.gradient)
        self.backward_seconds.setdefault(name, []).append(time.perf_counter() - began)

    def time(
        self,
        filters: dict[str, UpdateFilter | None],
        rounds: int,
        warmup: int,
        title: str,
        after_step: Callable[[str], None] = lambda name: None,
    ) -> dict[str, Timing]:
        """Times of a step with each filter (None is stock) and what is to be done after it.

        In one round they get different batches, so that none finds its rows in the cache because another has just
        used them; over the rounds all get all batches. A step that is not timed follows each change of the TBE's
        class: Python forgets what it had learnt of the class's methods, which costs that step 2%; users attach once.
        """
        apart = max(1, len(self.batches) // len(filters))
        shift = {name: i * apart for i, name in enumerate(filters)}
        attached: list[UpdateFilter] = []

        def before(name: str, turn: int) -> None:
            while attached:
                attached.pop().detach()
            if (update_filter := filters[name]) is not None:
                update_filter.attach()
                attached.append(update_filter)
            counts = self.backward_seconds
            self.backward_seconds = {}
            self.step(name, turn + shift[name] + apart // 2)
            self.backward_seconds = counts

        def run(name: str, turn: int) -> None:
            self.step(name, turn + shift[name])
            after_step(name)

        timings = interleaved(
            {name: partial(run, name) for name in filters},
            rounds,
            warmup,
            device=self.device,
            title=title,
            before=before,
        )
        while attached:
            attached.pop().detach()
        return timings


def measure_overhead(bench: Bench, rounds: int, warmup: int, count_every: int | None) -> dict[str, Timing]:
    """Stock, and a session that has not begun to skip: it counts, and decides every interval that nothing is stale."""
    config = SlipstreamConfig(
        staleness=StalenessConfig(warmup_steps=2**40), access=AccessConfig(every=count_every or AccessConfig().every)
    )
    session = Slipstream(nn.ModuleList([bench.tbe]), config)
    # A session attaches for good; here it must step aside for stock's turns.
    (update_filter,) = session._filters
    update_filter.detach()

    def after_step(name: str) -> None:
        if name == "session":
            session.step()

    return bench.time({"stock": None, "session": update_filter}, rounds, warmup, "session, nothing stale", after_step)


def measure_shares(
    bench: Bench, shares: list[float], rounds: int, warmup: int, kind: str
) -> tuple[dict[str, Timing], dict[str, Timing], dict[str, UpdateFilter]]:
    """Stock and a filter a share: times of steps, of their backwards, and the filters with what they counted."""
    filters = {f"{share:g}": _filter_for(bench, share, kind) for share in shares}
    bench.backward_seconds = {}
    timings = bench.time({"stock": None, **filters}, rounds, warmup, kind)
    backward = {name: Timing(tuple(seconds[warmup:])) for name, seconds in bench.backward_seconds.items()}
    return timings, backward, filters


def _filter_for(bench: Bench, share: float, kind: str) -> UpdateFilter:
    if kind != "sampling":
        order_by = "popular" if kind == "most popular rows" else "random"
        return make_filter(bench.tbe, choose_stale(bench.counts, share, order_by, seed=bench.sizes.seed))
    # As the tracker does by default: the least popular rows, as many as it takes at tail_share.
    defaults = StalenessConfig()
    sampled = min(1.0, share / defaults.tail_share) if defaults.tail_share else 1.0
    update_filter = make_filter(bench.tbe, choose_stale(bench.counts, sampled, "rare"))
    # The samples' gradients are all of about one size here, so the scale is the share that is kept.
    update_filter.sampling = Sampling(scale=1.0 - share / sampled, least=defaults.min_probability)
    return update_filter


def check_exact(bench: Bench, filters: list[UpdateFilter]) -> str | None:
    """Compare a step of every filter with a twin's stock step: what differs, or None. Doubles the tables' memory."""
    twin = make_tbe(bench.sizes, bench.device)
    for mine, theirs in zip(
        [*bench.tbe.split_embedding_weights(), *(s for one in bench.tbe.split_optimizer_states() for s in one)],
        [*twin.split_embedding_weights(), *(s for one in twin.split_optimizer_states() for s in one)],
        strict=True,
    ):
        theirs.detach().copy_(mine.detach())
    problems = [
        find_difference(bench.tbe, twin, one, bench.batches[i % len(bench.batches)], bench.offsets, bench.gradient)
        for i, one in enumerate(filters)
    ]
    return next((problem for problem in problems if problem is not None), None)


def _ratios(timings: dict[str, Timing]) -> dict[str, float]:
    return {name: timings["stock"].p50 / timing.p50 for name, timing in timings.items() if name != "stock"}


def _share(one: UpdateFilter) -> float:
    return float(one.skipped.sum() / one.lookups.sum())


def _rows(
    question: str, args: argparse.Namespace, timings: dict[str, Timing], dim: int | None = None, **quality: Any
) -> list[Row]:
    """One CSV row a provider, in milliseconds; ``quality`` maps a name to a value, or to a dict by provider."""
    parameters = {**asdict(_sizes(args)), "rounds": len(timings["stock"].samples), "warmup": args.warmup}
    if dim is not None:
        parameters["dim"] = dim
    if "session" in timings:
        parameters["count_every"] = args.count_every or AccessConfig().every
    return [
        Row(
            question=question,
            provider=name if name in ("stock", "session") else f"filter {name}",
            parameters=parameters | ({"share": float(name)} if name not in ("stock", "session") else {}),
            timing=Timing(tuple(1e3 * sample for sample in timing.samples)),
            unit="ms",
            quality={
                key: value.get(name) if isinstance(value, dict) else value
                for key, value in {"mean": 1e3 * timing.mean, **quality}.items()
            },
            device=args.device,
        )
        for name, timing in timings.items()
    ]


def _sizes(args: argparse.Namespace) -> Sizes:
    return Sizes(**{name: getattr(args, name) for name in asdict(Sizes())})


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(
        "update_filter", "Time saved by the update filter, and its cost where nothing is stale."
    )
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--more-dims", type=int, nargs="*", default=[32, 64, 128], help="random rows at these as well")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.75, 0.95], help="of look-ups, to be stale")
    parser.add_argument("--rounds", type=int, default=96, help="measured rounds for the speedups")
    parser.add_argument("--overhead-rounds", type=int, default=250, help="measured rounds for the overhead")
    parser.add_argument("--warmup", type=int, default=8, help="rounds thrown away")
    parser.add_argument("--count-every", type=int, help="AccessConfig.every (default: its own default)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, check, record and print; the result that is printed."""
    args = parse_arguments(argv)
    harness.keep_freed_memory()
    bench = Bench(_sizes(args), args.device)
    overhead = measure_overhead(bench, args.overhead_rounds, args.warmup, args.count_every)
    rows = _rows("update_filter.overhead_at_0", args, overhead)
    result: dict[str, Any] = {
        "overhead_at_0": overhead["session"].p50 / overhead["stock"].p50,
        "overhead_at_0_mean": overhead["session"].mean / overhead["stock"].mean,
    }
    measured, all_filters = {}, []
    for key, kind in KINDS.items():
        steps, backward, filters = measure_shares(bench, args.shares, args.rounds, args.warmup, kind)
        result[key] = _ratios(steps)
        result[f"{key}_backward"] = _ratios(backward)
        measured[key] = {name: _share(one) for name, one in filters.items()}
        rows += _rows(f"update_filter.{key}", args, steps, measured_share=measured[key], speedup=result[key])
        if kind != "sampling":
            all_filters += list(filters.values())
    result["speedup_by_dim"] = {str(args.dim): result["speedup"]}
    for dim in args.more_dims:
        other = Bench(replace(bench.sizes, dim=dim), args.device)
        steps, _, _ = measure_shares(other, args.shares, args.rounds // 2, args.warmup, "random rows")
        result["speedup_by_dim"][str(dim)] = _ratios(steps)
        rows += _rows("update_filter.speedup", args, steps, dim=dim, speedup=_ratios(steps))
        del other
    result["measured_share"] = measured
    result["ms"] = {"stock": 1e3 * overhead["stock"].p50, "session": 1e3 * overhead["session"].p50}
    problem = check_exact(bench, all_filters)
    result["exact"] = problem is None
    rows = [replace(row, quality={**row.quality, "exact": result["exact"]}) for row in rows]
    if problem is not None:
        print(f"NOT EXACT: {problem}", file=sys.stderr)
    print(show(result))
    return harness.finish(args, result, rows)


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [
        f"nothing stale: {result['overhead_at_0']:.3f} of stock's step (means {result['overhead_at_0_mean']:.3f}), "
        f"{result['ms']['session']:.2f} against {result['ms']['stock']:.2f} ms",
        "stock's step over ours (its backward over ours):",
        f"{'left out':<10}" + "".join(f"{kind:>20}" for kind in KINDS.values()),
    ]
    for share in result["speedup"]:
        cells = [f"{result[key][share]:.2f} ({result[f'{key}_backward'][share]:.2f})" for key in KINDS]
        lines.append(f"{float(share):<10.0%}" + "".join(f"{cell:>20}" for cell in cells))
    lines.append("random rows, by embedding dim:")
    for dim, speedup in result["speedup_by_dim"].items():
        lines.append(f"{dim:>10}" + "".join(f"{float(share):>9.0%}: {ratio:.2f}" for share, ratio in speedup.items()))
    lines.append(f"exact: {'yes' if result['exact'] else 'NO'}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
