"""Which TBEs a session may attach to, and what it says of the others."""

from __future__ import annotations

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    CounterBasedRegularizationDefinition,
    DenseTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import nn

from tests.tables import make_tbe
from torchrec_slipstream import AttachError, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.tbe import find_tbes


class Model(nn.Module):
    """A tree with TBEs at several depths, one of them in a plain list as TorchRec does."""

    def __init__(self) -> None:
        super().__init__()
        self.left = make_tbe((10, 20), (8, 8), table_names=["a", "b"])
        self.deep = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"right": make_tbe((5,), (4,), table_names=["c"])}))
        self.hidden = [make_tbe((7,), (4,))]


def test_finds_tbes_wherever_they_are() -> None:
    found = find_tbes(Model())
    shards = {shard.key: (shard.rows, shard.dim, shard.row_begin) for one in found for shard in one.shards}
    assert shards == {
        "left.a@0:0": (10, 8, 0),
        "left.b@0:0": (20, 8, 10),
        "deep.1.right.c@0:0": (5, 4, 0),
        "hidden.table_0@0:0": (7, 4, 0),
    }


def test_model_without_tbe() -> None:
    with pytest.raises(AttachError, match="Linear contains no table-batched embedding"):
        Slipstream(nn.Linear(2, 2))


def test_attaching_twice() -> None:
    model = Model()
    session = Slipstream(model)
    with pytest.raises(AttachError, match="attached already; detach") as caught:
        Slipstream(model)
    assert "exclude_tables" not in str(caught.value), "that is no remedy"
    session.detach()
    Slipstream(model).detach()


def test_optimizer_none_changes_nothing() -> None:
    model = Model()
    model.extra = make_tbe((3,), (4,), table_names=["bad"])
    # OptimType.NONE itself cannot be built on a CPU.
    model.extra.optimizer = EmbOptimType.NONE
    classes = [type(module) for module in model.modules()]
    with pytest.raises(AttachError, match=r"(?s)bad.*returns gradients instead of updating"):
        Slipstream(model)
    assert [type(module) for module in model.modules()] == classes


def test_data_parallel_table_must_be_excluded() -> None:
    model = Model()
    model.dense = DenseTableBatchedEmbeddingBagsCodegen([(6, 8)], use_cpu=True)
    with pytest.raises(AttachError, match=r"(?s)table_0.*not fused.*\nShard such tables with a fused.*exclude_tables"):
        Slipstream(model)
    config = SlipstreamConfig(staleness=StalenessConfig(exclude_tables=("table_0",)))
    session = Slipstream(model, config)
    assert set(session.report().tables) == {"left.a", "left.b", "deep.1.right.c"}
    session.detach()


def test_unknown_excluded_table() -> None:
    config = SlipstreamConfig(staleness=StalenessConfig(exclude_tables=("d",)))
    with pytest.raises(
        AttachError, match=r"\['d'\], which the model does not have; it has \['a', 'b', 'c', 'table_0'\]$"
    ):
        Slipstream(Model(), config)


def test_counter_based_regularisation_is_refused() -> None:
    tbe = make_tbe(
        (10,),
        (8,),
        weight_decay_mode=WeightDecayMode.COUNTER,
        counter_based_regularization=CounterBasedRegularizationDefinition(),
    )
    with pytest.raises(AttachError, match=r"(?s)counts updates.*\nLeave such tables alone with exclude_tables=\S+\.$"):
        find_tbes(nn.ModuleList([tbe]))


def test_signal_that_the_optimizer_cannot_feed() -> None:
    model = nn.ModuleList([make_tbe(optimizer=EmbOptimType.EXACT_SGD)])
    with pytest.raises(AttachError, match=r"signal='gain'.*signal='movement'"):
        Slipstream(model, SlipstreamConfig(staleness=StalenessConfig(selection="duty", signal="gain")))
    assert not hasattr(model[0], "_slipstream")
    Slipstream(model).detach()  # "auto" finds one that fits


def test_config_of_another_type() -> None:
    with pytest.raises(AttachError, match="must be a SlipstreamConfig, not StalenessConfig"):
        Slipstream(Model(), StalenessConfig())  # type: ignore[arg-type]


def test_same_table_twice() -> None:
    model = nn.Module()
    model.a = nn.ModuleList([make_tbe((5, 5), (4, 4), table_names=["t", "t"])])
    with pytest.raises(AttachError, match="same shard"):
        find_tbes(model)


def test_prefetch_pipeline_with_a_cache_is_refused() -> None:
    tbe = make_tbe(prefetch_pipeline=True)
    find_tbes(nn.ModuleList([tbe]))  # without a cache it does no harm
    tbe.total_cache_hash_size = torch.tensor(80)
    with pytest.raises(AttachError, match=r"table_0, table_1: prefetch_pipeline=True on a UVM-cached table"):
        find_tbes(nn.ModuleList([tbe]))
    assert len(find_tbes(nn.ModuleList([tbe]), skips=False)) == 1, "hot rows alone get on with it"
