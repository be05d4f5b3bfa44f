"""The plan by which ranks even out their samples, and which lanes may go out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchrec_slipstream.inputs.dealing import Lockstep, batch_size, evened, waiting

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=5)


@given(COUNTS)
def test_ranks_are_evened_and_none_both_sends_and_receives(counts: list[int]) -> None:
    transfers = evened(counts)
    after = list(counts)
    for one in transfers:
        assert one.samples > 0
        after[one.source] -= one.samples
        after[one.target] += one.samples
    assert max(after) - min(after) <= 1
    assert sum(after) == sum(counts)
    assert not {one.source for one in transfers} & {one.target for one in transfers}
    # No plan can move less: what is above the share has to go.
    moved = sum(one.samples for one in transfers)
    share, odd = divmod(sum(counts), len(counts))
    surplus = sorted((count - share for count in counts), reverse=True)
    assert moved == sum(max(0, more - (place < odd)) for place, more in enumerate(surplus))


@given(st.lists(COUNTS.filter(lambda c: len(c) > 1), min_size=1, max_size=3), st.integers(1, 20), st.booleans())
def test_what_may_go_out_can(lanes: list[list[int]], size: int, over: bool) -> None:
    ranks = min(map(len, lanes))
    counts = [[lane[rank] for lane in lanes] for rank in range(ranks)]
    for lane, batches in enumerate(waiting(counts, size, over=over)):
        held = [of_rank[lane] for of_rank in counts]
        whole, rest = divmod(sum(held), ranks * size)
        if over:
            assert batches == whole + (rest >= ranks)
        else:
            assert batches == max(0, whole - 1)  # nobody hoards more than one


@given(st.integers(0, 200), st.integers(1, 20))
def test_at_the_end_no_batch_is_below_half_a_full_one(samples: int, size: int) -> None:
    sizes, left = [], samples
    while left:
        sizes.append(batch_size(left, size, over=True))
        left -= sizes[-1]
    assert len(sizes) == -(-samples // size)
    assert all(one <= size for one in sizes)
    assert sizes[:-2] == [size] * (len(sizes) - 2)
    if samples >= size:
        assert all(2 * one >= size for one in sizes)
    assert batch_size(samples, size, over=False) == min(samples, size)


def test_ranks_wait_for_their_own_samples_before_they_send() -> None:
    assert waiting([[10], [3]], 6, over=False) == [0]  # enough for one batch each, but the second rank reads on
    assert waiting([[10], [14]], 6, over=False) == [1]
    assert waiting([[21], [3]], 6, over=False) == [1]
    assert waiting([[10], [3]], 6, over=True) == [1]
    assert waiting([[1], [0]], 6, over=True) == [0]
    assert waiting([[1], [1]], 6, over=True) == [1]
    assert evened([10, 3]) == [type(evened([2, 0])[0])(source=0, target=1, samples=3)]


def test_one_process_asks_nobody() -> None:
    alone = Lockstep(None)
    assert (alone.rank, alone.ranks) == (0, 1)
    assert alone.gather([1, 2]) == [[1, 2]]
