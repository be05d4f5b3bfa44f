"""What can this machine's memories do at best, and how long does an embedding step take at least?

    python -m benchmarks.floor --device cuda --out memories.json --json

Bandwidths, one direction at a time (``placement.calibration`` measures both together, for the planner): a GPU's kernels
gather and scatter random rows of host memory, in UVM as FBGEMM's MANAGED tables have them and host-mapped as with
``uvm_host_mapped``; the copy engine moves pinned memory; rows and whole buffers are read and written in HBM. The rows
of one read or write are distinct, and lie in a buffer of ``--buffer-bytes``.

The floor of a step (:func:`floor_ms`): each distinct cold row of the batch crosses the bus once to be read and, if it
is live, once to be written, with the optimizer state that lies in host memory; each distinct hot row is read once and,
if it is live, written once in HBM; the outputs are written and their gradients read in HBM; all this at the best
bandwidth that anything reached here, one thing after the other. (A pipeline that reads the next batch's rows while it
writes this one's could use both directions of the bus at once; a single step cannot.)

On a CPU there is one memory: rows are gathered and scattered in it and buffers copied, and the result says so. No bus
is measured, and no floor is to be told from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Row, Timing, interleaved
from torchrec_slipstream.installed import processor
from torchrec_slipstream.tbe.memory import optimizer_state
from torchrec_slipstream.tbe.uvm import managed_rows

GIB = 2**30
# Different rows each time, prepared ahead; more would only take memory.
_ID_SETS = 8


@dataclass(frozen=True)
class Memories:
    """The best bandwidths measured, in bytes a millisecond: host memory read and written from where embeddings are
    computed, and that place's own memory. ``device`` is "cpu" where all three are the one memory."""

    device: str
    machine: str
    row_bytes: int
    host_read: float
    host_write: float
    own: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Memories:
        """Read what :meth:`save` wrote. Raises TypeError or ValueError if it is something else."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class StepBytes:
    """What one step has to move at least, in bytes."""

    host_read: int
    host_write: int
    own: int


def step_bytes(
    *, cold: int, cold_live: int, hot: int, hot_live: int, lookups: int, bags: int, dim: int, optimizer: str
) -> StepBytes:
    """The least bytes of a step over float32 tables in host memory.

    Args:
        cold: distinct cold rows of the batch; ``cold_live`` of them are updated. ``hot`` likewise.
        lookups: of the batch, an int64 index each.
        bags: outputs of ``dim`` float32 values, and as many gradients.
        optimizer: one of ``tbe.memory.OPTIMIZERS``. A row's state of one value is in HBM, as FBGEMM has it for every
            row of a MANAGED table; state of a value a weight is where the row is.
    """
    state = optimizer_state(optimizer)
    weights, beside = 4 * dim, state.rowwise_bytes
    whole = state.row_bytes(dim) - beside
    live = cold_live + hot_live
    return StepBytes(
        # State is read only of what is updated.
        host_read=cold * weights + cold_live * whole,
        host_write=cold_live * (weights + whole),
        own=hot * weights
        + hot_live * (weights + 2 * whole)
        + 2 * beside * live
        + 2 * bags * weights  # the output and its gradient
        + 8 * lookups,
    )


def floor_ms(memories: Memories, moved: StepBytes) -> float:
    """Milliseconds that the step takes at least."""
    host = moved.host_read / memories.host_read + moved.host_write / memories.host_write
    return host + moved.own / memories.own


def buffers(device: str, size: int) -> dict[str, Tensor]:
    """Float32 ``[size / 4]`` by the memory that it lies in, every page of it touched."""
    if device == "cpu":
        made = {"own": torch.zeros(size // 4)}
    else:
        where = torch.device(device, torch.cuda.current_device())
        prototype = torch.zeros(1, device=where)
        made = {
            "managed": managed_rows(size // 4, 1, where).view(-1),
            "host_mapped": torch.ops.fbgemm.new_unified_tensor(prototype, [size // 4], is_host_mapped=True),
            "own": torch.zeros(size // 4, device=where),
        }
    for buffer in made.values():
        buffer.fill_(1.0)  # zeros alone may all be one page of the kernel's
    return made


def measure(
    device: str, row_bytes: int, held: dict[str, Tensor], *, moved_bytes: int, rounds: int
) -> tuple[Memories, dict[str, Timing]]:
    """The bandwidths, and the samples of each way to move bytes, in bytes a millisecond.

    Args:
        held: the :func:`buffers`.
        moved_bytes: that one sample moves, at most half a buffer.
    """
    size = 4 * held["own"].numel()
    if row_bytes < 4 or row_bytes % 4 or not row_bytes <= moved_bytes <= size // 2:
        raise ValueError(
            f"row_bytes={row_bytes}, moved_bytes={moved_bytes}, buffers of {size}: give rows of a multiple of 4 bytes, "
            "a sample of one row or more, and buffers of at least two samples"
        )
    rows, dim, count = size // row_bytes, row_bytes // 4, moved_bytes // row_bytes
    generator = torch.Generator(device=device).manual_seed(0)
    ids = [torch.randperm(rows, generator=generator, device=device)[:count] for _ in range(_ID_SETS)]
    taken, other = (torch.ones(count, dim, device=device) for _ in range(2))
    ways: dict[str, Callable[[int], object]] = {}
    for place, buffer in held.items():
        table = buffer[: rows * dim].view(rows, dim)
        ways[f"read_rows_{place}"] = partial(_read, table, ids, taken)
        ways[f"write_rows_{place}"] = partial(_write, table, ids, taken)
    ways["copy_own"] = lambda turn: other.copy_(taken)
    if device != "cpu":
        pinned = torch.zeros(count, dim, pin_memory=True)
        ways["copy_host_to_device"] = lambda turn: other.copy_(pinned, non_blocking=True)
        ways["copy_device_to_host"] = lambda turn: pinned.copy_(taken, non_blocking=True)
    seconds = interleaved(_all(ways), rounds, 2, device=device, title=f"memories, rows of {row_bytes} bytes")
    # A copy within one memory reads and writes it; a gather from or to the device's own memory does as well.
    moved = {name: count * row_bytes * (2 if name.endswith("_own") else 1) for name in ways}
    speeds = {
        name: Timing(tuple(moved[name] / (1e3 * sample) for sample in timing.samples))
        for name, timing in seconds.items()
    }
    return _best(device, row_bytes, speeds), speeds


def measure_here(device: str, row_bytes: int) -> Memories:
    """The best bandwidths, with the benchmark's defaults."""
    size, moved = defaults(device)
    return measure(device, row_bytes, buffers(device, size), moved_bytes=moved, rounds=15)[0]


def _read(table: Tensor, ids: list[Tensor], taken: Tensor, turn: int) -> None:
    torch.index_select(table, 0, ids[turn % len(ids)], out=taken)


def _write(table: Tensor, ids: list[Tensor], taken: Tensor, turn: int) -> None:
    table.index_copy_(0, ids[turn % len(ids)], taken)


def _all(ways: dict[str, Callable[[int], object]]) -> dict[str, Callable[[int], None]]:
    def run(way: Callable[[int], object], turn: int) -> None:
        way(turn)

    return {name: partial(run, way) for name, way in ways.items()}


def _best(device: str, row_bytes: int, speeds: dict[str, Timing]) -> Memories:
    def best(*names: str) -> float:
        return max(speeds[name].p50 for name in names if name in speeds)

    own = best("read_rows_own", "write_rows_own", "copy_own")
    if device == "cpu":
        return Memories(device, processor(), row_bytes, own, own, own)
    return Memories(
        device,
        torch.cuda.get_device_name(),
        row_bytes,
        host_read=best("read_rows_managed", "read_rows_host_mapped", "copy_host_to_device"),
        host_write=best("write_rows_managed", "write_rows_host_mapped", "copy_device_to_host"),
        own=own,
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("floor", "Bandwidths of this machine's memories, one direction at a time.")
    parser.add_argument("--row-bytes", type=int, nargs="+", default=[512, 256, 64], help="the first goes to --out")
    parser.add_argument("--buffer-bytes", type=int, help="of each buffer (default: 4 GiB on a GPU, 256 MiB on a CPU)")
    parser.add_argument("--moved-bytes", type=int, help="a sample (default: 256 MiB on a GPU, 16 MiB on a CPU)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the best bandwidths there, for hbm_budget")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args(argv)


def defaults(device: str) -> tuple[int, int]:
    """Bytes of a buffer, and those that a sample moves: more than any cache holds."""
    return (4 * GIB, GIB // 4) if device != "cpu" else (GIB // 4, GIB // 64)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record and print; the result that is printed."""
    args = parse_arguments(argv)
    buffer_bytes, moved_bytes = defaults(args.device)
    buffer_bytes, moved_bytes = args.buffer_bytes or buffer_bytes, args.moved_bytes or moved_bytes
    result: dict[str, Any] = {"device": args.device, "gigabytes_a_second": {}}
    rows: list[Row] = []
    held = buffers(args.device, buffer_bytes)
    for number, row_bytes in enumerate(args.row_bytes):
        memories, speeds = measure(args.device, row_bytes, held, moved_bytes=moved_bytes, rounds=args.rounds)
        if number == 0:
            result["best"] = asdict(memories)
            if args.out is not None:
                memories.save(args.out)
        result["gigabytes_a_second"][str(row_bytes)] = {name: one.p50 / 1e6 for name, one in speeds.items()}
        parameters = {"row_bytes": row_bytes, "buffer_bytes": buffer_bytes, "moved_bytes": moved_bytes}
        rows += [
            Row(
                question="floor",
                provider=name,
                parameters=parameters | {"rounds": args.rounds},
                timing=Timing(tuple(sample / 1e6 for sample in one.samples)),
                unit="GB/s",
                quality={},
                device=args.device,
            )
            for name, one in speeds.items()
        ]
    if args.device == "cpu":
        print("no GPU: one memory is measured, no bus; there is no floor to tell from it", file=sys.stderr)
    print(show(result))
    return harness.finish(args, result, rows)


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    by_row = result["gigabytes_a_second"]
    lines = [f"{'GB/s, rows of bytes':<22}" + "".join(f"{row_bytes:>10}" for row_bytes in by_row)]
    lines += [
        f"{name:<22}" + "".join(f"{speeds[name]:>10.2f}" for speeds in by_row.values())
        for name in next(iter(by_row.values()))
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
