"""What this machine's memories and links really do when embedding rows are looked up and updated.

TorchRec's planner divides bytes by bandwidths that are constants of its source (897 GiB/s of HBM, 51 of DDR, 32 between
them, whatever the machine). Rows of a few hundred bytes at random places do not come at the speed that a data sheet
promises, so here they are measured the way a table is used: random rows of ``row_bytes`` read, and random rows
written, in a buffer that no cache holds.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.planner import Topology

from torchrec_slipstream.errors import ConfigError
from torchrec_slipstream.installed import processor
from torchrec_slipstream.tbe.uvm import managed_rows
from torchrec_slipstream.writing import whole_file

FORMAT, VERSION = "torchrec_slipstream bandwidths", 1
_NAMES = ("hbm_mem_bw", "ddr_mem_bw", "hbm_to_ddr_mem_bw", "intra_host_bw", "inter_host_bw")
# At least this many repeats, whatever the time: a median of fewer says little.
_LEAST_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Bandwidths:
    """Measured bandwidths in **bytes a millisecond**, TorchRec's unit and names; None where nothing was measured.

    A memory's bandwidth is of rows: the bytes of random rows read and written again, over the time of both.

    Raises:
        ConfigError: a bandwidth is not a positive number.
    """

    hbm_mem_bw: float | None = None
    """A GPU's own memory."""

    ddr_mem_bw: float | None = None
    """Host memory, from the host, with ``threads`` threads."""

    hbm_to_ddr_mem_bw: float | None = None
    """Host memory, from a GPU: rows of an FBGEMM table in UVM, which cross the bus."""

    intra_host_bw: float | None = None
    """What a rank sends to the others in an all-to-all, on one host."""

    inter_host_bw: float | None = None
    """The same, over several hosts."""

    row_bytes: int
    """Bytes of the rows that were measured."""

    threads: int
    """torch's threads in the measuring process."""

    machine: str
    """The GPU's name, or the processor's."""

    def __post_init__(self) -> None:
        for name in _NAMES:
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (is_number and math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value!r} must be a positive number of bytes a millisecond, or None")

    def topology(self, **options: Any) -> Topology:
        """A TorchRec topology of this machine: what was measured, and TorchRec's defaults for the rest.

        Args:
            options: ``Topology``'s own, at least ``world_size`` and ``compute_device``; a bandwidth among them goes
                before the measured one.
        """
        measured = {name: value for name in _NAMES if (value := getattr(self, name)) is not None}
        return Topology(**{**measured, **options})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON; the file appears whole or not at all.

        Raises:
            ConfigError: the path cannot be written.
        """
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"
        with whole_file(path, ConfigError) as whole:
            whole.write_text(text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bandwidths:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: there is no such file, or it is another kind, version or incomplete. The message says which.
        """
        remedy = "measure anew with `slipstream plan --calibrate`"
        try:
            found = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror or error}; give a file of bandwidths, or {remedy}") from error
        except ValueError as error:  # not UTF-8, or not JSON
            raise ConfigError(f"{path} is not a file of bandwidths ({error}); {remedy}") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise ConfigError(f"{path} is not a file of bandwidths; {remedy}")
        if (version := found.pop("version", None)) != VERSION:
            raise ConfigError(f"{path} is of version {version!r}, this package reads {VERSION}; {remedy}")
        if found.keys() != (expected := {field.name for field in fields(cls)}):
            wrong = ", ".join(sorted(found.keys() ^ expected))
            raise ConfigError(f"{path} has missing or unknown values ({wrong}); {remedy}")
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; {remedy}") from error

    def __str__(self) -> str:
        lines = [f"{self.machine}, {self.threads} thread(s), random rows of {self.row_bytes} bytes, read and written"]
        for name in _NAMES:
            value = getattr(self, name)
            lines.append(f"  {name:<18}" + ("not measured" if value is None else f"{value / 1e6:10.2f} GB/s"))
        return "\n".join(lines)


def calibrate(
    device: torch.device | str | None = None,
    *,
    row_bytes: int = 256,
    seconds: float = 3.0,
    buffer_bytes: int | None = None,
) -> Bandwidths:
    """Measure this machine, in about ``seconds`` besides the time to fill the buffers.

    Where a default process group of several ranks is up, this is a collective call that measures the links as well, and
    every rank returns the slowest rank's links. Measure while the machine is otherwise idle, with the threads that the
    training will have.

    Args:
        device: what computes the embeddings; default: CUDA where there is one. On a CPU only host memory is measured.
        row_bytes: of a row as look-ups see it: ``4 * embedding_dim`` for float32. A multiple of 4.
        buffer_bytes: of each buffer; default 512 MiB, or four times the last-level cache if that is more.

    Raises:
        ConfigError: an argument is out of its range, or there is no such device.
    """
    device = _device(device)
    if isinstance(row_bytes, bool) or not isinstance(row_bytes, int) or row_bytes < 4 or row_bytes % 4:
        raise ConfigError(f"row_bytes={row_bytes!r} must be a positive multiple of 4")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ConfigError(f"seconds={seconds!r} must be a positive number")
    if buffer_bytes is None:
        buffer_bytes = max(512 * 2**20, 4 * _cache_bytes(device))
    rows, dim = buffer_bytes // row_bytes, row_bytes // 4
    if rows < 1024:
        raise ConfigError(f"buffer_bytes={buffer_bytes!r} must hold 1024 rows of {row_bytes} bytes or more")
    memories: dict[str, Callable[[], Tensor]] = {"ddr_mem_bw": lambda: torch.zeros(rows, dim)}
    if device.type == "cuda":
        memories["hbm_mem_bw"] = lambda: torch.zeros(rows, dim, device=device)
        memories["hbm_to_ddr_mem_bw"] = lambda: managed_rows(rows, dim, device)
    # One buffer at a time, freed before the next.
    found = {name: _of_rows(make(), seconds / len(memories)) for name, make in memories.items()}
    if dist.is_available() and dist.is_initialized() and (size := dist.get_world_size()) > 1:
        on_one_host = int(os.environ.get("LOCAL_WORLD_SIZE", size)) == size
        found["intra_host_bw" if on_one_host else "inter_host_bw"] = _of_links(device)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return Bandwidths(row_bytes=row_bytes, threads=torch.get_num_threads(), machine=machine, **found)


def _of_rows(table: Tensor, seconds: float) -> float:
    """Bytes a millisecond of random rows of ``table``, float32 ``[rows, dim]``, read and written again."""
    on_gpu = table.device.type == "cuda"
    table.fill_(1.0)  # zeros alone may all be one page of the kernel's
    rows, dim = table.shape
    # Few enough that the rows read stay in a cache, where writing them down costs little; many enough, on a GPU, to
    # fill it. A GPU behind a bus has as many in flight as its cores hold, whatever the batch.
    batch = min(rows, max(1024, (64 if on_gpu else 2) * 2**20 // (4 * dim)))
    taken = torch.empty(batch, dim, device=table.device)
    starts = torch.arange(batch, device=table.device)

    def read(ids: Tensor) -> None:
        if on_gpu:
            torch.index_select(table, 0, ids, out=taken)
        else:  # FBGEMM's kernel inside torch: what a look-up on a CPU runs
            torch.nn.functional.embedding_bag(ids, table, starts, mode="sum")

    def write(ids: Tensor) -> None:
        table.index_copy_(0, ids, taken)

    spent: dict[str, list[float]] = {"read": [], "write": []}
    began = time.perf_counter()
    with torch.no_grad():
        for repeat in range(10_000):
            for name, work in (("read", read), ("write", write)):
                ids = torch.randint(rows, (batch,), device=table.device)
                taken_ms = _milliseconds(work, ids, on_gpu)
                if repeat:  # the first one initialises what it calls
                    spent[name].append(taken_ms)
            if repeat >= _LEAST_REPEATS and time.perf_counter() - began > seconds:
                break
    return 2 * batch * dim * 4 / (median(spent["read"]) + median(spent["write"]))


def _milliseconds(work: Callable[[Tensor], None], ids: Tensor, on_gpu: bool) -> float:
    if not on_gpu:
        began = time.perf_counter()
        work(ids)
        return 1e3 * (time.perf_counter() - began)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(ids.device)
    before.record(stream)
    work(ids)
    after.record(stream)
    after.synchronize()
    return float(before.elapsed_time(after))


def _of_links(device: torch.device) -> float:
    """Bytes a millisecond that a rank sends to the others in an all-to-all. Collective."""
    size = dist.get_world_size()
    on_gpu = "nccl" in dist.get_backend()
    where = device if on_gpu else torch.device("cpu")
    part = (64 if on_gpu else 8) * 2**20 // 4 // size
    sent, received = (torch.zeros(part * size, device=where) for _ in range(2))
    times = []
    # A fixed number, not a time: every rank must take part in each.
    for _ in range(2 + _LEAST_REPEATS):
        dist.barrier()
        times.append(_milliseconds(lambda _: dist.all_to_all_single(received, sent), sent, on_gpu))
    slowest = torch.tensor([median(times[2:])], dtype=torch.float64, device=where)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return 4 * part * (size - 1) / float(slowest)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not a device; give cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={str(device)!r} cannot be measured; give cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch sees no CUDA device; give cpu, or mend the driver")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _cache_bytes(device: torch.device) -> int:
    """Of the largest cache between the memories and what computes."""
    level_2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    try:
        return max(level_2, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (ValueError, OSError):  # not a name on this system
        return level_2
