"""The papers' methods that train on all inputs, in another order or in two parts: FAE and Hotline."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import nn
from torchrec import EmbeddingBagConfig
from torchrec.datasets.utils import Batch

from examples.model import table_configs
from examples.samples import batches
from examples.train_dlrm import Data
from torchrec_slipstream import AccessProfile, FaeInputs, InputsConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.inputs.hot import hot_of_profile
from torchrec_slipstream.tbe.features import model_tables

# FAE's 256 MB are an eighth of the Kaggle tables; its access profile is of 5% of the inputs.
_HOT_SHARE = 0.125
_PROFILED_SHARE = 0.05
# The last samples of the training, whose loss moves FAE's rate. (FAE takes the test's, which no method should see.)
_HELD = 2048


class HotRows:
    """The rows that a budget holds of the most looked-up ones in the first batches.

    Attributes:
        profile: of those batches.
        bytes: the budget.
        sets: the rows.
    """

    def __init__(self, model: nn.Module, tables: Sequence[EmbeddingBagConfig], batches: Sequence[Batch]) -> None:
        first = batches[: max(1, round(_PROFILED_SHARE * len(batches)))]
        self.profile = AccessProfile.measure(first, tables)
        self.bytes = self.profile.budget_bytes(_HOT_SHARE)
        self.sets = hot_of_profile(model_tables(model), self.profile, self.bytes)


def fae_config(hot: HotRows, window: int) -> InputsConfig:
    """FAE in windows of so many batches; the paper's is an epoch."""
    return InputsConfig(method="fae", fae=FaeInputs(window=window, hot_bytes=hot.bytes))


class _Order:
    """A session that skips no update, and the hot rows."""

    def __init__(self, model: nn.Module, data: Data, arguments: argparse.Namespace) -> None:
        self._model, self._data = model, data
        order = list(batches(data.train, arguments.batch_size, seed=arguments.seed))
        self._hot = HotRows(model, table_configs(data.train.table_rows, arguments.embedding_dim), order)
        staleness = StalenessConfig(target_share=0.0)
        self.session = Slipstream(model, SlipstreamConfig(staleness=staleness, inputs=self._inputs(len(order))))

    def _inputs(self, window: int) -> InputsConfig:
        return InputsConfig()

    def step(self) -> None:
        """A training step is over."""
        self.session.step()

    def hot_share(self) -> float:
        """Of the training inputs, those that look up nothing but hot rows."""
        hot = [
            self._hot.sets.samples([batch.sparse_features]).all_inside
            for batch in batches(self._data.train, 1024, shuffle=False, drop_last=False)
        ]
        return float(torch.cat(hot).double().mean())


class Fae(_Order):
    """Pure hot and cold batches, a window of the whole epoch as in the paper, its shuffle scheduler."""

    def _inputs(self, window: int) -> InputsConfig:
        return fae_config(self._hot, window)

    def inputs(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """An epoch's batches."""
        return self.session.inputs(loader, profile=self._hot.profile, test_loss=self._loss)

    def _loss(self) -> float:
        train = self._data.train
        held = train.slice(max(0, len(train) - _HELD), len(train))
        device = next(self._model.parameters()).device
        self._model.eval()
        with torch.no_grad():
            loss = [float(self._model(batch.to(device))[0]) for batch in batches(held, len(held) // 4, shuffle=False)]
        self._model.train()
        return sum(loss) / len(loss)


class HotlineSteps(_Order):
    """A popular and a non-popular micro-batch, one step."""

    def __init__(self, model: nn.Module, data: Data, arguments: argparse.Namespace) -> None:
        super().__init__(model, data, arguments)
        self._hotline = self.session.hotline(self._hot.sets)

    def inputs(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """An epoch's batches, as they come."""
        return iter(loader)

    def backward(self, batch: Batch) -> None:
        """Forward and backward of both parts."""
        self._hotline.backward(batch, lambda part: self._model(part)[0])


REORDERING: dict[str, Callable[[nn.Module, Data, argparse.Namespace], Fae | HotlineSteps]] = {
    "fae": Fae,
    "hotline": HotlineSteps,
}
