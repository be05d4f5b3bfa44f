"""A version of FBGEMM or TorchRec that lacks something is refused before anything changes, and says what it lacks."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.planner.types import Proposer, ShardingOption

import torchrec_slipstream
from tests.models import TwoCollections, sharded
from tests.placement.planning import planner_of, profile_of, topology_of
from tests.tables import make_lookups, make_tbe, overlaid
from torchrec_slipstream import AttachError, PlanError, Slipstream, SlipstreamPlanner
from torchrec_slipstream import installed as installed_module
from torchrec_slipstream.installed import installed, versions_note
from torchrec_slipstream.tbe import find_tbes, process_group_of, versions
from torchrec_slipstream.tbe.overlay_tbe import check_can_have_overlay

TBE = SplitTableBatchedEmbeddingBagsCodegen
PACKAGE = Path(torchrec_slipstream.__file__).parent


class _Gone:
    """What a class has in place of something that it does not have."""

    def __get__(self, instance: object, owner: type) -> object:
        raise AttributeError


def without(module: Any, name: str) -> None:
    """Take an attribute off an object, or off its class alone."""
    try:
        delattr(module, name)
    except AttributeError:
        module.__class__ = type(type(module).__name__, (type(module),), {name: _Gone()})


@pytest.mark.parametrize("name", [*versions.ATTRIBUTES, *versions.CALLS])
def test_attribute_that_is_missing(name: str) -> None:
    model = nn.ModuleList([make_tbe(), make_tbe(table_names=["c", "d"])])
    without(model[1], name)
    classes = [type(module) for module in model]
    lacks = re.escape(f"cannot attach: this version has no {classes[1].__name__}.{name}")
    with pytest.raises(AttachError, match=lacks + r"\b") as caught:
        Slipstream(model)
    assert str(caught.value).endswith(versions_note())
    assert (
        f"torchrec {installed()['torchrec']}. Supported: torch 2.11 to 2.13, FBGEMM 1.6 to 1.8, torchrec 1.6.1"
        in str(caught.value)
    )
    assert [type(module) for module in model] == classes, "something was attached"


def test_attributes_of_the_cache_only_where_there_is_one() -> None:
    tbe = make_tbe()
    without(tbe, "lxu_cache_state")
    without(tbe, "lxu_cache_locking_counter")
    find_tbes(nn.ModuleList([tbe]))
    tbe.lxu_cache_weights = tbe.weights_host.new_zeros(32, 16)
    with pytest.raises(AttachError, match=r"no \w+\.lxu_cache_state, which"):
        find_tbes(nn.ModuleList([tbe]))
    tbe.lxu_cache_state = tbe.weights_host.new_zeros(1, 32)
    find_tbes(nn.ModuleList([tbe]))
    tbe.prefetch_pipeline = True
    with pytest.raises(AttachError, match=r"no \w+\.lxu_cache_locking_counter, which"):
        find_tbes(nn.ModuleList([tbe]))


@pytest.mark.parametrize("name", [*versions.OVERLAY_ATTRIBUTES, "iter"])
def test_attributes_of_an_overlay_only_where_there_is_one(name: str) -> None:
    tbe = make_tbe()
    tbe.iter_cpu = tbe.weights_host.new_zeros(1)  # as optimizers have it that count steps; those a CPU does not have
    tbe.iter = tbe.iter_cpu.clone()
    without(tbe, name)
    with pytest.raises(AttachError, match=rf"this version has no \w+\.{name}, which"):
        overlaid(tbe, {8: 4})
    Slipstream(nn.ModuleList([tbe])).detach()


def test_every_attribute_that_is_used_is_checked() -> None:
    known = {*versions.ATTRIBUTES, *versions.CACHE_ATTRIBUTES, *versions.LOCKING_ATTRIBUTES, *versions.CALLS}
    known |= {*versions.OVERLAY_ATTRIBUTES, "iter", "iter_cpu", *dir(nn.Module())}
    used: dict[str, str] = {}
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("tracker.py", "choosing.py"):  # whose `tbe` is a TrackedTbe
            continue
        names = {"tbe"} | ({"_tbe"} if path.parent.name == "tbe" else set())
        if path.name in ("overlay.py", "overlay_tbe.py"):
            names |= {"backing"}
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Attribute):
                continue
            of = node.value
            # `backing` is a TBE, `self.backing` are its rows.
            is_tbe = (isinstance(of, ast.Name) and of.id in names) or (
                isinstance(of, ast.Attribute) and of.attr in names - {"backing"}
            )
            if is_tbe:
                used[node.attr] = path.name
    assert len(used) > 30
    assert {name: path for name, path in used.items() if name not in known} == {}


class OlderInputs(TBE):
    def prepare_inputs(  # type: ignore[override]
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
        force_cast_input_types: bool = True,
        prefetch_pipeline: bool = False,
    ) -> Any: ...


class OtherOrder(TBE):
    def prefetch(  # type: ignore[override]
        self, indices: Tensor, offsets: Tensor, batch_size_per_feature_per_rank: Any = None, forward_stream: Any = None
    ) -> None: ...


class ForwardInOtherOrder(TBE):
    def forward(  # type: ignore[override]
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
        something_new: Any = None,
        total_unique_indices: int | None = None,
    ) -> Tensor: ...


@pytest.mark.parametrize(
    ("older", "lacks"),
    [
        (OlderInputs, "OlderInputs.prepare_inputs(vbe_output=), no OlderInputs.prepare_inputs(vbe_output_offsets=)"),
        (OtherOrder, "OtherOrder.prefetch(indices, offsets, forward_stream, batch_size_per_feature_per_rank) in this"),
        (ForwardInOtherOrder, "ForwardInOtherOrder.forward with total_unique_indices where it was"),
    ],
)
def test_method_with_other_arguments(older: type, lacks: str) -> None:
    tbe = make_tbe()
    tbe.__class__ = older
    with pytest.raises(AttachError, match=re.escape(f"this version has no {lacks}")):
        Slipstream(nn.ModuleList([tbe]))


class Newer(TBE):
    """One more argument, at the end."""

    def forward(  # type: ignore[override]
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        feature_requires_grad: Tensor | None = None,
        batch_size_per_feature_per_rank: list[list[int]] | None = None,
        total_unique_indices: int | None = None,
        hash_zch_identities: Tensor | None = None,
        hash_zch_runtime_meta: Tensor | None = None,
        vbe_output: Tensor | None = None,
        vbe_output_offsets: Tensor | None = None,
        something_new: float = 1.0,
    ) -> Tensor:
        output = super().forward(
            indices, offsets, per_sample_weights, feature_requires_grad, batch_size_per_feature_per_rank
        )
        return output * something_new


class AnyArguments(TBE):
    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        return super().forward(*arguments, **named)


@pytest.mark.parametrize("newer", [Newer, AnyArguments])
def test_a_newer_one_that_has_everything_works(newer: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed_module, "SUPPORTED", installed_module.SUPPORTED | {"torchrec": ("1.0.0", "1.1.0")})
    installed_module.warn_if_outside.cache_clear()
    tbe, lookups = make_tbe(), make_lookups((50, 30), (3, 3))
    expected = lookups.run(tbe).detach()
    tbe.__class__ = newer
    with pytest.warns(UserWarning, match=r"torchrec 1\.\d+\.\d+ \(supported: 1\.0\.0 to 1\.1\.0\)"):
        session = Slipstream(nn.ModuleList([tbe]))
    assert lookups.run(tbe).equal(expected)
    session.detach()
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        Slipstream(nn.ModuleList([tbe])).detach()
    installed_module.warn_if_outside.cache_clear()


def test_operator_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "OPERATORS", (*versions.OPERATORS, "of_another_release"))
    with pytest.raises(AttachError, match=r"no torch\.ops\.fbgemm\.of_another_release, which"):
        Slipstream(nn.ModuleList([make_tbe()]))


@pytest.fixture
def parallel(tmp_path: Path) -> Iterator[DistributedModelParallel]:
    """A sharded model on one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        yield sharded(TwoCollections())
    finally:
        dist.destroy_process_group()


def test_parts_of_torchrec_that_are_missing(parallel: DistributedModelParallel) -> None:
    found = find_tbes(parallel)
    check_can_have_overlay(found[0])
    without(found[0].optimizer, "_emb_module")
    with pytest.raises(AttachError, match=r"no EmbeddingFusedOptimizer\._emb_module, which"):
        check_can_have_overlay(found[0])

    environment = parallel._env
    del parallel._env
    with pytest.raises(AttachError, match=r"no DistributedModelParallel\._env\.process_group, which"):
        process_group_of(parallel)
    parallel._env = environment

    bags = parallel.module.bags
    plan = bags.module_sharding_plan
    del bags.module_sharding_plan
    with pytest.raises(AttachError, match=r"no module_sharding_plan of the collection above bags\._lookups\."):
        find_tbes(parallel)
    bags.module_sharding_plan = plan

    kernel = bags._lookups[0]._emb_modules[0]
    kind = type(kernel)
    without(kernel.config.embedding_tables[0], "num_embeddings")
    with pytest.raises(AttachError, match=rf"no {kind.__name__}\.config\.embedding_tables\[0\]\.num_embeddings, which"):
        find_tbes(parallel)
    without(kernel, "emb_module")
    with pytest.raises(AttachError, match=rf"no {kind.__name__}\.emb_module, which"):
        find_tbes(parallel)


def any_planner() -> SlipstreamPlanner:
    return planner_of(profile_of([np.array([3, 2, 1])], [4]), topology_of(1))


def test_planner_that_calls_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: Proposer, search_space: list[ShardingOption], hints: object) -> None: ...

    any_planner()
    monkeypatch.setattr(Proposer, "load", load)
    with pytest.raises(PlanError, match=r"cannot plan: .*no Proposer\.load without\(hints=\), which") as caught:
        any_planner()
    assert str(caught.value).endswith(versions_note())


def test_planner_that_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardingOption, "__init__", lambda self, name, tensor: None)
    with pytest.raises(PlanError, match=r"no ShardingOption\(module=\), no ShardingOption\(input_lengths=\)"):
        any_planner()
