"""Sizes of memory, read and written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream.budget import format_bytes, parse_bytes
from torchrec_slipstream.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0), (4096, 4096), (np.int64(4096), 4096), (np.uint32(7), 7), ("4096", 4096), ("0", 0),
        ("10B", 10), ("8GiB", 8 * 2**30), ("1.5 TB", 15 * 10**11),
        (" 500MB ", 5 * 10**8), ("0.5KiB", 512), ("3KB", 3000), (".5MiB", 2**19), ("2TiB", 2**41),
    ],
)  # fmt: skip
def test_sizes_are_read(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size
    assert type(parse_bytes(text)) is int


@pytest.mark.parametrize(
    "bad", ["8Gb", "8 gib", "", "GiB", "-1GiB", "1.2.3GB", "1e9", -1, True, None, 1.5, np.int64(-1), np.True_, "nan"]
)
def test_what_is_no_size_is_refused_by_name(bad: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"is not a size of memory; give bytes as a whole number, or a string"
    ) as error:
        parse_bytes(bad)
    assert repr(bad) in str(error.value)


@pytest.mark.parametrize("bad", ["0.25", ".5", "1.0", "4096.", "0.5B", "1.5 B"])
def test_fractions_of_a_byte_are_refused_with_what_may_be_meant(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"bytes are whole; give a unit as in '8GiB'") as error:
        parse_bytes(bad)
    assert repr(bad) in str(error.value)
    assert "a float such as 0.25 (on the command line 25%)" in str(error.value)


@given(st.integers(0, 2**53))
def test_what_is_written_reads_back_closely(size: int) -> None:
    assert parse_bytes(format_bytes(size).replace(",", "")) == pytest.approx(size, rel=6e-3)
