"""Access profiles of the real Criteo sample, for the tests that read it."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest

from examples.criteo import hash_ids, load_criteo
from torchrec_slipstream.access import AccessProfile, TableAccess

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "criteo_tb_80k.parquet"
ROWS = 100_000
COLUMNS = tuple(f"C{number}" for number in range(1, 27))

needs_criteo = pytest.mark.skipif(not SHARED.exists(), reason=f"{SHARED} is not there")


def hash_column(feature: int, ids: np.ndarray, rows: int = ROWS) -> np.ndarray:
    """Raw ids int64 ``[n]`` of one feature to the rows that examples/criteo.py trains with."""
    return hash_ids(ids.view(np.uint64), feature, rows)


def read_profile(limit: int | slice | None = None, rows: int = ROWS) -> AccessProfile:
    """The profile of some samples, read from parquet."""
    return AccessProfile.from_parquet(
        SHARED,
        COLUMNS,
        embedding_dim=16,
        rows=rows,
        hashing={name: partial(hash_column, feature, rows=rows) for feature, name in enumerate(COLUMNS)},
        null_row=0,
        limit=limit,
    )


@cache
def rows_looked_up() -> np.ndarray:
    """Rows of all samples, int64 ``[80000, 26]``."""
    return load_criteo(SHARED, ROWS).sparse.numpy()


def profile_of(samples: np.ndarray, every: int = 1) -> AccessProfile:
    """The profile of some samples of the file, each counted ``every`` times as if it stood for as many."""
    sparse = rows_looked_up()[samples]
    tables = []
    for feature, name in enumerate(COLUMNS):
        counts = (np.bincount(sparse[:, feature], minlength=ROWS) * every).astype(np.int32)
        tables.append(TableAccess(name, ROWS, 16, counts, optimizer_bytes=4))
    return AccessProfile(tables, len(samples) * every, every)
