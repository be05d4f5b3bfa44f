"""The access profile: how often each row of each table is looked up, and what that says of a budget or a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from torchrec_slipstream.access.curves import BudgetCurve, HitCurve
from torchrec_slipstream.access.statistics import AccessStatistics, checked_batch
from torchrec_slipstream.access.table import TableAccess
from torchrec_slipstream.budget import parse_bytes
from torchrec_slipstream.errors import ProfileError

if TYPE_CHECKING:  # these build profiles or compare them, and so import this module
    from torchrec_slipstream.access.drift import Drift
    from torchrec_slipstream.access.parquet import Hashing

__all__ = ["AccessProfile", "TableAccess"]


class AccessProfile:
    """Measured access counts of a model's tables.

    From a run that is being trained (``Slipstream.access_profile()``), or offline: :meth:`measure` from batches,
    :meth:`from_parquet` from a file. Never changes: merging and decaying give a new one.

    Where only every k-th batch was counted (``sampled_every``), a row that was looked up in the others alone has a
    count of 0, and its look-ups are taken for those of rows that were seen. So forecasts of distinct rows and of misses
    (:meth:`expected_distinct`, :meth:`statistics`) are low; count every batch where those matter.

    Args:
        tables: the tables' counts, names unique.
        samples: samples (rows of batches, over all ranks) that the counts stand for.
        sampled_every: every k-th batch was counted; the counts are scaled back by k already.

    Raises:
        ProfileError: two tables of one name, or one that is no ``TableAccess``; or a number out of range.
    """

    def __init__(self, tables: Iterable[TableAccess], samples: int, sampled_every: int = 1) -> None:
        if isinstance(tables, Mapping):
            tables = tables.values()
        by_name: dict[str, TableAccess] = {}
        for table in tables:
            if not isinstance(table, TableAccess):
                raise ProfileError(f"one of the tables is {table!r}; give TableAccess objects")
            if table.name in by_name:
                raise ProfileError(f"two tables are called {table.name!r}; give each table's counts once")
            by_name[table.name] = table
        for field, value, least in (("samples", samples, 0), ("sampled_every", sampled_every, 1)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise ProfileError(f"{field}={value!r}; give an integer of at least {least}")
        self._tables = dict(sorted(by_name.items()))
        self.samples = int(samples)
        self.sampled_every = int(sampled_every)

    @property
    def tables(self) -> Mapping[str, TableAccess]:
        """The tables by name, in the order of their names."""
        return MappingProxyType(self._tables)

    # ------------------------------------------------------------------------------------------------ where from

    @classmethod
    def measure(
        cls,
        batches: Iterable[Any],
        tables: nn.Module | Sequence[Any],
        *,
        steps: int | None = None,
        every: int = 1,
        optimizer: str = "rowwise_adagrad",
        sparse_features: Callable[[Any], Any] | None = None,
        progress: bool = False,
    ) -> AccessProfile:
        """Count the look-ups of batches, one at a time.

        Args:
            batches: ``KeyedJaggedTensor``, or anything with one as ``.sparse_features`` (TorchRec's ``Batch``). It is
                read only as far as it is counted.
            tables: the model, or any module with its ``EmbeddingBagCollection`` and ``EmbeddingCollection``
                (unsharded; the meta device will do); or their ``EmbeddingBagConfig`` / ``EmbeddingConfig``.
            steps: read so many batches at most; None: all. With it, or with batches that have a length, the profile
                also learns from its first half what counts are worth in its second (see :meth:`followed_by`).
            every: count every k-th batch only, and take it k-fold; the rest is read and thrown away.
            optimizer: the one that will be fused, a name of ``tbe.memory.OPTIMIZERS``: how many bytes of state a row
                has.
            sparse_features: takes the ``KeyedJaggedTensor`` out of a batch of any other kind.
            progress: show a progress bar, where ``tqdm`` is installed.

        Raises:
            ProfileError: no table, or two of one name; a feature that the batches lack; an id that its table does not
                have; a batch that is none; a number out of range; no look-up in all batches.
        """
        from torchrec_slipstream.access.measure import measure

        return measure(
            batches,
            tables,
            steps=steps,
            every=every,
            optimizer=optimizer,
            sparse_features=sparse_features,
            progress=progress,
        )

    @classmethod
    def from_parquet(
        cls,
        path: str | Path,
        columns: Sequence[str] | Mapping[str, str] | None = None,
        *,
        embedding_dim: int | Mapping[str, int],
        rows: int | Mapping[str, int] | None = None,
        hashing: Hashing | Mapping[str, Hashing] = None,
        limit: int | slice | None = None,
        null_row: int | None = None,
        element_size: int = 4,
        optimizer: str = "rowwise_adagrad",
        progress: bool = False,
    ) -> AccessProfile:
        """Count the ids in a parquet file, read in parts: a table a column, called like it, unless ``columns`` maps it.

        See :func:`torchrec_slipstream.access.parquet.from_parquet` for the arguments.
        """
        from torchrec_slipstream.access.parquet import from_parquet

        return from_parquet(
            path,
            columns,
            embedding_dim=embedding_dim,
            rows=rows,
            hashing=hashing,
            limit=limit,
            null_row=null_row,
            element_size=element_size,
            optimizer=optimizer,
            progress=progress,
        )

    @classmethod
    def load(cls, path: str | Path) -> AccessProfile:
        """Read what :meth:`save` wrote.

        Raises:
            ProfileError: the file is missing, foreign, damaged, or of a newer version.
        """
        from torchrec_slipstream.access.npz import load

        return load(path)

    def save(self, path: str | Path, *, compressed: bool = True) -> None:
        """Write to a ``.npz`` file, at once or not at all. Counts of real traffic compress several times.

        Raises:
            ProfileError: the file cannot be written.
        """
        from torchrec_slipstream.access.npz import save

        save(self, path, compressed=compressed)

    # ---------------------------------------------------------------------------------------------- combinations

    def merge(self, *others: AccessProfile) -> AccessProfile:
        """The sum of the counts: other ranks, other days. ``sampled_every`` becomes the coarsest of them.

        Raises:
            ProfileError: the profiles have different tables, or tables of different sizes; or one is none.
        """
        merged = self
        for other in others:
            _check_profile(other)
            if merged._tables.keys() != other._tables.keys():
                lone = sorted(merged._tables.keys() ^ other._tables.keys())
                raise ProfileError(
                    f"only one of the two profiles has table(s) {', '.join(map(repr, lone))}; merge profiles of the "
                    "same tables (select(names) makes one of some of them)"
                )
            merged = AccessProfile(
                [table.merged(other[name]) for name, table in merged._tables.items()],
                merged.samples + other.samples,
                max(merged.sampled_every, other.sampled_every),
            )
        return merged

    def followed_by(self, later: AccessProfile) -> AccessProfile:
        """The sum of the counts of two consecutive windows, which also knows what the first said of the second.

        The planner then takes a row for what rows looked up as often had in the window after, not for what it had
        itself: ``monday.followed_by(tuesday)``. :meth:`measure` and :meth:`from_parquet` do so with their two halves.

        The windows may be of different length (look-ups of the later are taken per sample), though one of few samples
        teaches little. What either had learnt before gives way to what they say of each other: the profile of
        ``a.followed_by(b).followed_by(c)`` knows what ``a`` and ``b`` together said of ``c``. To learn from several
        pairs, merge pairs of about equal length: ``a.followed_by(b).merge(c.followed_by(d))``. Nothing is learnt where
        a window has no samples.

        Raises:
            ProfileError: as :meth:`merge`.
        """
        merged = self.merge(later)
        tables = [table.followed_by(later[name], (self.samples, later.samples)) for name, table in self._tables.items()]
        return AccessProfile(tables, merged.samples, merged.sampled_every)

    def decayed(self, factor: float) -> AccessProfile:
        """All counts, look-ups and samples times ``factor`` in ``[0, 1]``: ``yesterday.decayed(0.5).merge(today)``.

        Raises:
            ProfileError: the factor is not in that range.
        """
        tables = [table.decayed(factor) for table in self._tables.values()]
        return AccessProfile(tables, round(self.samples * factor), self.sampled_every)

    def select(self, names: Iterable[str]) -> AccessProfile:
        """A profile of some of the tables.

        Raises:
            ProfileError: a name that the profile does not have.
        """
        return AccessProfile([self[name] for name in names], self.samples, self.sampled_every)

    def drift(self, other: AccessProfile, budget: int | float | str = 0.1) -> Drift:
        """How far traffic has moved from this profile to a later one; see :class:`Drift`.

        Raises:
            ProfileError: the profiles have different tables, or tables of different sizes; or the other is none.
        """
        from torchrec_slipstream.access.drift import drift

        _check_profile(other)
        return drift(self, other, budget)

    # -------------------------------------------------------------------------------------------------- figures

    @property
    def lookups(self) -> int:
        """Look-ups of all tables."""
        return sum(table.lookups for table in self._tables.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows of all tables, with optimizer state."""
        return sum(table.rows * table.row_bytes for table in self._tables.values())

    @cached_property
    def _curve(self) -> BudgetCurve:
        return BudgetCurve(list(self._tables.values()))

    def budget_bytes(self, budget: int | float | str) -> int:
        """A budget in bytes: bytes, a string such as ``"8GiB"``, or a float in ``[0, 1]``, a share of all bytes.

        Raises:
            ProfileError: a float out of that range.
            ConfigError: neither of the others.
        """
        if isinstance(budget, float):
            if not 0 <= budget <= 1:
                raise ProfileError(f"budget={budget!r}; a float is a share of the tables' bytes, in [0, 1]")
            return int(budget * self.total_bytes)
        return parse_bytes(budget)

    def hit_rate(self, budget: int | float | str) -> float:
        """Share of all look-ups that are served by the hot rows which so many bytes of fast memory hold.

        The best choice there is for these counts: rows by look-ups a byte over all tables. A profile without look-ups
        misses none: 1.0.

        Args:
            budget: see :meth:`budget_bytes`.
        """
        return float(self._curve.hit_rate(np.array([self.budget_bytes(budget)]))[0])

    def hot_rows(self, budget: int | float | str) -> Mapping[str, int]:
        """How many rows of each table that budget makes hot; ``profile[name].top_rows(n)`` says which."""
        return self._curve.hot_rows(self.budget_bytes(budget))

    def curve(self, points: int = 200, table: str | None = None) -> HitCurve:
        """Hit rate over bytes, of all tables or of one, at about so many budgets.

        Raises:
            ProfileError: fewer than 2 points, or a table that the profile does not have.
        """
        if isinstance(points, bool) or not isinstance(points, (int, np.integer)) or points < 2:
            raise ProfileError(f"points={points!r}; give an integer of at least 2")
        return (self._curve if table is None else BudgetCurve([self[table]])).sampled(points)

    def pooling_factor(self, name: str) -> float:
        """Look-ups of a table a sample; 0 where no sample was seen."""
        return self[name].lookups / self.samples if self.samples else 0.0

    def expected_distinct(self, name: str, batch_size: int) -> float:
        """Distinct rows of a table that a batch of so many samples is expected to touch."""
        return self[name].expected_distinct(checked_batch(batch_size) * self.pooling_factor(name))

    def statistics(self, batch_size: int, policy: str = "lru") -> dict[str, AccessStatistics]:
        """For each table, what TorchRec's planner wants to know of a cache.

        Args:
            batch_size: samples of a *global* batch, all ranks together.
            policy: see :class:`AccessStatistics`.

        Raises:
            ProfileError: a batch size or policy that is none.
        """
        batch = checked_batch(batch_size)
        return {
            name: AccessStatistics(*table.probabilities, batch * self.pooling_factor(name), policy)
            for name, table in self._tables.items()
        }

    # ------------------------------------------------------------------------------------------------- container

    def __getitem__(self, name: str) -> TableAccess:
        try:
            return self._tables[name]
        except KeyError:
            have = ", ".join(map(repr, self._tables)) or "none"
            raise ProfileError(f"the profile has no table {name!r}; it has {have}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tables

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __eq__(self, other: object) -> bool:
        """The same counts of the same rows from as many samples; their form and integer type do not matter."""
        if not isinstance(other, AccessProfile):
            return NotImplemented
        return (self.samples, self.sampled_every, self._tables) == (other.samples, other.sampled_every, other._tables)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"AccessProfile({len(self)} tables, {self.lookups} look-ups, {self.samples} samples)"

    def __str__(self) -> str:
        """A table for people: what each table is, and what its most looked-up rows take."""
        from torchrec_slipstream.access.show import show

        return show(self)


def _check_profile(other: object) -> None:
    if not isinstance(other, AccessProfile):
        raise ProfileError(f"{other!r} is no AccessProfile; give one (AccessProfile.load reads a file's)")
