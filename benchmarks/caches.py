"""Caches, simulated: FBGEMM's with its 32-way sets under LRU and LFU, and the best that any could do.

All work on a stream of requests (the distinct rows of one batch after another, ascending within a batch), and say of
each whether its row was there when its batch arrived. FBGEMM's are read from its CUDA kernels of 1.8.0
(``lru_cache_find.cu``, ``lru_cache_populate.cu``, ``lfu_cache_find.cu``, ``lfu_cache_populate.cu``): a batch's rows are
found first, then the missing ones are inserted, as many as their set has slots for. Where its bitonic sort leaves the
order of equal slots open, the lowest goes first here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
# Slots of a set: a warp.
WAYS = 32
_NEVER = np.iinfo(np.int64).max


def cache_set(ids: Ints, sets: int) -> Ints:
    """The set of each linear row id: the finaliser of MurmurHash3 in 64 bits, modulo (``cache_slot``, common.cuh)."""
    h = ids.astype(np.uint64)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    h ^= h >> np.uint64(33)
    return (h % np.uint64(sets)).astype(np.int64)


def simulate_lru(rows: npt.NDArray[np.integer], batches: Ints, sets_of: Ints, sets: int) -> Bools:
    """Evicts what was not looked up for longest, but nothing that this batch looked up.

    Args:
        rows: ``[n]``, the requests; batch i is ``rows[batches[i]:batches[i + 1]]``.
        sets_of: int64 ``[row ids]``, the set of each row.
        sets: how many sets; of none, all requests miss.

    Returns:
        bool ``[n]``: which requests hit.
    """
    hits = np.zeros(len(rows), dtype=bool)
    if sets == 0:
        return hits
    resident = np.full((sets, WAYS), -1, dtype=np.int64)
    last_used = np.zeros((sets, WAYS), dtype=np.int64)
    slot_of = np.full(len(sets_of), -1, dtype=np.int64)
    for i in range(len(batches) - 1):
        now = i + 1
        requested = rows[batches[i] : batches[i + 1]]
        slots = slot_of[requested]
        found = slots >= 0
        hits[batches[i] : batches[i + 1]] = found
        last_used.reshape(-1)[slots[found]] = now
        missing = requested[~found]
        order = np.argsort(sets_of[missing], kind="stable")
        for some_rows, some_sets in _rounds(missing[order], sets_of[missing][order]):
            used = last_used[some_sets]
            ways = used.argmin(axis=1)
            free = used[np.arange(len(ways)), ways] < now
            _insert(resident, slot_of, some_rows[free], some_sets[free], ways[free])
            last_used[some_sets[free], ways[free]] = now
    return hits


def simulate_lfu(
    rows: npt.NDArray[np.integer], lookups: npt.NDArray[np.integer], batches: Ints, sets_of: Ints, sets: int
) -> Bools:
    """Keeps what was looked up most often since the beginning, in the cache or not.

    As :func:`simulate_lru`; ``lookups`` ``[n]`` are counted for each request before its batch is inserted.
    """
    hits = np.zeros(len(rows), dtype=bool)
    if sets == 0:
        return hits
    resident = np.full((sets, WAYS), -1, dtype=np.int64)
    slot_of = np.full(len(sets_of), -1, dtype=np.int64)
    # One more, so that an empty slot's row, -1, finds a frequency below all others.
    frequency = np.zeros(len(sets_of) + 1, dtype=np.int64)
    frequency[-1] = -1
    for i in range(len(batches) - 1):
        requested = rows[batches[i] : batches[i + 1]]
        frequency[requested] += lookups[batches[i] : batches[i + 1]]
        found = slot_of[requested] >= 0
        hits[batches[i] : batches[i + 1]] = found
        missing = requested[~found]
        order = np.lexsort((-frequency[missing], sets_of[missing]))
        missing = missing[order]
        concerned, position = np.unique(sets_of[missing], return_inverse=True)
        costs = frequency[resident[concerned]]
        # The most frequent newcomer meets the least frequent resident, and so on until one does not get in. The rest
        # would not either: that they are not tried saves time.
        is_open = np.ones(len(concerned), dtype=bool)
        for some_rows, at in _rounds(missing, position):
            some_rows, at = some_rows[is_open[at]], at[is_open[at]]
            ways = costs[at].argmin(axis=1)
            enters = costs[at, ways] <= frequency[some_rows]
            is_open[at[~enters]] = False
            some_rows, at, ways = some_rows[enters], at[enters], ways[enters]
            _insert(resident, slot_of, some_rows, concerned[at], ways)
            costs[at, ways] = _NEVER
    return hits


def _rounds(rows: npt.NDArray[np.integer], groups: Ints) -> list[tuple[npt.NDArray[np.integer], Ints]]:
    """The first row of each group, then the second of each, up to as many as a set has slots; groups are sorted."""
    if not len(rows):
        return []
    begins = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
    lengths = np.diff(np.append(begins, len(groups)))
    rounds = []
    for place in range(min(int(lengths.max()), WAYS)):
        at = begins[lengths > place] + place
        rounds.append((rows[at], groups[at]))
    return rounds


def _insert(resident: Ints, slot_of: Ints, rows: npt.NDArray[np.integer], sets: Ints, ways: Ints) -> None:
    evicted = resident[sets, ways]
    slot_of[evicted[evicted >= 0]] = -1
    resident[sets, ways] = rows
    slot_of[rows] = sets * WAYS + ways


def waits(rows: npt.NDArray[np.integer], batches: Ints, first: int) -> tuple[Ints, Ints]:
    """How long each request's row had to be kept for it to hit.

    Args:
        first: the first batch that is measured; earlier ones are history.

    Returns:
        For each request from that batch on, int64 ``[m]`` each: the batch after which its row has to be in the cache
        (its last one, but not before the last of history: who knows the future can fill the cache before it begins),
        and its own batch.
    """
    batch = np.repeat(np.arange(len(batches) - 1), np.diff(batches))[batches[first] :]
    measured = rows[batches[first] :]
    # By row and, as the sort is stable, by batch.
    order = np.argsort(measured, kind="stable")
    again = np.zeros(len(order), dtype=bool)
    again[1:] = measured[order[1:]] == measured[order[:-1]]
    since = np.full(len(order), first - 1, dtype=np.int64)
    since[order[1:]] = np.where(again[1:], batch[order[:-1]], first - 1)
    return since, batch


def belady(since: Ints, until: Ints, capacity: int) -> int:
    """Hits of the best possible cache for ``capacity`` rows of equal bytes; exact.

    Each request hits if its row was kept from batch ``since`` to batch ``until`` (see :func:`waits`). What is looked
    up may be kept or not; of all candidates, keep those that are needed soonest. Who they are does not matter, only
    how many are needed when.
    """
    if not len(since) or capacity <= 0:
        return 0
    first, last = int(since.min()), int(until.max())
    candidates = np.zeros((last - first + 1, last - first + 1), dtype=np.int64)
    np.add.at(candidates, (since - first, until - first), 1)
    kept = np.zeros(last - first + 1, dtype=np.int64)
    hits = 0
    for now in range(last - first + 1):
        hits += int(kept[now])
        kept[now] = 0
        kept += candidates[now]
        kept = np.diff(np.minimum(np.cumsum(kept), capacity), prepend=0)
    return hits


def belady_bound(
    since: Ints, until: Ints, row_bytes: Ints, capacity: int, worth: npt.NDArray[np.integer] | None = None
) -> float:
    """No cache of ``capacity`` bytes has hits worth more than this, whatever the rows' bytes.

    Keeping a row takes its bytes from batch to batch, and there are ``capacity`` bytes times batches in all: the
    hits of most worth for what they take are counted until that is spent. Which of them overlap is left out, so it is a
    bound and no schedule (PFOO-L of Berger, Beckmann and Harchol-Balter, "Practical Bounds on Optimal Caching with
    Variable Object Sizes", 2018).

    Args:
        row_bytes: int64 ``[m]``.
        worth: ``[m]``, of a hit on each request. None: 1.
    """
    if not len(since):
        return 0.0
    values = np.ones(len(since), dtype=np.int64) if worth is None else worth.astype(np.int64)
    takes = row_bytes * (until - since)
    order = np.argsort(-values / takes, kind="stable")
    spent = np.cumsum(takes[order])
    total = capacity * (int(until.max()) - int(since.min()))
    whole = int(np.searchsorted(spent, total, side="right"))
    best = float(values[order[:whole]].sum())
    if whole < len(order):
        left = total - (int(spent[whole - 1]) if whole else 0)
        best += float(values[order[whole]]) * left / float(takes[order[whole]])
    return best
