"""Sets of rows against plain loops: which look-ups and samples are in them, and how shards are put together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec import KeyedJaggedTensor

from torchrec_slipstream.errors import StateError
from torchrec_slipstream.inputs.rows import RowSets, ShardRows
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.tbe.features import ModelTable

# A table with two features, two that share one, one that is whole in the set, and one that is not in it at all.
TABLES = (
    ModelTable("bags.many", "many", ("a", "b"), 17, 4),
    ModelTable("bags.first", "first", ("c",), 8, 4),
    ModelTable("sequences.second", "second", ("c", "d"), 5, 8),
    ModelTable("bags.whole", "whole", ("e",), 6, 4),
    ModelTable("bags.none", "none", ("f",), 6, 4),
)
KEYS = ["f", "a", "unknown", "c", "b", "e", "d"]
SEEDS = st.integers(0, 2**31)


def random_sets(seed: int) -> tuple[RowSets, dict[str, list[bool]]]:
    """Sets of :data:`TABLES`, and the same as lists."""
    generator = torch.Generator().manual_seed(seed)
    members = {one.fqn: torch.rand(one.rows, generator=generator) < 0.6 for one in TABLES[:3]}
    lists = {fqn: rows.tolist() for fqn, rows in members.items()}
    lists |= {"bags.whole": [True] * 6, "bags.none": [False] * 6}
    return RowSets(TABLES, {**members, "bags.whole": True}), lists


def random_features(seed: int, size: int, dtype: torch.dtype = torch.int64) -> KeyedJaggedTensor:
    """Bags of 0 to 3 ids, some of them no rows of any table."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(KEYS) * size,), generator=generator)
    values = torch.randint(-2, 19, (int(lengths.sum()),), generator=generator).to(dtype)
    far = torch.rand(len(values), generator=generator) < 0.05
    values[far] = torch.iinfo(dtype).max
    return KeyedJaggedTensor(KEYS, values, lengths=lengths)


def bags_of(features: KeyedJaggedTensor) -> list[list[list[int]]]:
    """Ids by key and sample."""
    size, lengths, values = features.stride(), features.lengths().tolist(), features.values().tolist()
    found, begin = [], 0
    for key in range(len(features.keys())):
        found.append([])
        for sample in range(size):
            length = lengths[key * size + sample]
            found[-1].append(values[begin : begin + length])
            begin += length
    return found


def is_in(lists: dict[str, list[bool]], key: str, row: int) -> bool:
    """The definition."""
    tables = [table for table in TABLES if key in table.features]
    return bool(tables) and all(0 <= row < table.rows and lists[table.fqn][row] for table in tables)


@given(seed=SEEDS, size=st.integers(0, 9), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_lookups_and_samples(seed: int, size: int, dtype: torch.dtype) -> None:
    sets, lists = random_sets(seed)
    features = random_features(seed, size, dtype)
    bags = bags_of(features)
    want = [is_in(lists, key, row) for key, of_key in zip(KEYS, bags, strict=True) for bag in of_key for row in bag]
    assert sets.lookups_in(features).tolist() == want

    counts = sets.samples([features])
    known = [(key, of_key) for key, of_key in zip(KEYS, bags, strict=True) if key != "unknown"]
    assert counts.features == tuple(key for key, _ in known)
    assert counts.lookups.tolist() == [[len(bag) for bag in of_key] for _, of_key in known]
    assert counts.inside.tolist() == [[sum(is_in(lists, k, r) for r in bag) for bag in of_key] for k, of_key in known]
    all_inside = [
        all(is_in(lists, key, row) for key, of_key in known for row in of_key[sample]) for sample in range(size)
    ]
    assert counts.all_inside.tolist() == all_inside


def test_several_features_of_one_batch() -> None:
    sets, _ = random_sets(1)
    first, second = (random_features(seed, 7) for seed in (1, 2))
    both, alone = sets.samples([first, second]), [sets.samples([one]) for one in (first, second)]
    assert both.features == alone[0].features + alone[1].features
    assert torch.equal(both.inside, torch.cat([one.inside for one in alone]))
    assert torch.equal(both.all_inside, alone[0].all_inside & alone[1].all_inside)


def test_all_rows_has_only_rows() -> None:
    sets = RowSets.all_rows(TABLES)
    features = KeyedJaggedTensor(["a", "e"], torch.tensor([-1, 0, 16, 17, 5, 6]), lengths=torch.tensor([4, 2]))
    assert sets.lookups_in(features).tolist() == [False, True, True, False, True, False]
    assert sets.sizes() == {table.fqn: table.rows for table in TABLES}


@given(seed=SEEDS)
def test_state_and_digest(seed: int) -> None:
    sets, lists = random_sets(seed)
    again = RowSets.from_state(TABLES, sets.state_dict())
    assert {fqn: again.of(fqn).tolist() for fqn in again.tables} == lists
    assert again.digest == sets.digest
    assert sets.digest != RowSets.all_rows(TABLES).digest
    rows = sets.of("bags.many").clone()
    rows[seed % 17] ^= True
    other = RowSets(TABLES, {fqn: sets.of(fqn) for fqn in sets.tables} | {"bags.many": rows})
    assert other.digest != sets.digest


def test_state_of_other_tables() -> None:
    state = random_sets(0)[0].state_dict()
    with pytest.raises(StateError, match=r"bags\.many"):
        RowSets.from_state(TABLES[1:], state)
    with pytest.raises(StateError, match="other tables"):
        RowSets.from_state([ModelTable("bags.many", "many", ("a",), 99, 4), *TABLES[1:]], state)


@given(seed=SEEDS, columns=st.integers(1, 4), missing=st.booleans())
def test_shards_put_together(seed: int, columns: int, missing: bool) -> None:
    """Column shards whose row shards begin at different rows; a replica; a column shard that nobody watches."""
    random = np.random.default_rng(seed)
    table = ModelTable("t", "t", ("a",), int(random.integers(1, 40)), 2 * columns)
    in_columns = random.random((columns, table.rows)) < 0.7
    shards = []
    for column in range(columns - (missing and columns > 1)):
        cuts = [0, *sorted(random.integers(0, table.rows + 1, size=2)), table.rows]
        for begin, end in itertools.pairwise(cuts):
            if begin < end:
                shards.append(ShardRows("t", int(begin), 2 * column, 2, in_columns[column, begin:end]))
    replica = ShardRows("t", shards[0].row_offset, shards[0].col_offset, 2, ~shards[0].rows)
    want = [bool(in_columns[:, row].all()) and not (missing and columns > 1) for row in range(table.rows)]
    order = random.permutation(len(shards))
    mine = [shards[place] for place in order] + [replica]
    assert RowSets.of_shards([table], mine).of("t").tolist() == want
    assert RowSets.gathered([table], mine, Ranks()).of("t").tolist() == want
    assert RowSets.of_shards([table], mine, whole=["t"]).of("t").all()
