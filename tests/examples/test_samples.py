"""Samples check themselves, and batches are a partition of them, the same for every rank count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.samples import SPARSE_NAMES, Samples, batches, count_batches


def numbered(n: int) -> Samples:
    """n samples that can be told apart: sample i has the id i in every feature, and i in its first dense feature."""
    number = torch.arange(n)
    dense = torch.zeros(n, 13)
    dense[:, 0] = number
    return Samples(dense, number[:, None].expand(n, 26).contiguous(), (number % 2).float(), (max(n, 1),) * 26)


def ids(samples: Samples, batch_size: int, **options: int | bool) -> list[list[int]]:
    return [batch.dense_features[:, 0].int().tolist() for batch in batches(samples, batch_size, **options)]  # type: ignore[arg-type]


@given(
    n=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    world_size=st.integers(1, 4),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_batches_are_a_partition(n: int, batch_size: int, world_size: int, drop_last: bool, shuffle: bool) -> None:
    options = {"world_size": world_size, "drop_last": drop_last, "shuffle": shuffle}
    if n < (batch_size * world_size if drop_last else world_size):
        with pytest.raises(ValueError, match="samples make no batch"):
            batches(numbered(n), batch_size, **options)  # type: ignore[arg-type]
        return
    count = count_batches(n, batch_size, world_size=world_size, drop_last=drop_last)
    of_rank = [ids(numbered(n), batch_size, rank=rank, **options) for rank in range(world_size)]
    assert {len(found) for found in of_rank} == {count}, "ranks meet in collectives: as many batches each"
    sizes = [len(batch) for found in of_rank for batch in found]
    seen = sorted(i for found in of_rank for batch in found for i in batch)
    assert len(seen) == len(set(seen)), "no sample twice"
    if drop_last:
        assert set(sizes) == {batch_size}
        assert n - len(seen) < batch_size * world_size
    else:
        assert seen == list(range(n))
        assert min(sizes) >= 1
        assert max(sizes) <= batch_size + 1


def test_two_ranks_see_in_a_step_what_one_rank_sees_at_twice_the_batch() -> None:
    one = ids(numbered(40), 10, seed=3)
    two = [ids(numbered(40), 5, seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert [a + b for a, b in zip(*two, strict=True)] == one


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(**options: int | bool) -> list[list[int]]:
        return ids(numbered(50), 50, **options)

    assert order(seed=1, epoch=2) == order(seed=1, epoch=2)
    assert order(seed=1, epoch=2) != order(seed=1, epoch=3)
    assert order(seed=1, epoch=2) != order(seed=2, epoch=2)
    assert order(seed=1, epoch=2) != order(seed=2, epoch=1), "seeds do not share epochs with each other"
    torch.manual_seed(99)  # the global generator has no say in it
    assert order(seed=1) == order(seed=1)
    assert order(shuffle=False) == [list(range(50))]


def test_batch_holds_the_samples_features_under_their_keys() -> None:
    sparse = torch.randint(0, 100, (7, 26), generator=torch.Generator().manual_seed(0))
    samples = Samples(torch.rand(7, 13), sparse, torch.tensor([0.0, 1, 0, 1, 1, 0, 0]), (100,) * 26)
    index = torch.tensor([4, 0, 6])
    batch = samples.batch(index)
    kjt = batch.sparse_features
    assert kjt.keys() == list(SPARSE_NAMES)
    assert kjt.stride() == 3
    for feature, name in enumerate(SPARSE_NAMES):
        assert kjt[name].values().tolist() == sparse[index, feature].tolist()
        assert kjt[name].lengths().tolist() == [1, 1, 1]
    # What the constructor was told must be what a KJT would have found out by itself.
    plain = type(kjt)(keys=kjt.keys(), values=kjt.values(), lengths=kjt.lengths())
    assert kjt.offsets().tolist() == plain.offsets().tolist()
    assert kjt.length_per_key() == plain.length_per_key()
    assert kjt.offset_per_key() == plain.offset_per_key()
    assert torch.equal(batch.dense_features, samples.dense[index])
    assert batch.labels.tolist() == [1.0, 0.0, 0.0]


def test_split_keeps_the_order() -> None:
    first, rest = numbered(10).split(7)
    assert first.dense[:, 0].tolist() == list(range(7))
    assert rest.dense[:, 0].tolist() == [7, 8, 9]
    for n_train in (0, 10, -1):
        with pytest.raises(ValueError, match=f"n_train is {n_train}, of 10 samples; give 1 to 9"):
            numbered(10).split(n_train)


def test_ids_outside_the_table_are_refused() -> None:
    good = numbered(5)
    for wrong in (5, -1):
        sparse = good.sparse.clone()
        sparse[3, 8] = wrong
        with pytest.raises(ValueError, match=r"C9 has row ids from .* but its table has 5 rows"):
            Samples(good.dense, sparse, good.labels, good.table_rows)


def test_shapes_and_types_are_checked() -> None:
    good = numbered(5)
    with pytest.raises(ValueError, match=r"dense is torch.float32 \(5, 12\); give torch.float32 \(5, 13\)"):
        Samples(good.dense[:, :12], good.sparse, good.labels, good.table_rows)
    with pytest.raises(ValueError, match=r"sparse is torch.int32 .*; give torch.int64"):
        Samples(good.dense, good.sparse.int(), good.labels, good.table_rows)
    with pytest.raises(ValueError, match=r"labels is torch.float32 \(5, 1\)"):
        Samples(good.dense, good.sparse, good.labels[:, None], good.table_rows)
    with pytest.raises(ValueError, match="table_rows has 25 numbers; give 26"):
        Samples(good.dense, good.sparse, good.labels, (5,) * 25)


def test_batch_arguments_out_of_range() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        batches(numbered(5), 0)
    with pytest.raises(ValueError, match="rank is 2, of world_size 2; give 0 to 1"):
        batches(numbered(5), 1, rank=2, world_size=2)
