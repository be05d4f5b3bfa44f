"""How many bytes does a table's training take, and how many does a session add, over rows?

    python -m benchmarks.memory --json

On a CPU, in a forked process for every provider: a stock TBE with row-wise Adagrad has taken a step, and what it takes
is the provider ``torchrec_fused``. Then a session is attached, every row is looked up once, the session decides what is
stale and, where it has a budget, which rows are hot; what is held then in addition is that provider's. So these are
what a session takes at most: of a row that was never looked up there is no state of staleness.

``ours_counting``   look-ups are counted, nothing else;
``ours_half_life``  the same, and counts fade;
``ours_sketch``     look-ups counted by a sketch a table, whatever its size;
``ours``            updates are left out: the default selection, rows enough trained after one look-up;
``ours_movement``   the same by Slipstream's signal, which needs a snapshot of the weights;
``ours_hot_rows``   counting, and an overlay for ``--hot`` of the rows' bytes, with re-plans; nothing left out.

The JSON, by size (``"rows x dim"``) and provider:

``bytes``          of all tensors there are, and of sketches by their own account.
``bytes_per_row``  those over all rows.
``documented``     what ``tbe/memory.py`` and the docstrings of ``config.py`` make of it.
``process``        by how much the process's own resident memory grew. It checks ``bytes``: what was never written to is
                   not in it, and what the allocator and libraries keep is, some MiB.
``parts``          of ``bytes``, by what they are for; ``others`` is what no part was found for.
"""

from __future__ import annotations

import argparse
import gc
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import harness
from benchmarks.forks import give_back_freed_memory, in_a_fork
from benchmarks.harness import Row, Timing
from benchmarks.tables import Sizes, make_tbe
from torchrec_slipstream import AccessConfig, PlacementConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.staleness.pool import RowPool
from torchrec_slipstream.tbe.memory import SESSION_BYTES, SLOT_WORD_BYTES, optimizer_state

PROVIDERS = (
    *("torchrec_fused", "ours_counting", "ours_half_life", "ours_sketch", "ours", "ours_movement", "ours_hot_rows"),
)
# Steps after which a session decides: one looks every row up, one just a few, so that no large batch is held.
_STEPS = 2
# Of the batch that looks every row up, a table.
_BAGS = 64
# Of book-keeping, of a row that is hot, with re-plans; and with re-plans of every row that can be: PlacementConfig.
_HOT_ROW_BYTES, _REPLANNED_ROW_BYTES = 8 + 12, 8


def config_of(provider: str, sizes: Sizes, hot: float) -> SlipstreamConfig:
    """The session's configuration."""
    selection: dict[str, Any] = {"selection": "threshold", "signal": "movement"} if provider == "ours_movement" else {}
    share = 0.5 if provider in ("ours", "ours_movement") else 0.0
    staleness = StalenessConfig(
        target_share=share, where="everywhere", warmup_steps=0, interval=_STEPS, min_touches=1, **selection
    )
    access = AccessConfig(
        counter="sketch" if provider == "ours_sketch" else "exact",
        half_life=_STEPS if provider == "ours_half_life" else None,
    )
    placement = PlacementConfig()
    if provider == "ours_hot_rows":
        budget = _slots(sizes, hot) * _row_bytes(sizes) + SLOT_WORD_BYTES * sizes.tables * sizes.rows
        placement = PlacementConfig(hbm_budget=budget, replan_every=_STEPS, min_gain=0.0, max_stall_share=None)
    return SlipstreamConfig(staleness=staleness, access=access, placement=placement)


def documented(provider: str, sizes: Sizes, config: SlipstreamConfig, hot: float) -> int:
    """What the documentation says that it takes."""
    rows = sizes.tables * sizes.rows
    if provider == "torchrec_fused":
        return rows * _row_bytes(sizes)
    if provider == "ours_sketch":
        return sizes.tables * min(sizes.rows, config.access.sketch_rows) * 60
    taken = rows * SESSION_BYTES
    if provider == "ours_half_life":
        taken += 4 * rows
    if provider in ("ours", "ours_movement"):
        of_pool = RowPool.STATE_BYTES + (4 * sizes.dim if provider == "ours_movement" else 0)
        taken += min(rows * of_pool, config.staleness.memory_bytes)
    if provider == "ours_hot_rows":
        slots = _slots(sizes, hot)
        taken += slots * (_row_bytes(sizes) + _HOT_ROW_BYTES) + rows * (SLOT_WORD_BYTES + _REPLANNED_ROW_BYTES)
    return taken


def _slots(sizes: Sizes, hot: float) -> int:
    return int(hot * sizes.tables * sizes.rows)


def _row_bytes(sizes: Sizes) -> int:
    return 4 * sizes.dim + optimizer_state("rowwise_adagrad").row_bytes(sizes.dim)


def parts_of(session: Slipstream) -> dict[str, int]:
    """What the session's tensors are for, in bytes."""
    parts: dict[str, list[Tensor]] = {name: [] for name in ("counts", "patterns", "pool", "slots", "slot_words")}
    parts |= {"slots_book_keeping": [], "replanning": []}
    for one in session._filters:
        parts["counts"] += [one.counts.touches, *([] if one.counts.faded is None else [one.counts.faded])]
        parts["patterns"].append(one.patterns)
    for tracked in session._tracker._tbes:
        parts["pool"] += [value for value in vars(tracked.pool).values() if isinstance(value, Tensor)]
        parts["pool"] += tracked.pool.snapshots
    for overlay in session._hot.overlays:
        if overlay is not None:
            parts["slot_words"].append(overlay.words)
            parts["slots"] += chain.from_iterable(pool.tensors for pool in overlay.pools)
            parts["slots_book_keeping"] += [pool.owner for pool in overlay.pools]
    for planner in chain.from_iterable(one._pools for one in session._hot._replanners if one is not None):
        parts["slots_book_keeping"] += [planner.since, planner._owner]
        parts["replanning"] += [planner.forecast.before, planner.forecast.recent, planner.forecast.lasting]
    sketches = sum(sketch.nbytes for one in session._filters for sketch in one.sketches.values())
    return {name: sum(map(_bytes, tensors)) for name, tensors in parts.items()} | {"sketches": sketches}


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def all_tensors() -> int:
    """Bytes of the memories of all tensors in this process."""
    gc.collect()
    # By type(): isinstance() would ask torch's deprecated objects for their class, and they warn.
    tensors = (one for one in gc.get_objects() if issubclass(type(one), Tensor) and not one.is_meta)
    held = (one.untyped_storage() for one in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def resident() -> int:
    """Bytes of this process's own memory that are resident: no files, no shared ones. 0 where Linux does not say."""
    give_back_freed_memory()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def measure(provider: str, sizes: Sizes, hot: float) -> dict[str, Any]:
    """Train a TBE, with the provider's session where it is one, in this process: what that took."""
    begun = all_tensors(), resident()
    tbe = make_tbe(sizes)
    a_few = torch.zeros(sizes.tables, dtype=torch.int64), torch.arange(sizes.tables + 1)
    _train(tbe, *a_few)
    stock = all_tensors(), resident()
    if provider == "torchrec_fused":
        return {"bytes": stock[0] - begun[0], "process": stock[1] - begun[1], "parts": {}}
    config = config_of(provider, sizes, hot)
    session = Slipstream(nn.ModuleList([tbe]), config)
    # Bags of as many rows as make few of them, for a small output.
    begins = torch.linspace(0, sizes.rows, _BAGS + 1).long()[:-1] + sizes.rows * torch.arange(sizes.tables)[:, None]
    ends = torch.cat([begins.ravel(), torch.tensor([sizes.rows * sizes.tables])])
    _train(tbe, torch.arange(sizes.rows).repeat(sizes.tables), ends)
    session.step()
    del begins, ends
    _train(tbe, *a_few)  # as small as stock's: FBGEMM holds on to its last batch
    session.step()
    parts = parts_of(session)
    taken = all_tensors() - stock[0] + parts["sketches"]
    parts["others"] = taken - sum(parts.values())
    return {"bytes": taken, "process": resident() - stock[1], "parts": parts}


def _train(tbe: SplitTableBatchedEmbeddingBagsCodegen, indices: Tensor, offsets: Tensor) -> None:
    tbe(indices, offsets).sum().backward()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.make_parser("memory", "Bytes that a table's training takes, and that a session adds.")
    parser.add_argument(
        "--rows", type=harness.whole_number, nargs="+", default=[10**5, 10**6, 10**7], help="of all tables together"
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64], help="more than the first: fewest rows only")
    parser.add_argument("--tables", type=int, default=4)
    parser.add_argument("--hot", type=float, default=0.1, help="share of the rows that can be hot")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0.0 < args.hot <= 1.0:
        parser.error(f"--hot {args.hot:g}: give a share of the rows, above 0 and at most 1")
    if min(args.rows) < 1000 * args.tables:
        parser.error(f"--rows {min(args.rows)}: give 1000 a table or more, to tell them from what is there anyway")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, record and print; the result that is printed."""
    args = parse_arguments(argv)
    points = [(rows, args.dims[0]) for rows in args.rows] + [(min(args.rows), dim) for dim in args.dims[1:]]
    keys = ("bytes", "bytes_per_row", "documented", "process", "parts")
    result: dict[str, Any] = {key: {} for key in (*keys, "not_run")}
    records: list[Row] = []
    for rows, dim in tqdm(points, unit="size"):
        sizes = Sizes(tables=args.tables, rows=rows // args.tables, dim=dim, seed=args.seed)
        size = f"{rows:,} x {dim}"
        for provider in args.providers:
            found = in_a_fork(partial(measure, provider, sizes, args.hot), args.limit)
            if isinstance(found, str):
                result["not_run"].setdefault(size, {})[provider] = found
                continue
            of_docs = documented(provider, sizes, config_of(provider, sizes, args.hot), args.hot)
            found |= {"bytes_per_row": found["bytes"] / (sizes.tables * sizes.rows), "documented": of_docs}
            for key in keys:
                result[key].setdefault(size, {})[provider] = found[key]
            parameters = {"rows": rows, "dim": dim, "tables": args.tables, "optimizer": "rowwise_adagrad"}
            parameters |= {"hot": args.hot} if provider == "ours_hot_rows" else {}
            quality = {key: found[key] for key in keys[1:]}
            records.append(Row("memory", provider, parameters, Timing((float(found["bytes"]),)), "bytes", quality))
    print(show(result))
    return harness.finish(args, result, records)


def show(result: dict[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'rows x dim':<18}{'':<16}{'MiB':>10}{'a row':>9}{'documented':>12}{'process':>9}  parts, bytes a row"]
    for size, by_provider in result["bytes"].items():
        for name, taken in by_provider.items():
            per_row = result["bytes_per_row"][size][name]
            documented, process = (result[key][size][name] / taken * per_row for key in ("documented", "process"))
            parts = {part: value / taken * per_row for part, value in result["parts"][size][name].items()}
            listed = ", ".join(f"{part} {value:.2f}" for part, value in parts.items() if value >= 0.005)
            lines.append(
                f"{size:<18}{name:<16}{taken / 2**20:>10.2f}{per_row:>9.2f}{documented:>12.2f}{process:>9.2f}  {listed}"
            )
    for size, reasons in result["not_run"].items():
        lines += [f"{size:<18}{name:<16} {reason}" for name, reason in reasons.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
