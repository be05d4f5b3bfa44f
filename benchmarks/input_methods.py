"""The methods that choose inputs, as benchmarks train with them: the papers', ours, the controls, and what else the
probability of a sample could depend on.

``random``               every input with the same probability: the control.
``negatives``            negatives alone, kept ones weigh ``1 / p``: plain negative down-sampling.
``thinning``             ``InputsConfig(method="thinning")``: negatives alone, kept ones count once, logits put right.
``ours``                 that with ``positive_weight="auto"``.
``slipstream``           the artefact's (arXiv 2404.04270), with the artefact's alpha: all look-ups stale.
``slipstream_half``      the same with half of the look-ups stale, which reaches its share on small data.
``slipstream_relative``  that with movement relative to the row's size.
``slipstream_per_table``  that with a threshold a table.
``rarity``               kept in proportion to how common a negative's rows are, weights ``1 / p``.
``surprise``             kept in proportion to the error of a small logistic regression, weights ``1 / p``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchrec.datasets.utils import Batch

from examples.samples import SPARSE_NAMES, Samples
from torchrec_slipstream import (
    AccessConfig,
    InputReport,
    InputsConfig,
    Slipstream,
    SlipstreamConfig,
    SlipstreamInputs,
    StalenessConfig,
)
from torchrec_slipstream.inputs.choice import Choice, OneLane
from torchrec_slipstream.inputs.live import LiveInputs

DROPPING = (
    "random",
    "negatives",
    "thinning",
    "ours",
    "slipstream",
    "slipstream_half",
    "slipstream_relative",
    "slipstream_per_table",
    "rarity",
    "surprise",
)
Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
# Least probability of a weighing method, and the samples whose scores set its scale.
_LEAST = 0.05
_MEMORY = 4096


def inputs_config(method: str, share: float, seed: int, steps: int) -> InputsConfig:
    """The session's configuration of a method that drops inputs.

    Slipstream's begins after a quarter of the ``steps`` and watches for a twentieth; its share is of the inputs after
    that, here made larger so that it is of all inputs, as the other methods'.
    """
    if not method.startswith("slipstream"):
        if method in ("ours", "balanced"):
            return InputsConfig(method="thinning", drop_share=share, seed=seed, positive_weight="auto")
        return InputsConfig(method=method, drop_share=share, seed=seed)
    start, window = steps // 4, max(1, steps // 20)
    return InputsConfig(
        method="slipstream",
        drop_share=min(0.95, share * steps / (steps - start - window)),
        seed=seed,
        slipstream=SlipstreamInputs(
            start=start,
            snapshot_steps=window,
            search_window=0.02,
            sample_share=0.2,
            min_touches=1,
            max_threshold=None,
            stale_lookups=None if method == "slipstream" else len(SPARSE_NAMES) // 2,
            movement="relative" if method == "slipstream_relative" else "plain",
            per_table=method == "slipstream_per_table",
        ),
    )


class Scaled:
    """Keeps positives, and negatives with probability ``clamp(c * score, least, 1)``, weights ``1 / p``.

    ``c`` is such that, of the samples so far and of the scores of late, ``drop_share`` of all samples go.
    """

    lanes = 1
    weighs = True

    def __init__(self, score: Callable[[Batch], Floats], drop_share: float, seed: int) -> None:
        self._score, self._keep = score, 1.0 - drop_share
        self._random = np.random.default_rng(seed)
        self._recent = np.empty(0, np.float32)
        self._seen = self._kept = 0.0

    def choose(self, batch: Batch) -> Choice:
        score = np.where(batch.labels.numpy() > 0.5, np.float32(1e9), self._score(batch))
        self._recent = np.concatenate([self._recent, score])[-_MEMORY:]
        # What was kept too much so far is made good over the next samples.
        wanted = np.clip(self._keep + (self._keep * self._seen - self._kept) / _MEMORY, _LEAST, 1.0)
        low, high = -40.0, 40.0
        for _ in range(40):
            middle = (low + high) / 2
            small = np.clip(2.0**middle * self._recent, _LEAST, 1.0).mean() < wanted
            low, high = (middle, high) if small else (low, middle)
        probability = np.clip(2.0**high * score, _LEAST, 1.0).astype(np.float32)
        self._seen += len(score)
        self._kept += float(probability.sum())
        keep = self._random.random(len(score)) < probability
        return Choice(torch.from_numpy(keep), torch.from_numpy(1.0 / probability))

    def step(self, steps: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("a benchmark's selector, which no run resumes with")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a benchmark's selector, which no run resumes with")


def _ids(batch: Batch) -> Ids:
    """int64 ``[features, B]`` of a batch with one look-up a bag."""
    return batch.sparse_features.values().numpy().reshape(len(SPARSE_NAMES), -1)


class Commonness:
    """How common a sample's rows are: one over the mean of ``1 / sqrt(1 + look-ups so far)``."""

    def __init__(self, table_rows: tuple[int, ...]) -> None:
        self._counts = [np.zeros(rows, np.float32) for rows in table_rows]

    def __call__(self, batch: Batch) -> Floats:
        ids = _ids(batch)
        rare = np.mean([1.0 / np.sqrt(1.0 + c[i]) for c, i in zip(self._counts, ids, strict=True)], axis=0)
        for counts, of_feature in zip(self._counts, ids, strict=True):
            np.add.at(counts, of_feature, 1.0)
        return (1.0 / rare).astype(np.float32)


class Surprise:
    """``|y - p|`` to the power of a half, p by a logistic regression over rows and dense features (Adagrad, one pass,
    learning from all inputs, dropped or not)."""

    def __init__(self, table_rows: tuple[int, ...], rate: float = 0.05) -> None:
        sizes = [*table_rows, 1]
        self._begins = np.cumsum([0, *table_rows])[:, None]
        self._weights, self._squares = (np.full(sum(sizes), value, np.float32) for value in (0.0, 1e-6))
        self._rate = rate

    def __call__(self, batch: Batch) -> Floats:
        ids = _ids(batch)
        ids = np.concatenate([ids, np.zeros_like(ids[:1])]) + self._begins  # the last is the bias
        labels = batch.labels.numpy()
        error = 1.0 / (1.0 + np.exp(-np.clip(self._weights[ids].sum(axis=0), -30, 30))) - labels
        gradient = np.broadcast_to(error, ids.shape)
        np.add.at(self._squares, ids, gradient**2)
        np.add.at(self._weights, ids, -self._rate * gradient / np.sqrt(self._squares[ids]))
        return np.sqrt(np.abs(error)).astype(np.float32)


class Method:
    """A method at work on a model.

    Args:
        name: of ``DROPPING``, or "balanced", which is ours with a share of 0.
        share: of all inputs, to be dropped.
        steps: of the run without dropping.
    """

    def __init__(self, name: str, model: nn.Module, train: Samples, share: float, seed: int, steps: int) -> None:
        config = InputsConfig()
        candidates = {"rarity": Commonness, "surprise": Surprise}
        if name not in candidates:
            config = inputs_config(name, share, seed, steps)
        staleness, access = StalenessConfig(target_share=0.0), AccessConfig()
        if name.startswith("slipstream"):
            access = AccessConfig(counter="exact")  # its window is short, and an uncounted row cannot be stale
        self.session = Slipstream(model, SlipstreamConfig(staleness=staleness, access=access, inputs=config))
        self._own: LiveInputs | None = None
        if name in candidates:
            selector = Scaled(candidates[name](train.table_rows), share, seed)
            self._own = LiveInputs(InputsConfig(method="random"), None, lambda _: (selector, OneLane()))

    def inputs(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """An epoch's batches."""
        return self._own.open(loader) if self._own is not None else self.session.inputs(loader)

    def step(self) -> None:
        """A training step is over."""
        self.session.step()
        if self._own is not None:
            self._own.step(0)

    def report(self) -> InputReport:
        """What became of the inputs."""
        found = self._own.report() if self._own is not None else self.session.report().inputs
        assert found is not None
        return found
