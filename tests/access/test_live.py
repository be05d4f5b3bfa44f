"""Counting in an attached session, on real TBEs: the profile equals a loop over the batches that were trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.tables import TBE, Lookups, make_lookups, make_tbe
from torchrec_slipstream import AccessConfig, AttachError, ConfigError, Slipstream, SlipstreamConfig
from torchrec_slipstream import StalenessConfig as Staleness
from torchrec_slipstream.access import AccessProfile
from torchrec_slipstream.access.merging import Part, PartInfo, merge
from torchrec_slipstream.errors import ProfileError
from torchrec_slipstream.ranks import Ranks

ROWS = (50, 30)
ALONE = Ranks()
FEATURES = (0, 1, 1)  # the second table is shared by two features


def attach(model: nn.Module, target_share: float = 0.0, **access: Any) -> Slipstream:
    model = nn.ModuleList([model]) if isinstance(model, TBE) else model
    staleness = Staleness(target_share=target_share, interval=10, warmup_steps=20, min_touches=2)
    return Slipstream(model, SlipstreamConfig(staleness=staleness, access=AccessConfig(**access)))


def step(session: Slipstream, tbe: TBE, lookups: Lookups) -> None:
    lookups.run(tbe).square().sum().backward()
    session.step()


def true_counts(batches: Sequence[Lookups], bags: Sequence[int], features: Sequence[int] = FEATURES) -> list[list[int]]:
    """Look-ups of every row of every table, one by one."""
    counts = [[0] * rows for rows in ROWS]
    for batch in batches:
        bag = 0
        for table, count in zip(features, bags, strict=True):
            for one in range(bag, bag + count):
                for at in range(int(batch.offsets[one]), int(batch.offsets[one + 1])):
                    counts[table][int(batch.indices[at])] += 1
            bag += count
    return counts


def counts_of(profile: AccessProfile, table: int) -> list[int]:
    return profile[f"table_{table}"].counts_of(0, ROWS[table]).tolist()


@given(
    seed=st.integers(0, 2**16),
    bags=st.integers(1, 8),
    longest=st.integers(0, 5),
    pooling=st.sampled_from([PoolingMode.SUM, PoolingMode.MEAN, PoolingMode.NONE]),
    dtype=st.sampled_from([SparseType.FP32, SparseType.FP16]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    weighted=st.booleans(),
    split=st.integers(-1, 8),
    skipping=st.booleans(),
    counter=st.sampled_from(["exact", "sketch"]),
    half_sketched=st.booleans(),
)
def test_exact_counts_equal_a_loop(
    seed: int,
    bags: int,
    longest: int,
    pooling: PoolingMode,
    dtype: SparseType,
    index_dtype: torch.dtype,
    weighted: bool,
    split: int,
    skipping: bool,
    counter: str,
    half_sketched: bool,
) -> None:
    """Over pooling, weights, variable batches, sequences, shared tables, empty bags and batches, dtypes; while updates
    are left out and while none are. A sketch that is large enough is exact as well."""
    sequence = pooling == PoolingMode.NONE
    tbe = make_tbe(ROWS, (8, 8), features=FEATURES, pooling=pooling, dtype=dtype)
    sketched: tuple[str, ...] = ("table_1",) if half_sketched and counter == "exact" else ()
    session = attach(tbe, counter=counter, every=1, sketch_tables=sketched)
    one = session._filters[0]
    if skipping:
        rows = torch.arange(0, int(one.patterns.numel()), 2)
        one.set_patterns(rows, torch.zeros_like(rows, dtype=torch.uint8))
    # Stock FBGEMM 1.8 on a CPU corrupts memory where the offsets of a variable batch are int32.
    variable = 0 <= split <= bags and not sequence and index_dtype == torch.int64
    per_feature = (bags, split, bags) if variable else (bags,) * 3
    batches = []
    for number in range(3):
        batch = make_lookups(
            (50, 30, 30), per_feature, longest=longest, seed=seed + number, dtype=index_dtype, weighted=weighted
        )
        batch.weights = None if sequence else batch.weights
        if variable:
            batch.batch_sizes = [[split, bags - split], [split, 0], [0, bags]]
        batches.append(batch)
        step(session, tbe, batch)
    profile = session.access_profile()
    for table, counts in enumerate(true_counts(batches, per_feature)):
        assert counts_of(profile, table) == counts
        assert profile[f"table_{table}"].lookups == sum(counts)
    assert profile.samples == 3 * bags
    assert profile.sampled_every == 1


def test_a_profile_knows_its_tables() -> None:
    tbe = make_tbe(ROWS, (8, 16), dtype=SparseType.FP16, table_names=["users", "items"])
    session = attach(tbe, counter="exact")
    step(session, tbe, make_lookups(ROWS, (6, 6)))
    profile = session.access_profile()
    assert list(profile.tables) == ["items", "users"]
    assert (profile["items"].rows, profile["items"].embedding_dim, profile["items"].element_size) == (30, 16, 2)
    assert profile["items"].optimizer_bytes == 4, "row-wise Adagrad"
    adagrad = make_tbe(ROWS, (8, 16), optimizer=EmbOptimType.EXACT_ADAGRAD)
    assert attach(adagrad).access_profile()["table_1"].optimizer_bytes == 4 * 16
    assert attach(make_tbe(optimizer=EmbOptimType.EXACT_SGD)).access_profile()["table_0"].optimizer_bytes == 0


def test_evaluation_is_not_counted() -> None:
    tbe = make_tbe()
    session = attach(tbe, counter="exact")
    with torch.no_grad():
        make_lookups(ROWS, (6, 6)).run(tbe)
    profile = session.access_profile()
    assert (profile.lookups, profile.samples) == (0, 0)


@pytest.mark.parametrize("counter", ["sampled", "sketch"])
def test_one_step_in_k_counts_for_k(counter: str) -> None:
    """Of batches that are all alike, any choice of one in four gives the exact counts after whole blocks."""
    tbe = make_tbe(features=FEATURES)
    session = attach(tbe, counter=counter, every=4)
    batch = make_lookups((50, 30, 30), (5, 5, 5))
    for _ in range(40):
        step(session, tbe, batch)
    profile = session.access_profile()
    for table, counts in enumerate(true_counts([batch] * 40, (5, 5, 5))):
        assert counts_of(profile, table) == counts
    assert profile.samples == 40 * 5
    assert profile.sampled_every == 4


def test_sampled_counts_are_unbiased_on_periodic_data() -> None:
    """Step s looks up row s % 8 alone; a fixed stride of 8 would see one row and no other."""
    tbe = make_tbe((8,), (4,))
    session = attach(tbe, counter="sampled", every=8)
    steps = 4000
    for number in range(steps):
        Lookups(torch.tensor([number % 8]), torch.tensor([0, 1])).run(tbe)
        session.step()
    counts = session.access_profile()["table_0"].counts / (steps / 8)
    assert counts.sum() == 8
    assert counts == pytest.approx(np.ones(8), abs=5 * (7 / (steps / 8)) ** 0.5)


@pytest.mark.parametrize("counter", ["exact", "sketch"])
def test_counts_fade(counter: str) -> None:
    tbe = make_tbe((50,), (8,))
    session = attach(tbe, counter=counter, every=1, half_life=10)
    early, late = (Lookups(torch.full((64,), row), torch.arange(65)) for row in (3, 4))
    for number in range(30):
        step(session, tbe, early if number < 10 else late)
    profile = session.access_profile()
    counts = profile["table_0"].counts_of(0, 50)
    assert counts[3] == 640 / 8, "halved after steps 10, 20 and 30"
    assert counts[4] == (640 / 2 + 640) / 2
    assert profile["table_0"].lookups == counts.sum()
    assert profile.samples == 64 * 10 * (1 / 8 + 1 / 4 + 1 / 2)
    assert profile.pooling_factor("table_0") == pytest.approx(1.0)


def test_decay_is_right_on_average_and_the_same_every_time() -> None:
    """A row that was looked up thrice would fade to nothing in two half lives if odd counts were rounded down."""
    profiles = []
    for _ in range(2):
        tbe = make_tbe((20_000,), (4,))
        session = attach(tbe, counter="exact", half_life=1)
        Lookups(torch.arange(20_000).repeat(3), torch.arange(60_001)).run(tbe)
        for _ in range(3):
            session.step()
        profiles.append(session.access_profile())
    assert profiles[0] == profiles[1]
    counts = profiles[0]["table_0"].counts
    assert counts.mean() == pytest.approx(3 / 8, abs=0.02)
    assert set(counts) == {0, 1}
    assert profiles[0].samples == 60_000 / 8


def test_fading_leaves_staleness_alone() -> None:
    """It takes differences of touches, which fading must not change."""
    weights = []
    for half_life in (None, 3):
        tbe = make_tbe((200, 30))
        session = attach(tbe, target_share=0.5, counter="exact", half_life=half_life)
        for number in range(60):
            step(session, tbe, make_lookups((20, 30), (16, 16), seed=number))
        assert session.report().total.skipped > 0
        weights.append(torch.cat([w.flatten() for w in tbe.split_embedding_weights()]))
    assert torch.equal(*weights)


def test_sketched_tables_have_no_memory_a_row_and_no_stale_rows() -> None:
    tbe = make_tbe((100_000, 30, 60_000, 20), (4,) * 4, features=(0, 1, 1, 2, 3))
    session = attach(tbe, target_share=0.6, counter="exact", sketch_tables=("table_2",), max_counted_rows=80_000)
    one = session._filters[0]
    assert [shard.counted for shard in one.shards] == [False, True, False, True]
    assert one.patterns.numel() == one.touches.numel() == 1 + 30 + 1 + 20
    looked_up = np.zeros(100_000, dtype=np.int64)
    for number in range(80):
        batch = make_lookups((100, 30, 30, 100, 20), (12,) * 5, seed=number)
        begin = int(batch.offsets[12])
        looked_up += np.bincount(batch.indices[:begin].numpy(), minlength=100_000)
        step(session, tbe, batch)
    tables = session.report().tables
    skipped = {name: (table.skipped, table.stale_rows) for name, table in tables.items()}
    assert skipped["0.table_0"] == skipped["0.table_2"] == (0, 0)
    assert skipped["0.table_1"][0] > 0
    assert skipped["0.table_3"][0] > 0
    assert tables["0.table_0"].touched_rows == (looked_up > 0).sum()
    profile = session.access_profile()
    assert profile["table_0"].ids is not None
    assert profile["table_1"].ids is None
    assert np.array_equal(profile["table_0"].counts_of(0, 100_000), looked_up)
    assert profile["table_1"].lookups == tables["0.table_1"].lookups


def test_off_counts_nothing_and_holds_no_rows() -> None:
    tbe = make_tbe()
    session = attach(tbe, counter="off")
    step(session, tbe, make_lookups(ROWS, (6, 6)))
    assert session._filters[0].touches.tolist() == [0, 0]
    assert session.report().total.lookups > 0
    with pytest.raises(ProfileError, match=r"counter='off'\) counts no look-ups"):
        session.access_profile()


@pytest.mark.parametrize("counter", ["off", "sketch"])
def test_staleness_needs_counts(counter: str) -> None:
    with pytest.raises(ConfigError, match=rf"counter='{counter}'.*target_share=0.5.*StalenessConfig\(target_share=0\)"):
        SlipstreamConfig(access=AccessConfig(counter=counter))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counter": "all"}, r"counter='all' must be one of 'exact', 'sampled', 'sketch', 'off'"),
        ({"every": 0}, "every=0 must be an integer of at least 1"),
        ({"half_life": 0}, "half_life=0 must be"),
        ({"half_life": 2.5}, r"half_life=2\.5 must be"),
        ({"max_counted_rows": -1}, "max_counted_rows=-1"),
        ({"sketch_rows": 100}, "sketch_rows=100 must be an integer of at least 768"),
        ({"sketch_tables": "users"}, "sketch_tables='users' is a string; give a tuple"),
    ],
)
def test_configuration_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AccessConfig(**changes)


def test_unknown_sketched_table_and_unknown_rank() -> None:
    tbe = make_tbe(table_names=["a", "b"])
    with pytest.raises(AttachError, match=r"sketch_tables names \['c'\], which the model does not have; it has"):
        attach(tbe, sketch_tables=("c",))
    session = attach(tbe)
    with pytest.raises(ProfileError, match="dst=1; give a rank of the session's process group, 0 to 0"):
        session.access_profile(dst=1)
    assert session.access_profile(dst=0) == session.access_profile()


def test_missing_datasketches_is_told_before_anything_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketches", None)
    tbe = make_tbe()
    with pytest.raises(AttachError, match="pip install datasketches"):
        attach(tbe, counter="sketch")
    assert type(tbe) is TBE
    attach(tbe).detach()


def test_tables_of_one_name_are_told_apart_and_others_keep_theirs() -> None:
    model = nn.Module()
    model.left = make_tbe((10, 20), (4, 4), table_names=["shared", "lone"])
    model.right = make_tbe((5,), (4,), table_names=["shared"])
    model.dense = DenseTableBatchedEmbeddingBagsCodegen([(6, 8)], use_cpu=True)  # as data parallel ones are
    staleness = Staleness(target_share=0.0, exclude_tables=("table_0",))
    session = Slipstream(model, SlipstreamConfig(staleness=staleness, access=AccessConfig(counter="exact")))
    Lookups(torch.tensor([3, 3, 1]), torch.tensor([0, 2, 3])).run(model.left)
    Lookups(torch.tensor([4]), torch.tensor([0, 1])).run(model.right)
    profile = session.access_profile()
    assert {table.name: table.lookups for table in profile.tables.values()} == {
        "left.shared": 2,
        "lone": 1,
        "right.shared": 1,
    }


def _info(begin: int, rows: int, samples: float, **more: Any) -> PartInfo:
    base: dict[str, Any] = {"collection": "c", "table": "t", "table_rows": 10, "embedding_dim": 4, "element_size": 4}
    return PartInfo(**{**base, "optimizer_bytes": 0, "begin": begin, "rows": rows, "samples": samples, **more})


def test_parts_become_tables() -> None:
    """Row shards lie side by side, and all saw every sample; replicas of one shard saw different ones."""

    def part(begin: int, counts: list[int], samples: float) -> Part:
        tensor = torch.tensor(counts)
        return Part.dense(_info(begin, len(counts), samples), lambda low, high: tensor[low:high])

    parts = [
        part(0, [1, 2, 3, 4, 5, 6], 100),
        part(6, [7, 8, 9, 10], 100),
        part(6, [1, 0, 0, 2**31], 50),
        part(10, [], 0),
    ]
    profile = merge(parts, 3, ALONE, None)
    assert profile is not None
    assert profile["t"].counts.tolist() == [1, 2, 3, 4, 5, 6, 8, 8, 9, 10 + 2**31]
    assert (profile.samples, profile.sampled_every) == (150, 3)
    sketches = [
        Part.sparse(_info(begin, 5, 8.0), np.array(rows), np.array(counts), lookups)
        for begin, rows, counts, lookups in ((5, [1, 2], [7, 8], 20), (0, [0], [3], 2), (5, [2, 4], [1, 1], 2))
    ]
    sparse = merge(sketches, 1, ALONE, None)
    assert sparse is not None
    assert sparse["t"].ids is not None
    assert dict(zip(sparse["t"].ids.tolist(), sparse["t"].counts.tolist(), strict=True)) == {0: 3, 6: 7, 7: 9, 9: 1}
    assert sparse["t"].lookups == 20 + 2 + 2


def test_no_rank_with_a_table_gives_an_empty_profile() -> None:
    profile = merge([], 8, ALONE, None)
    assert profile is not None
    assert (len(profile), profile.samples) == (0, 0)
