"""Prints a plan: TorchRec's own statistics, and below them the rows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torchrec.distributed.planner.stats import EmbeddingStats
from torchrec.distributed.planner.types import Stats

from torchrec_slipstream.budget import format_bytes
from torchrec_slipstream.placement.placement import Placement

logger = logging.getLogger(__name__)


class SlipstreamStats(Stats):
    """TorchRec's ``EmbeddingStats``, and a box in its style with hot rows, hit rate and bytes a table.

    Both go to the log at INFO, TorchRec's to its own logger.

    Args:
        placement: gives the placement of the plan that is logged, or None where there is no plan.
        stock: TorchRec's statistics; None for ours alone.
    """

    def __init__(self, placement: Callable[[], Placement | None], stock: Stats | None = None) -> None:
        self._placement = placement
        self._stock = stock if stock is not None else EmbeddingStats()

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log the plan; the arguments are those of TorchRec's ``Stats.log``, in the order of its release."""
        self._stock.log(*args, **kwargs)
        placement = self._placement()
        if placement is not None:
            for line in boxed(placement):
                logger.info(line)


def boxed(placement: Placement) -> list[str]:
    """The placement as lines of one width in a box of ``#``."""
    header = ["Table", "Kernel", "Sharding", "Rows", "Hot rows", "Hot", "Hit rate", "HBM", "Host"]
    rows = [
        [
            table.fqn,
            table.kernel,
            table.sharding_type,
            f"{table.rows:,}",
            f"{table.hot_rows:,}",
            f"{table.hot_rows / table.rows:.1%}" if table.rows else "-",
            "-" if table.hit_rate != table.hit_rate else f"{table.hit_rate:.1%}",
            format_bytes(table.hbm_bytes),
            format_bytes(table.host_bytes),
        ]
        for table in placement.tables.values()
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str]) -> str:
        # Names to the left, figures to the right.
        return "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )

    totals = summary(placement)
    body = [line(header), line(["-" * width for width in widths]), *map(line, rows), "", *totals]
    width = max(86, *map(len, body))
    title = "--- Row Placement ---"
    edge = "#" * (width + 4)
    return ["", edge, f"# {title:^{width}} #", f"# {'':{width}} #", *(f"# {text:{width}} #" for text in body), edge]


def summary(placement: Placement) -> list[str]:
    """What the plan comes to, in a few lines."""
    devices = len(placement.hbm_bytes)
    rate = placement.hit_rate
    if not any(placement.hbm_capacity):
        host = max(placement.host_bytes)
        return [
            f"{devices} device(s) without HBM: nothing is hot, all rows are in host memory",
            f"Host memory: {format_bytes(host)} of {format_bytes(placement.host_capacity[0])} on the fullest device",
            f"Expected: {placement.expected_ms:.3g} ms a step for the embeddings of the slowest device",
        ]
    fullest = max(range(devices), key=lambda rank: placement.hbm_bytes[rank])
    placed = max(placement.placed_on(rank) for rank in range(devices))
    return [
        f"Expected with these rows pinned: {'-' if rate != rate else f'{rate:.2%}'} of look-ups, "
        f"{sum(shard.misses for shard in placement.shards):,.0f} distinct cold rows a step",
        f"HBM: hot rows and whole tables take {format_bytes(placed)} of the budget of "
        f"{format_bytes(placement.hbm_budget)} a device ({devices} device(s), the fullest)",
        f"HBM with inputs, outputs and what every row needs: {format_bytes(placement.hbm_bytes[fullest])} of "
        f"{format_bytes(placement.hbm_capacity[fullest])} (rank {fullest})",
        f"Host memory: {format_bytes(max(placement.host_bytes))} of {format_bytes(placement.host_capacity[0])} on the "
        "fullest device",
        f"Expected: {placement.expected_ms:.3g} ms a step for the embeddings of the slowest device",
    ]
