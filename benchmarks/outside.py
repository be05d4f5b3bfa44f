"""Embedding tables outside of TorchRec's sharding: open-source DLRM's and XDL's."""

from __future__ import annotations

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

# Of all providers' row-wise Adagrad.
EPS = 1e-8


class _Bags(nn.Module):
    """Tables outside TorchRec's sharding: a KJT in, a KeyedTensor out, as an EmbeddingBagCollection's."""

    def __init__(self, tables: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        self._tables = tables

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._tables

    def look_up(self, features: KeyedJaggedTensor) -> Tensor:
        """``[samples, sum of dims]``."""
        raise NotImplementedError

    def place(self, batch: Batch, device: torch.device) -> Batch:
        """The batch, where the model wants it."""
        return batch.to(device)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        dims = [table.embedding_dim for table in self._tables]
        return KeyedTensor(features.keys(), dims, self.look_up(features))


class SparseBags(_Bags):
    """An ``nn.EmbeddingBag`` of sparse gradients for every table."""

    def __init__(self, tables: list[EmbeddingBagConfig], device: torch.device, rate: float) -> None:
        super().__init__(tables)  # the rate is the optimizer's, which is apart here
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(t.num_embeddings, t.embedding_dim, mode="sum", sparse=True, device=device) for t in tables
        )
        for table, bag in zip(tables, self.bags, strict=True):
            table.init_fn(bag.weight)

    def look_up(self, features: KeyedJaggedTensor) -> Tensor:
        values, offsets = features.values(), features.offsets().view(-1)
        size = features.stride()
        outputs = []
        bounds = features.offset_per_key()
        for i, bag in enumerate(self.bags):
            of_bag = offsets[i * size : (i + 1) * size] - bounds[i]
            outputs.append(bag(values[bounds[i] : bounds[i + 1]], of_bag))
        return torch.cat(outputs, dim=1)


class HostBags(_Bags):
    """One TBE in host memory, looked up and updated by the CPU; only its output goes to the device."""

    def __init__(self, tables: list[EmbeddingBagConfig], device: torch.device, rate: float) -> None:
        super().__init__(tables)
        self._device = device
        self.tbe = SplitTableBatchedEmbeddingBagsCodegen(
            [(t.num_embeddings, t.embedding_dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for t in tables],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=rate,
            eps=EPS,
            device=torch.device("cpu"),
        )
        for table, weights in zip(tables, self.tbe.split_embedding_weights(), strict=True):
            table.init_fn(weights)

    def look_up(self, features: KeyedJaggedTensor) -> Tensor:
        output: Tensor = self.tbe(features.values().long(), features.offsets().long())
        return output.to(self._device)

    def place(self, batch: Batch, device: torch.device) -> Batch:
        """Ids stay on the host: they would have to come back."""
        return Batch(batch.dense_features.to(device), batch.sparse_features, batch.labels.to(device))
