"""Ways to train one DLRM, from open-source DLRM's to ours: equal weights, equal batches, one step at a time.

=========================== ==========================================================================================
``dlrm_open_source``        ``nn.EmbeddingBag(sparse=True)`` a table, its row-wise Adagrad a step of its own
``xdl``                     all tables and their updates on the host (FBGEMM's CPU TBE), the dense part on the device
``torchrec_fused``          TorchRec: DistributedModelParallel, FUSED kernels, TrainPipelineSparseDist: what is *stock*
``torchrec_uvm``            the same with FUSED_UVM
``torchrec_uvm_caching_*``  the same with FUSED_UVM_CACHING, LRU or LFU, a load factor of the budget
``ours_counting``           torchrec_fused under a session that counts and leaves nothing out
``ours``                    its defaults but for a short warm-up: half of the look-ups' updates left out, where that
                            saves time
``ours_everywhere``         the same whether it does or not
``ours_tail``               as ``ours_everywhere``, rare rows first (``tail_share`` 0.75)
``random_lookups``          the control: half of the look-ups' updates left out blindly
``ours_hot_rows``           hot rows in an overlay, re-planned; nothing left out
``ours_all``                hot rows, and half of the updates left out, whether it saves time or not
``fae``                     pure hot and cold batches (arXiv 2103.00686), all tables where stock has them; all is sorted
                            in the first step, a warm-up's, and not in the times
``hotline``                 a popular and a non-popular micro-batch a step (arXiv 2204.05436), likewise
=========================== ==========================================================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.datasets.utils import Batch
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import CacheParams
from torchrec.models.dlrm import DLRM, DLRMTrain
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks.configurations import Configuration
from benchmarks.controls import attach_provider
from benchmarks.input_orders import HotRows, fae_config
from benchmarks.outside import EPS, HostBags, SparseBags
from benchmarks.sparse_rowwise import SparseRowWiseAdagrad
from examples.train_dlrm import Session
from torchrec_slipstream import AccessConfig, PlacementConfig, Slipstream, SlipstreamConfig, StalenessConfig

_DENSE_RATE = 0.02
# Steps before updates are left out, and between two decisions: a benchmark is too short for the defaults.
WARMUP_STEPS = 25
HBM_BUDGET = 0.1


@dataclass
class Provider:
    """One model in training.

    Attributes:
        step: trains on the coming batch.
        predict: the logits of a batch, ``[samples]``; ends the training.
        session: ours or a control's, if there is one.
    """

    step: Callable[[], None]
    predict: Callable[[Batch], Tensor]
    session: Session | None = None


@dataclass(frozen=True)
class Setting:
    """What all providers share: the configuration, the batches (trained on in a circle), seed and device."""

    configuration: Configuration
    batches: Sequence[Batch]
    seed: int
    device: torch.device

    def stream(self) -> Iterator[Batch]:
        return itertools.cycle(self.batches)

    def tables(self) -> list[EmbeddingBagConfig]:
        made = self.configuration
        return [
            EmbeddingBagConfig(
                name=f"t_{feature}",
                embedding_dim=made.dim,
                num_embeddings=rows,
                feature_names=[feature],
                init_fn=partial(_fill, seed=self.seed * 1000 + i),
            )
            for i, (feature, rows) in enumerate(zip(made.features, made.table_rows, strict=True))
        ]

    def model(self, embeddings: nn.Module) -> DLRMTrain:
        """TorchRec's DLRM, its dense weights seeded."""
        made = self.configuration
        torch.manual_seed(self.seed)
        return DLRMTrain(
            DLRM(
                embeddings,
                dense_in_features=made.dense,
                dense_arch_layer_sizes=[*made.dense_sizes, made.dim],
                over_arch_layer_sizes=[*made.over_sizes, 1],
                dense_device=self.device,
            )
        )


def _fill(weights: Tensor, seed: int) -> None:
    """Uniform within the inverse of the root of the table's rows, as DLRM does; equal for all providers."""
    bound = weights.shape[0] ** -0.5
    drawn = torch.rand(tuple(weights.shape), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weights.copy_(drawn.mul_(2 * bound).sub_(bound))


def build(name: str, setting: Setting) -> Provider:
    """The provider of that name. Needs a default process group.

    Raises:
        ValueError: there is no such provider, or the device cannot run it.
    """
    if reason := not_run(name, setting.device.type):
        raise ValueError(f"{name} cannot run here: {reason}")
    if name in _OUTSIDE:
        return _outside(_OUTSIDE[name](setting.tables(), setting.device, setting.configuration.table_rate), setting)
    if name in _OF_PAPERS:
        return _OF_PAPERS[name](setting)
    kernel = _KERNELS.get(name, _Kernel())
    if name in _WITH_HOT_ROWS and setting.device.type != "cpu":
        kernel = _Kernel("fused_uvm")  # of which the overlay takes the hot rows; a CPU's tables are all in host memory
    control = name if name in _CONTROLS else None
    return _torchrec(setting, kernel, _SESSIONS.get(name), control)


def not_run(name: str, device: str) -> str | None:
    """Why a provider cannot run on a ``device``; None if it can."""
    if name not in NAMES:
        raise ValueError(f"{name!r} is no provider; give some of {', '.join(NAMES)}")
    if device == "cpu" and _KERNELS.get(name, _Kernel()).kernel != "fused":
        return "UVM and FBGEMM's cache need a CUDA device"
    return None


def _outside(embeddings: SparseBags | HostBags, setting: Setting) -> Provider:
    model = setting.model(embeddings)
    sparse = list(embeddings.bags.parameters()) if isinstance(embeddings, SparseBags) else []
    known = {id(one) for one in sparse} | {id(one) for one in embeddings.parameters()}
    optimizers: list[torch.optim.Optimizer] = [_dense_optimizer([p for p in model.parameters() if id(p) not in known])]
    if sparse:
        optimizers.append(SparseRowWiseAdagrad(sparse, lr=setting.configuration.table_rate, eps=EPS))
    stream = setting.stream()

    def step() -> None:
        batch = embeddings.place(next(stream), setting.device)
        for one in optimizers:
            one.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        for one in optimizers:
            one.step()

    return Provider(step, lambda batch: _predict(model, embeddings.place(batch, setting.device)))


def _torchrec(
    setting: Setting,
    kernel: _Kernel,
    session_of: Callable[[Configuration], SlipstreamConfig] | None,
    control: str | None,
) -> Provider:
    sharded, optimizer = _sharded(setting, kernel)
    session = None
    if session_of is not None:
        session = attach_provider(control or "ours", sharded, session_of(setting.configuration), setting.seed)
    return _pipelined(setting, sharded, optimizer, setting.stream(), session)


def _sharded(setting: Setting, kernel: _Kernel) -> tuple[DistributedModelParallel, torch.optim.Optimizer]:
    """The model under TorchRec, and the dense part's optimizer; the tables' own is fused into the backward."""
    tables = setting.tables()
    model = setting.model(EmbeddingBagCollection(tables=tables, device=torch.device("meta")))
    apply_optimizer_in_backward(
        RowWiseAdagrad, model.model.sparse_arch.parameters(), {"lr": setting.configuration.table_rate, "eps": EPS}
    )
    constraint = ParameterConstraints(
        sharding_types=["table_wise"], compute_kernels=[kernel.kernel], cache_params=kernel.cache_params()
    )
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(), compute_device=setting.device.type),
        batch_size=setting.configuration.batch,
        constraints={table.name: constraint for table in tables},
        debug=False,
    )
    sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(module=model, device=setting.device, plan=plan, sharders=sharders)
    return sharded, _dense_optimizer([p for name, p in sharded.named_parameters() if "embedding_bag" not in name])


def _pipelined(
    setting: Setting,
    sharded: DistributedModelParallel,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Batch],
    session: Session | None,
) -> Provider:
    pipeline = TrainPipelineSparseDist(sharded, optimizer, setting.device)

    def step() -> None:
        pipeline.progress(stream)
        if session is not None:
            session.step()

    return Provider(step, lambda batch: _predict(pipeline.detach(), batch.to(setting.device)), session)


def _fae(setting: Setting) -> Provider:
    """All batches of the run sorted into pure hot and cold ones; the tables where stock has them: the order is all."""
    sharded, optimizer = _sharded(setting, _Kernel())
    hot = HotRows(sharded, setting.tables(), setting.batches)
    inputs = fae_config(hot, window=len(setting.batches))
    session = Slipstream(sharded, SlipstreamConfig(staleness=StalenessConfig(target_share=0.0), inputs=inputs))
    stream = itertools.chain.from_iterable(
        session.inputs(setting.batches, profile=hot.profile) for _ in itertools.count()
    )
    return _pipelined(setting, sharded, optimizer, stream, session)


def _hotline(setting: Setting) -> Provider:
    """Two micro-batches a step; no pipeline, as Hotline runs forward and backward itself."""
    sharded, optimizer = _sharded(setting, _Kernel())
    session = Slipstream(sharded, SlipstreamConfig(staleness=StalenessConfig(target_share=0.0)))
    hotline = session.hotline(HotRows(sharded, setting.tables(), setting.batches).sets)
    stream = setting.stream()

    def step() -> None:
        optimizer.zero_grad()
        hotline.backward(next(stream).to(setting.device), lambda part: sharded(part)[0])
        optimizer.step()
        session.step()

    return Provider(step, lambda batch: _predict(sharded, batch.to(setting.device)), session)


def _dense_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=_DENSE_RATE, eps=EPS)


def _predict(model: nn.Module, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        _, (_, logits, _) = model(batch)
    return logits


@dataclass(frozen=True)
class _Kernel:
    kernel: str = "fused"
    algorithm: CacheAlgorithm | None = None
    load_factor: float = HBM_BUDGET

    def cache_params(self) -> CacheParams | None:
        if self.algorithm is None:
            return None
        return CacheParams(algorithm=self.algorithm, load_factor=self.load_factor)


def _skipping(configuration: Configuration, **staleness: Any) -> SlipstreamConfig:
    return SlipstreamConfig(staleness=StalenessConfig(warmup_steps=WARMUP_STEPS, interval=WARMUP_STEPS, **staleness))


def _hot_rows(configuration: Configuration, target_share: float) -> SlipstreamConfig:
    return SlipstreamConfig(
        staleness=StalenessConfig(
            target_share=target_share, where="everywhere", warmup_steps=WARMUP_STEPS, interval=WARMUP_STEPS
        ),
        access=AccessConfig(counter="exact"),
        placement=PlacementConfig(
            hbm_budget=int(HBM_BUDGET * configuration.table_bytes) + 4 * sum(configuration.table_rows),
            replan_every=WARMUP_STEPS,
        ),
    )


_OUTSIDE: dict[str, Callable[[list[EmbeddingBagConfig], torch.device, float], SparseBags | HostBags]] = {
    "dlrm_open_source": SparseBags,
    "xdl": HostBags,
}
_KERNELS = {
    "torchrec_uvm": _Kernel("fused_uvm"),
    "torchrec_uvm_caching_lru": _Kernel("fused_uvm_caching", CacheAlgorithm.LRU),
    "torchrec_uvm_caching_lfu": _Kernel("fused_uvm_caching", CacheAlgorithm.LFU),
}
_SESSIONS: dict[str, Callable[[Configuration], SlipstreamConfig]] = {
    "ours_counting": partial(_skipping, target_share=0.0),
    "ours": _skipping,
    "ours_everywhere": partial(_skipping, where="everywhere"),
    "ours_tail": partial(_skipping, where="everywhere", tail_share=0.75),
    "random_lookups": _skipping,
    "ours_hot_rows": partial(_hot_rows, target_share=0.0),
    "ours_all": partial(_hot_rows, target_share=0.5),
}
_CONTROLS = ("random_lookups",)
_WITH_HOT_ROWS = ("ours_hot_rows", "ours_all")
# That drop no input; benchmarks.inputs has those that do, whose steps are fewer and not shorter.
_OF_PAPERS: dict[str, Callable[[Setting], Provider]] = {"fae": _fae, "hotline": _hotline}
NAMES = (*_OUTSIDE, "torchrec_fused", *_KERNELS, *_SESSIONS, *_OF_PAPERS)
