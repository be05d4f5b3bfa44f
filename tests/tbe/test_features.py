"""Which tables features look up in, of models that are not sharded; sharded ones: tests/distributed/test_input_rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

from tests.models import META
from tests.tables import make_tbe
from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.tbe.features import ModelTable, model_tables


def test_unsharded_collections() -> None:
    """A table with two features, and a feature that two collections look up."""
    model = nn.Module()
    model.bags = EmbeddingBagCollection(
        device=META,
        tables=[EmbeddingBagConfig(name="t", embedding_dim=4, num_embeddings=9, feature_names=["a", "b"])],
    )
    model.sequences = EmbeddingCollection(
        device=META,
        tables=[EmbeddingConfig(name="t", embedding_dim=8, num_embeddings=7, feature_names=["b"])],
    )
    assert model_tables(model) == (
        ModelTable("bags.t", "t", ("a", "b"), 9, 4, replicated=True),
        ModelTable("sequences.t", "t", ("b",), 7, 8, replicated=True),
    )
    assert model_tables(model.bags)[0].fqn == "t"


def test_bare_tbes_call_features_by_their_tables() -> None:
    model = nn.ModuleDict({"one": make_tbe((50, 30), (8, 16), features=(0, 0, 1)), "two": make_tbe((5,), (4,))})
    assert model_tables(model) == (
        ModelTable("one.table_0", "table_0", ("one.table_0:0", "one.table_0:1"), 50, 8),
        ModelTable("one.table_1", "table_1", ("one.table_1",), 30, 16),
        ModelTable("two.table_0", "table_0", ("two.table_0",), 5, 4),
    )


def test_refuses_what_has_no_tables() -> None:
    with pytest.raises(AttachError, match="Linear has no embedding collection"):
        model_tables(nn.Linear(1, 1))


def test_refuses_ids_that_are_remapped() -> None:
    config = EmbeddingConfig(name="t", embedding_dim=4, num_embeddings=9, feature_names=["a"])
    remapping = MCHManagedCollisionModule(
        zch_size=9, device=torch.device("cpu"), input_hash_size=100, eviction_interval=2,
        eviction_policy=DistanceLFU_EvictionPolicy(),
    )  # fmt: skip
    model = ManagedCollisionEmbeddingCollection(
        EmbeddingCollection(tables=[config]), ManagedCollisionCollection({"t": remapping}, [config])
    )
    with pytest.raises(AttachError, match="managed-collision"):
        model_tables(model)
