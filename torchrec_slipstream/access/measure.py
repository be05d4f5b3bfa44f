"""Measures an access profile from batches: what :meth:`AccessProfile.measure` does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)
from torchrec.modules.embedding_configs import data_type_to_dtype

from torchrec_slipstream.access.profile import AccessProfile
from torchrec_slipstream.access.table import TableAccess
from torchrec_slipstream.access.tally import Tally
from torchrec_slipstream.errors import ProfileError
from torchrec_slipstream.loaders import length_of
from torchrec_slipstream.tbe.memory import optimizer_state

Config: TypeAlias = EmbeddingBagConfig | EmbeddingConfig


@dataclass(frozen=True)
class _Table:
    """A table while its look-ups are counted."""

    config: Config
    tally: Tally


def measure(
    batches: Iterable[Any],
    tables: nn.Module | Sequence[Config],
    *,
    steps: int | None,
    every: int,
    optimizer: str,
    sparse_features: Callable[[Any], KeyedJaggedTensor] | None,
    progress: bool,
) -> AccessProfile:
    """Count the look-ups of batches; see :meth:`AccessProfile.measure`. No batch is kept."""
    for name, value, least in (("steps", steps, 0), ("every", every, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ProfileError(f"{name}={value!r}; give an integer of at least {least}")
    configs = table_configs(tables)
    for config in configs:
        row_state_bytes(optimizer, config.embedding_dim)  # its name is checked before anything is read
    if (length := length_of(batches)) is not None:
        steps = min(length, steps if steps is not None else length)
    stream = enumerate(shown(islice(iter(batches), steps), steps, progress))

    def window(part: Iterable[tuple[int, Any]]) -> AccessProfile:
        return _window(part, configs, every, optimizer, sparse_features)

    measured = window(stream) if steps is None else in_sequence(window(islice(stream, steps // 2)), window(stream))
    if not measured.lookups:
        raise ProfileError(
            f"the {type(batches).__name__} gave no look-up of {', '.join(repr(config.name) for config in configs)} (in "
            f"{measured.samples} samples); give batches that look rows up, and no iterator that was read to its end"
        )
    return measured


def in_sequence(earlier: AccessProfile, later: AccessProfile) -> AccessProfile:
    """Two halves as one profile. Nothing is learnt where one is below a quarter of the other, as where a stream ended
    early: most rows that it lacks it had no time for."""
    alike = min(earlier.samples, later.samples) * 4 >= max(earlier.samples, later.samples) > 0
    return earlier.followed_by(later) if alike else earlier.merge(later)


def _window(
    steps: Iterable[tuple[int, Any]],
    configs: Sequence[Config],
    every: int,
    optimizer: str,
    sparse_features: Callable[[Any], KeyedJaggedTensor] | None,
) -> AccessProfile:
    counting = [_Table(config, Tally(config.num_embeddings)) for config in configs]
    samples = 0
    for step, batch in steps:
        if step % every:
            continue
        features = _features(batch, sparse_features, step)
        samples += features.stride()
        _count(features, counting, step)
    measured = []
    for one in counting:
        rows, counts, ids = one.tally.finish(every)
        measured.append(
            TableAccess(
                name=one.config.name,
                rows=rows,
                embedding_dim=one.config.embedding_dim,
                counts=counts,
                ids=ids,
                element_size=data_type_to_dtype(one.config.data_type).itemsize,
                optimizer_bytes=row_state_bytes(optimizer, one.config.embedding_dim),
            )
        )
    return AccessProfile(measured, samples * every, every)


def table_configs(tables: nn.Module | Sequence[Config]) -> list[Config]:
    """The configurations of a module's embedding collections, or those given, each with a name of its own.

    Raises:
        ProfileError: there are none, or two tables have one name, or one of the things given is no configuration.
    """
    found: list[Config] = []
    if isinstance(tables, nn.Module):
        for module in tables.modules():
            if isinstance(module, EmbeddingBagCollection):
                found += module.embedding_bag_configs()
            elif isinstance(module, EmbeddingCollection):
                found += module.embedding_configs()
        if not found:
            raise ProfileError(
                f"{type(tables).__name__} contains no EmbeddingBagCollection or EmbeddingCollection; give the model "
                "before it is sharded, or its EmbeddingBagConfigs"
            )
    else:
        found = list(tables)
        if not found:
            raise ProfileError("there are no tables to count; give at least one EmbeddingBagConfig or EmbeddingConfig")
    names: set[str] = set()
    for config in found:
        if not isinstance(config, (EmbeddingBagConfig, EmbeddingConfig)):
            raise ProfileError(f"a table is a {type(config).__name__}; give EmbeddingBagConfigs or EmbeddingConfigs")
        if config.name in names:
            raise ProfileError(f"two tables are called {config.name!r}; profiles know tables by name: rename one")
        names.add(config.name)
    return found


def row_state_bytes(optimizer: str, dim: int) -> int:
    """Bytes of optimizer state a row of a fused optimizer, by its name.

    Raises:
        ProfileError: the name is not known.
    """
    try:
        return optimizer_state(optimizer).row_bytes(dim)
    except ValueError as error:
        raise ProfileError(str(error)) from None


def _features(batch: Any, take: Callable[[Any], KeyedJaggedTensor] | None, step: int) -> KeyedJaggedTensor:
    features = take(batch) if take is not None else getattr(batch, "sparse_features", batch)
    if not isinstance(features, KeyedJaggedTensor):
        raise ProfileError(
            f"batch {step} is a {type(features).__name__}; give KeyedJaggedTensors, batches with one as "
            ".sparse_features, or sparse_features=... that takes it out of a batch"
        )
    return features


def _count(features: KeyedJaggedTensor, tables: Sequence[_Table], step: int) -> None:
    values = features.values().detach()
    if values.dtype not in (torch.int32, torch.int64):
        raise ProfileError(f"batch {step}: the ids are {values.dtype}; give int32 or int64")
    ids = values.cpu().numpy()
    ends = features.offset_per_key()
    slices: dict[str, list[slice]] = {}
    for place, key in enumerate(features.keys()):
        slices.setdefault(key, []).append(slice(ends[place], ends[place + 1]))
    for table in tables:
        for feature in table.config.feature_names:
            if feature not in slices:
                raise ProfileError(
                    f"batch {step} lacks feature {feature!r} of table {table.config.name!r}; it has "
                    f"{', '.join(map(repr, slices)) or 'none'}"
                )
            for part in slices[feature]:
                _check_range(ids[part], table.config, feature, step)
                table.tally.add(ids[part])


def _check_range(ids: np.ndarray, config: Config, feature: str, step: int) -> None:
    if len(ids) and (ids.min() < 0 or ids.max() >= config.num_embeddings):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise ProfileError(
            f"batch {step}, feature {feature!r}: id {bad} is not a row of table {config.name!r}, which has "
            f"{config.num_embeddings} rows; hash or remap ids before they are counted, as for training"
        )


def shown(batches: Iterable[Any], steps: int | None, progress: bool) -> Iterable[Any]:
    """The same batches, behind a progress bar if that is wanted and tqdm installed."""
    if progress:
        with suppress(ImportError):
            from tqdm import tqdm

            return tqdm(batches, total=steps, desc="counting look-ups")
    return batches
