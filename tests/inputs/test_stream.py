"""The stream: every sample comes out once, in full batches, on ranks in lockstep."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchrec.datasets.utils import Batch

from tests.inputs.samples import ids_of, numbered, same
from torchrec_slipstream import InputError, StateError, WeightedBatch
from torchrec_slipstream.inputs.blind import KeepAll, RandomDrop
from torchrec_slipstream.inputs.choice import Choice, OneLane
from torchrec_slipstream.inputs.dealing import Lockstep, Transfer
from torchrec_slipstream.inputs.packing import from_bytes, to_bytes
from torchrec_slipstream.inputs.queues import HandedOut
from torchrec_slipstream.inputs.stream import InputStream
from torchrec_slipstream.inputs.tally import Tally


class Numbered:
    """Keeps sample i where ``keep[i]``, in lane ``lanes[i]``; samples are numbered, as ``numbered`` has them."""

    def __init__(self, keep: Sequence[bool], lane: Sequence[int] | None = None, weighs: bool = False) -> None:
        self._keep, self._lane = torch.tensor(keep, dtype=torch.bool), lane
        self.lanes, self.weighs = (max(lane, default=0) + 1 if lane is not None else 1), weighs
        self.asked: list[int] = []

    def choose(self, batch: Batch) -> Choice:
        ids = ids_of(batch)
        self.asked += ids
        lane = torch.tensor([self._lane[i] for i in ids], dtype=torch.uint8) if self._lane is not None else None
        return Choice(self._keep[ids], torch.tensor(ids).float() if self.weighs else None, lane)

    def step(self, steps: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class LastLane:
    """The fullest of the last lanes first, after a window."""

    def __init__(self, window: int) -> None:
        self.window = window

    def begin(self) -> None:
        """Nothing is carried over."""

    def next(self, waiting: Sequence[int]) -> int:
        return max(range(len(waiting)), key=lambda lane: (waiting[lane] > 0, lane))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Threads:
    """Ranks that are threads: what crosses between them goes by the real plan and the real bytes."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.barrier = threading.Barrier(ranks, timeout=20)
        self.told: list[list[int]] = [[] for _ in range(ranks)]
        self.sent: dict[Transfer, torch.Tensor] = {}

    def run(self, function: Callable[[Lockstep], Any]) -> list[Any]:
        found: list[Any] = [None] * self.ranks

        def one(rank: int) -> None:
            try:
                found[rank] = function(_ThreadRank(self, rank))
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


class _ThreadRank(Lockstep):
    def __init__(self, threads: Threads, rank: int) -> None:
        super().__init__(None)
        self.rank, self.ranks, self._threads = rank, threads.ranks, threads

    def gather(self, mine: Sequence[int]) -> list[list[int]]:
        self._threads.told[self.rank] = list(mine)
        self._threads.barrier.wait()
        told = [list(row) for row in self._threads.told]
        self._threads.barrier.wait()
        return told

    def exchange(self, transfers: Sequence[Transfer], give: Any, receive: Any) -> None:
        for one in transfers:
            if one.source == self.rank:
                self._threads.sent[one] = to_bytes(give(one.samples))
        self._threads.barrier.wait()
        for one in transfers:
            if one.target == self.rank:
                receive(from_bytes(self._threads.sent[one]))
        self._threads.barrier.wait()


def stream_of(
    loader: Any, selector: Any, scheduler: Any = None, ranks: Lockstep | None = None, tally: Tally | None = None
) -> InputStream:
    ranks = ranks if ranks is not None else Lockstep(None)
    handed_out = HandedOut()
    handed_out.forget()  # nobody trains here
    scheduler = scheduler if scheduler is not None else OneLane()
    return InputStream(loader, selector, scheduler, ranks, tally if tally is not None else Tally(), handed_out)


def loader_of(ids: Sequence[int], size: int) -> list[Batch]:
    return [numbered(ids[begin : begin + size]) for begin in range(0, len(ids), size)]


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 4),
    st.lists(st.integers(0, 40), min_size=3, max_size=3),
    st.lists(st.sampled_from([0.0, 0.2, 0.7, 1.0]), min_size=3, max_size=3),
    st.integers(0, 2**32),
)
def test_every_sample_comes_out_once_on_ranks_in_lockstep(
    ranks: int, size: int, lanes: int, window: int, lengths: list[int], shares: list[float], seed: int
) -> None:
    total = sum(lengths[:ranks])
    draw = torch.Generator().manual_seed(seed)
    share_of = torch.tensor(shares[:ranks]).repeat_interleave(torch.tensor(lengths[:ranks]))
    keep = (torch.rand(total, generator=draw) < share_of).tolist()
    lane_of = torch.randint(0, lanes, (total,), generator=draw).tolist()
    begins = [sum(lengths[:rank]) for rank in range(ranks)]
    tallies = [Tally() for _ in range(ranks)]

    def train(rank: Lockstep) -> list[list[int]]:
        mine = range(begins[rank.rank], begins[rank.rank] + lengths[rank.rank])
        selector = Numbered(keep, lane_of)
        selector.lanes = lanes
        tally = tallies[rank.rank]
        found = [ids_of(batch) for batch in stream_of(loader_of(mine, size), selector, LastLane(window), rank, tally)]
        assert selector.asked == list(mine)
        return found

    # A loader's first batch is short where it has no more: then that is the batch size, and the ranks' must agree.
    firsts = {min(size, length) for length in lengths[:ranks] if length}
    outcomes = Threads(ranks).run(train)
    if len(firsts) > 1:
        assert all(isinstance(one, InputError) and "same batch size" in str(one) for one in outcomes)
        return
    assert not any(isinstance(one, Exception) for one in outcomes), outcomes
    full = next(iter(firsts), size)

    assert len({len(one) for one in outcomes}) == 1
    seen = [i for one in outcomes for ids in one for i in ids]
    assert len(seen) == len(set(seen))
    assert all(keep[i] for i in seen)
    missing = {i for i in range(total) if keep[i]} - set(seen)
    assert all(sum(lane_of[i] == lane for i in missing) < ranks for lane in range(lanes))
    assert sum(tally.left_over for tally in tallies) == len(missing)
    assert sum(tally.dropped for tally in tallies) == keep.count(False)
    assert sum(tally.used for tally in tallies) == len(seen)

    short = []
    for together in zip(*outcomes, strict=True):
        of_lanes = {lane_of[i] for ids in together for i in ids}
        assert len(of_lanes) == 1  # one lane, the same on all ranks
        lengths_now = [len(ids) for ids in together]
        if set(lengths_now) != {full}:
            assert len(set(lengths_now)) == 1
            assert 0 < lengths_now[0] < full
            short += [(next(iter(of_lanes)), lengths_now[0])]
    for lane in range(lanes):  # the last of each lane, which shares with the one before if it is less than half of one
        sizes = [length for of_lane, length in short if of_lane == lane]
        assert len(sizes) <= 2
        kept = sum(keep[i] and lane_of[i] == lane for i in range(total))
        assert kept // ranks < full or all(2 * one >= full for one in sizes)


def test_nothing_dropped_gives_the_loaders_own_batches() -> None:
    loader = loader_of(range(10), 4)
    assert [id(batch) for batch in stream_of(loader, KeepAll())] == [id(batch) for batch in loader]


def test_any_iterable_will_do() -> None:
    data = loader_of(range(23), 5)
    want = [list(range(begin, min(begin + 5, 23))) for begin in range(0, 23, 5)]

    def generate() -> Iterator[Batch]:
        yield from data

    for loader in (data, generate(), iter(data), DataLoader(data, batch_size=None)):
        assert [ids_of(batch) for batch in stream_of(loader, KeepAll())] == want
    stream = stream_of([], KeepAll())
    assert list(stream) == []
    assert next(stream, None) is None
    assert stream.ended


def test_batches_without_samples_are_read_over() -> None:
    empty = numbered([])
    found = [ids_of(batch) for batch in stream_of([empty, *loader_of(range(7), 3), empty], KeepAll())]
    assert found == [[0, 1, 2], [3, 4], [5, 6]]


def test_weights_follow_their_samples() -> None:
    keep = [i % 3 > 0 for i in range(30)]
    batches = list(stream_of(loader_of(range(30), 4), Numbered(keep, weighs=True)))
    assert [len(ids_of(batch)) for batch in batches] == [4, 4, 4, 4, 4]
    for batch in batches:
        assert type(batch) is WeightedBatch
        assert batch.weights.tolist() == ids_of(batch)


def test_a_window_is_read_before_its_first_batch() -> None:
    lane = [i % 2 for i in range(24)]
    selector = Numbered([True] * 24, lane)
    stream = stream_of(loader_of(range(24), 2), selector, LastLane(4))
    assert ids_of(next(stream)) == [1, 3]
    assert selector.asked == list(range(8))
    assert ids_of(next(stream)) == [0, 2]
    assert selector.asked == list(range(8))
    # Of each lane one batch waits, as it could be the last.
    assert [ids_of(next(stream)) for _ in range(4)] == [[5, 7], [9, 11], [4, 6], [8, 10]]
    assert selector.asked == list(range(16))


class Broken(Exception):
    """What a loader raises here."""


def breaking(ids: Sequence[int], size: int) -> Iterator[Batch]:
    yield from loader_of(ids, size)
    raise Broken("the disk is gone")


def test_what_a_loader_raises_reaches_its_rank_and_stops_the_others() -> None:
    def train(rank: Lockstep) -> Any:
        mine = range(100) if rank.rank == 0 else range(100, 112)
        loader = iter(loader_of(mine, 4)) if rank.rank == 0 else breaking(mine, 4)
        stream = stream_of(loader, KeepAll(), ranks=rank)
        taken = 0
        try:
            for _ in stream:
                taken += 1
        except (Broken, InputError) as error:
            with pytest.raises(InputError, match="this stream broke off"):
                next(stream)
            return taken, type(error), str(error)

    healthy, broken = Threads(2).run(train)
    assert broken == (2, Broken, "the disk is gone")
    assert healthy[:2] == (2, InputError)
    assert healthy[2].startswith("rank 1 could not read its next input batch")


def test_loaders_of_different_batch_sizes_are_refused_on_all_ranks() -> None:
    def train(rank: Lockstep) -> Any:
        return next(stream_of(loader_of(range(20), 4 + rank.rank), KeepAll(), ranks=rank))

    for error in Threads(2).run(train):
        assert isinstance(error, InputError)
        assert "{0: 4, 1: 5} samples by rank" in str(error)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(torch.ones(3, dtype=torch.bool)), r"chose with keep torch.bool \(3,\); give torch.bool \(4,\)"),
        (Choice(torch.ones(4)), "keep torch.float32"),
        (Choice(torch.ones(4, dtype=torch.bool), lane=torch.ones(4, dtype=torch.uint8)), "lane 1 is not below .* 1 l"),
        (Choice(torch.ones(4, dtype=torch.bool), lane=torch.ones(4)), "lane torch.float32"),
        (Choice(torch.ones(4, dtype=torch.bool), weight=torch.ones(4, 1)), r"weight torch.float32 \(4, 1\)"),
    ],
)
def test_a_choice_of_other_shape_is_refused(choice: Choice, message: str) -> None:
    selector = KeepAll(weighs=True)
    selector.choose = lambda batch: choice  # type: ignore[method-assign]
    with pytest.raises(InputError, match=message):
        next(stream_of(loader_of(range(8), 4), selector))


class Stateful:
    """A loader with a state, as torchdata's StatefulDataLoader; it reads nothing twice."""

    def __init__(self, data: list[Batch]) -> None:
        self._data, self._next, self.read = data, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        while self._next < len(self._data):
            self._next += 1
            self.read += 1
            yield self._data[self._next - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]


@given(st.integers(0, 12), st.sampled_from([list, Stateful]), st.sampled_from([1, 2, 8]), st.booleans())
def test_a_stream_resumed_anywhere_goes_on_bit_for_bit(taken: int, make: Any, window: int, weighs: bool) -> None:
    data = loader_of(range(60), 5)
    lane = [i % 3 % 2 for i in range(60)]
    keep = [i % 7 > 1 for i in range(60)]

    def stream(loader: Any) -> InputStream:
        return stream_of(loader, Numbered(keep, lane, weighs), LastLane(window))

    want = list(stream(data))
    first = stream(make(data))
    head = [batch for _, batch in zip(range(taken), first, strict=False)]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    loader = make(data)
    second = stream(loader)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert same_all([*head, *second], want)
    if make is Stateful and taken:
        assert loader.read < len(data)
    assert same_all([*head, *first], want)  # to be saved has changed nothing


def same_all(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(map(same, some, others))


def test_a_state_of_other_data_or_ranks_is_refused() -> None:
    stream = stream_of(loader_of(range(20), 4), KeepAll())
    for _ in range(3):
        next(stream)
    state = stream.state_dict()
    resumed = stream_of(loader_of(range(8), 4), KeepAll())
    resumed.load_state_dict(state)
    with pytest.raises(StateError, match="had read 4 input batches, and this loader has 2"):
        next(resumed)
    with pytest.raises(StateError, match="of 1 ranks and 1 lanes, and this one is of 1 and 2"):
        stream_of([], KeepAll(lanes=2)).load_state_dict(state)


def test_batches_that_nobody_trains_on_are_noticed_and_none_is_lost() -> None:
    handed_out = HandedOut()
    stream = InputStream(loader_of(range(100), 1), RandomDrop(0.0), OneLane(), Lockstep(None), Tally(), handed_out)
    taken = [next(stream) for _ in range(64)]
    for _ in range(2):
        with pytest.raises(InputError, match=r"64 batches were handed out, .*call the session's step\(\)"):
            next(stream)
    while len(taken) < 100:
        handed_out.confirm()
        taken.append(next(stream))
    assert [ids_of(batch) for batch in taken] == [[i] for i in range(100)]


def test_batches_handed_out_again_are_not_lost_either() -> None:
    handed_out = HandedOut()
    stream = InputStream([], RandomDrop(0.0), OneLane(), Lockstep(None), Tally(), handed_out)
    stream.again.extend(loader_of(range(65), 1))
    taken = [next(stream) for _ in range(64)]
    with pytest.raises(InputError, match="64 batches"):
        next(stream)
    assert len(handed_out.batches) + len(stream.again) == 65
    handed_out.confirm()
    assert ids_of(next(stream)) == [64]
    assert len(taken) == 64
