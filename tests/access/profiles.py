"""Access counts for the tests: small ones of every form for property tests, and skewed ones of some size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from torchrec_slipstream.access import AccessProfile, TableAccess


def sparse(table: TableAccess) -> TableAccess:
    """The same counts, as ids and counts."""
    ids, counts = table.looked_up()
    return replace(table, counts=counts, ids=ids)


def dense(table: TableAccess) -> TableAccess:
    """The same counts, one a row."""
    return replace(table, counts=table.counts_of(0, table.rows), ids=None)


@st.composite
def tables(draw: st.DrawFn, name: str = "t", rows: int | None = None, unattributed: bool = True) -> TableAccess:
    """A dense table with many ties and zeros, and the odd large count; sometimes with look-ups of unknown rows."""
    number = rows if rows is not None else draw(st.integers(1, 30))
    count = st.integers(0, 4) | st.sampled_from([0, 1, 70_000, 2**31 - 1])
    counts = draw(st.lists(count, min_size=number, max_size=number))
    lost = draw(st.sampled_from([0, 0, 1, 50])) if unattributed else 0
    return TableAccess(
        name,
        number,
        draw(st.sampled_from([4, 16])) if rows is None else 4,
        np.array(counts, dtype=draw(st.sampled_from([np.int32, np.int64]))),
        lookups=sum(counts) + lost,
        optimizer_bytes=4,
    )


@st.composite
def any_tables(draw: st.DrawFn, name: str = "t", rows: int | None = None) -> TableAccess:
    """A table in either form; a sparse one may list rows that have no look-ups."""
    table = draw(tables(name, rows))
    form = draw(st.sampled_from(["dense", "sparse", "listed"]))
    if form == "dense":
        return table
    return sparse(table) if form == "sparse" else replace(table, ids=np.arange(table.rows))


@st.composite
def profiles(draw: st.DrawFn, sizes: tuple[int, ...] | None = None) -> AccessProfile:
    """One to four tables of any form, with names that no path could have; of the given rows, where given."""
    number = len(sizes) if sizes is not None else draw(st.integers(1, 4))
    names = ["a/b: ü\n", "", "..", "counts_0"][:number]
    parts = [draw(any_tables(name, None if sizes is None else sizes[i])) for i, name in enumerate(names)]
    return AccessProfile(parts, draw(st.integers(0, 1000)), draw(st.integers(1, 5)))


def zipf_counts(rows: int, exponent: float, lookups: int, seed: int = 0) -> np.ndarray:
    """Counts of look-ups drawn from a Zipf distribution, the rows in random order; int32 ``[rows]``."""
    random = np.random.default_rng(seed)
    chances = 1 / np.arange(1, rows + 1) ** exponent
    counts = random.multinomial(lookups, chances / chances.sum()).astype(np.int32)
    random.shuffle(counts)
    return counts
