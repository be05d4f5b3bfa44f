"""Pieces of a page; every text that comes from outside is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def figure(title: str, chart: str, legend: Sequence[tuple[str, str]], note: str = "") -> str:
    """A chart with its title, what its colours mean, and a line of explanation."""
    keys = "".join(
        f'<span class="key"><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in legend
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b><small>{escape(note)}</small><div>{keys}</div></figcaption>"
        f"{chart}</figure>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "", bold: set[str] | None = None) -> str:
    """A table; rows whose first cell is in ``bold`` are set so. Everything is escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for row in rows:
        mark = ("<b>", "</b>") if bold and row[0] in bold else ("", "")
        lines.append("<tr>" + "".join(f"<td>{mark[0]}{escape(cell)}{mark[1]}</td>" for cell in row) + "</tr>")
    inner = (f"<thead><tr>{top}</tr></thead>" if head else "") + f"<tbody>{''.join(lines)}</tbody>"
    return f'<div class="wide"><table class="{kind}">{inner}</table></div>'
