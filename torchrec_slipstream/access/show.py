"""An access profile as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchrec_slipstream.budget import format_bytes

if TYPE_CHECKING:
    from torchrec_slipstream.access.profile import AccessProfile

# Shares of the rows, in percent, of which the hit rate is told.
_TOPS = (1, 5, 10)


def show(profile: AccessProfile) -> str:
    """What each table is, what its most looked-up rows take, and the same of all tables by bytes."""
    tops = [f"top {percent}%" for percent in _TOPS]
    lines: list[tuple[str, ...]] = [("table", "rows", "dim", "size", "look-ups", "a sample", "used rows", *tops)]
    for table in profile.tables.values():
        used = table.histogram.rows[table.histogram.counts > 0].sum()
        hits = [table.hit_rate(max(1, table.rows * percent // 100)) for percent in _TOPS]
        lines.append(
            (
                table.name,
                f"{table.rows:,}",
                str(table.embedding_dim),
                format_bytes(table.rows * table.row_bytes),
                f"{table.lookups:,}",
                f"{profile.pooling_factor(table.name):.3g}",
                f"{used / table.rows:.1%}",
                *(f"{hit:.1%}" for hit in hits),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(width) if not i else cell.rjust(width) for i, (cell, width) in enumerate(row)).rstrip()
        for row in (zip(line, widths, strict=True) for line in lines)
    ]
    counted = "" if profile.sampled_every == 1 else f", one batch in {profile.sampled_every} counted"
    overall = ", ".join(f"{profile.hit_rate(percent / 100):.1%} at {percent}%" for percent in _TOPS)
    return "\n".join([*text, f"{profile.samples:,} samples{counted}; hit rate by share of all bytes hot: {overall}"])
