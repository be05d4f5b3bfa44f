"""The stream of chosen inputs on CUDA: pinned batches, batches that lie on the GPU, TorchRec's pipeline beside NCCL.

What is relied on besides, read in FBGEMM's source (no run has confirmed it for us yet): ``permute_1D_sparse_data``
takes a permutation that is shorter or longer than the lengths. With an empty one it hands its inputs back whole on a
GPU (``sparse_permute_1d.cu``), and nothing on a CPU; ``batches.py`` does not ask it then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec import KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from examples.arguments import parse_arguments
from examples.runtime import process_group
from examples.train_dlrm import train as train_dlrm
from tests.distributed.test_inputs import FAE, SIZE, SLIPSTREAM, Ranker, popular
from tests.inputs.samples import ids_of, numbered, same
from tests.inputs.test_stream import loader_of
from tests.tables import make_tbe
from torchrec_slipstream import (
    AccessConfig,
    InputsConfig,
    Slipstream,
    SlipstreamConfig,
    StalenessConfig,
    WeightedBatch,
)
from torchrec_slipstream.inputs.batches import concat, select, with_weights

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
N = 240
RANDOM = InputsConfig(method="random", drop_share=0.4)
NEGATIVES = InputsConfig(method="negatives", drop_share=0.3)
THINNING = InputsConfig(method="thinning", drop_share=0.3)
STOCK_UPDATES = StalenessConfig(target_share=0.0)


@pytest.fixture
def one_rank() -> Iterator[None]:
    with process_group(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)):
        yield


def on_device(batch: Batch) -> Batch:
    return batch.to(torch.device(DEVICE))


def tensors_of(batch: Any) -> list[Tensor]:
    """Of all fields; of a KJT its values, lengths and weights."""
    found: list[Tensor | None] = []
    for one in fields(batch):
        value = getattr(batch, one.name)
        is_kjt = isinstance(value, KeyedJaggedTensor)
        found += [value.values(), value.lengths(), value.weights_or_none()] if is_kjt else [value]
    return [one for one in found if one is not None]


def session(config: InputsConfig) -> Slipstream:
    """Of a bare TBE, for methods that look at no row."""
    tbe = make_tbe((2 * N, 2 * N), (4, 4), device=DEVICE)
    return Slipstream(tbe, SlipstreamConfig(inputs=config, staleness=STOCK_UPDATES))


# ------------------------------------------------------------------------------------------------------------ batches


def weighted(batch: Batch) -> WeightedBatch:
    size = batch.labels.numel()
    found = with_weights(batch, torch.arange(size, dtype=torch.float32) + 0.5)
    assert isinstance(found, WeightedBatch)
    return found


def with_lookup_weights(batch: Batch) -> Batch:
    features = batch.sparse_features
    weights = torch.arange(features.values().numel(), dtype=torch.float32)
    return Batch(
        batch.dense_features,
        KeyedJaggedTensor(features.keys(), features.values(), weights=weights, lengths=features.lengths()),
        batch.labels,
    )


@pytest.mark.parametrize("longest", [0, 3])
@pytest.mark.parametrize("change", [lambda batch: batch, weighted, with_lookup_weights])
@pytest.mark.parametrize("samples", [[5, 0, 5, 3], list(range(9)), []])
def test_batches_on_the_gpu_are_cut_and_joined_as_on_the_cpu(longest: int, change: Any, samples: list[int]) -> None:
    first, second = (change(numbered(ids, longest=longest)) for ids in (range(9), range(20, 26)))
    chosen = torch.tensor(samples, dtype=torch.int64)
    want = concat([select(first, chosen), second])
    part = select(on_device(first), chosen)
    got = concat([part, on_device(second)])
    assert {one.device.type for one in tensors_of(part) + tensors_of(got)} == {DEVICE}
    assert part.sparse_features.stride() == len(samples)
    assert same(part.to(torch.device("cpu")), select(first, chosen))
    assert same(got.to(torch.device("cpu")), want)
    features, expected = got.sparse_features, want.sparse_features
    assert features.offset_per_key() == expected.offset_per_key()
    assert features.offsets().tolist() == expected.offsets().tolist()


def test_batches_of_both_sides_meet_on_the_lasts() -> None:
    first, second = numbered(range(4)), numbered(range(4, 9))
    for parts in ([first, on_device(second)], [on_device(first), second]):
        got = concat(parts)
        assert got.labels.device == parts[-1].labels.device
        assert ids_of(got.to(torch.device("cpu"))) == list(range(9))


def test_a_weighted_batch_is_pinned_and_copied_with_its_weights() -> None:
    batch = weighted(numbered(range(40)))
    pinned = batch.pin_memory()
    assert isinstance(pinned, WeightedBatch)
    assert all(one.is_pinned() for one in tensors_of(pinned))
    assert not batch.weights.is_pinned(), "a copy"
    moved = pinned.to(torch.device(DEVICE), non_blocking=True)
    assert {one.device.type for one in tensors_of(moved)} == {DEVICE}
    torch.cuda.synchronize()
    assert same(moved.to(torch.device("cpu")), batch)


def test_a_weighted_batchs_memory_waits_for_the_stream_that_uses_it() -> None:
    size = 2**20  # 4 MiB of weights: no other block fits them
    ones = torch.ones(size)
    features = KeyedJaggedTensor(
        ["f0"], torch.zeros(0, dtype=torch.int64), lengths=torch.zeros(size, dtype=torch.int64)
    )
    batch = WeightedBatch(torch.zeros(size, 1), features, torch.zeros(size), weights=ones).to(torch.device(DEVICE))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    used = torch.cuda.Stream()
    used.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(used):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second or so
        copied = batch.weights.clone()
    batch.record_stream(used)
    address = batch.weights.data_ptr()
    del batch
    after = [torch.zeros(size, device=DEVICE) for _ in range(4)]
    assert address not in [one.data_ptr() for one in after]
    torch.cuda.synchronize()
    assert torch.equal(copied.cpu(), ones)


# --------------------------------------------------------------------------------------------------------- the stream


@pytest.mark.parametrize("config", [RANDOM, NEGATIVES])
def test_a_loader_that_pins_gets_pinned_batches(config: InputsConfig) -> None:
    plain = list(session(config).inputs(loader_of(range(N), SIZE)))
    found = list(session(config).inputs(one.pin_memory() for one in loader_of(range(N), SIZE)))
    assert len(found) > 10
    assert all(tensor.is_pinned() for batch in found for tensor in tensors_of(batch))
    assert not any(tensor.is_pinned() for batch in plain for tensor in tensors_of(batch))
    assert all(map(same, found, plain))


@pytest.mark.parametrize("config", [RANDOM, NEGATIVES, THINNING])
def test_a_loader_on_the_gpu_gets_batches_there(config: InputsConfig) -> None:
    want, one = session(config), session(config)
    expected = list(want.inputs(loader_of(range(N), SIZE)))
    found = list(one.inputs(map(on_device, loader_of(range(N), SIZE))))
    assert {tensor.device.type for batch in found for tensor in tensors_of(batch)} == {DEVICE}
    assert all(same(batch.to(torch.device("cpu")), like) for batch, like in zip(found, expected, strict=True))
    assert one.report().inputs == want.report().inputs


def test_off_hands_batches_on_the_gpu_through_untouched() -> None:
    batches = [on_device(batch) for batch in loader_of(range(N), SIZE)]
    assert [id(batch) for batch in session(InputsConfig()).inputs(batches)] == [id(batch) for batch in batches]


@pytest.mark.parametrize("config", [RANDOM, NEGATIVES])
def test_a_state_saved_on_the_gpu_goes_on(config: InputsConfig) -> None:
    one, again = session(config), session(config)
    stream = one.inputs(map(on_device, loader_of(range(N), SIZE)))
    for _ in range(5):
        next(stream)
        one.step()
    again.load_state_dict(one.state_dict())
    want = [ids_of(batch.to(torch.device("cpu"))) for batch in stream]
    rest = [ids_of(batch.to(torch.device("cpu"))) for batch in again.inputs(map(on_device, loader_of(range(N), SIZE)))]
    assert rest == want


# --------------------------------------------------------------------------------------------------- in training


def parallel() -> tuple[DistributedModelParallel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Ranker()
    apply_optimizer_in_backward(RowWiseAdagrad, model.tables.parameters(), {"lr": 0.1, "eps": 1e-8})
    constraint = ParameterConstraints(sharding_types=["table_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=1, compute_device=DEVICE),
        constraints={f"t{k}": constraint for k in range(2)},
        debug=False,
    )
    sharders = [EmbeddingBagCollectionSharder()]
    plan = planner.collective_plan(model, sharders, dist.GroupMember.WORLD)
    sharded = DistributedModelParallel(model, device=place(), plan=plan, sharders=sharders)
    for name, value in sorted(sharded.state_dict().items()):
        generator = torch.Generator().manual_seed(len(name))
        for shard in getattr(value, "local_shards", list)():
            shard.tensor.copy_(torch.rand(shard.tensor.shape, generator=generator) - 0.5)
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    return sharded, torch.optim.SGD(list(dense.values()), lr=0.1)


def place() -> torch.device:
    return torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


def epochs() -> list[list[Batch]]:
    orders = [torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).tolist() for epoch in range(3)]
    loaders = [loader_of(order, SIZE) for order in orders]
    return [[batch.pin_memory() for batch in loader] if DEVICE == "cuda" else loader for loader in loaders]


def things_of(config: InputsConfig) -> dict[str, Any]:
    return {"profile": popular()} if config.method == "fae" else {}


def trained(config: InputsConfig, *, pipelined: bool) -> tuple[list[list[int]], dict[str, Tensor], Slipstream]:
    """The samples of each step, the weights at the end, the session."""
    model, optimizer = parallel()
    access = AccessConfig(counter="exact", every=1)
    slip = Slipstream(model, SlipstreamConfig(inputs=config, staleness=STOCK_UPDATES, access=access))
    pipeline = TrainPipelineSparseDist(model, optimizer, place()) if pipelined else None
    order = []
    for epoch in epochs():
        stream = slip.inputs(epoch, **things_of(config))
        while True:
            if pipeline is not None:
                try:
                    dense = pipeline.progress(stream)
                except StopIteration:
                    break
            else:
                if (batch := next(stream, None)) is None:
                    break
                optimizer.zero_grad()
                loss, dense = model(batch.to(place()))
                loss.backward()
                optimizer.step()
            slip.step()
            order.append([int(i) for i in dense.view(-1).tolist()])
    weights = {}
    for name, value in model.state_dict().items():
        shards: list[Any] = getattr(value, "local_shards", list)()
        weights[name] = torch.cat([one.tensor for one in shards]) if shards else value
    return order, {name: value.detach().cpu().clone() for name, value in weights.items()}, slip


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("config", [InputsConfig(), RANDOM, NEGATIVES, FAE])
def test_the_pipeline_trains_on_what_is_kept_as_a_plain_loop_does(config: InputsConfig) -> None:
    order, weights, slip = trained(config, pipelined=True)
    plain_order, plain_weights, _ = trained(config, pipelined=False)
    assert order == plain_order
    for name, value in weights.items():
        torch.testing.assert_close(value, plain_weights[name], rtol=1e-4, atol=1e-6)
    report = slip.report().inputs
    if report is not None:
        assert report.used == sum(map(len, order)) == report.read - report.dropped
        assert report.dropped_share == pytest.approx(config.drop_share if config.method != "fae" else 0.0, abs=0.06)
    if config.method == "fae":
        assert {len({i < 100 for i in ids}) for ids in order} == {1}, "all hot, or all cold"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("hot", "start"), [(None, 4), (1200 * 36, N // SIZE + 1)])
def test_slipstream_finds_its_threshold_on_the_gpu(hot: int | None, start: int) -> None:
    """No two samples share a row: those that are counted in one epoch and move in the next are dropped in the last."""
    config = replace(SLIPSTREAM, slipstream=replace(SLIPSTREAM.slipstream, hot_bytes=hot, start=start))
    order, _, slip = trained(config, pipelined=True)
    report = slip.report().inputs
    assert report is not None
    assert report.used == sum(map(len, order))
    assert 0 < report.dropped < report.read / 2
    again, _, other = trained(config, pipelined=True)
    assert again == order
    assert other.report().inputs == report


def test_the_main_job_thins_its_inputs_on_the_gpu() -> None:
    """AUC and log-loss are of all test samples, the logits put right by what was dropped."""
    small = "--rows-per-table 200 --embedding-dim 8 --dense-mlp 16 --over-mlp 16 --samples 6000 --batch-size 50"
    found = {}
    for inputs in ("off", "thinning"):
        arguments = f"{small} --evaluations 2 --epochs 2 --inputs {inputs} --device {DEVICE} --sharding table_wise"
        with process_group(place()):
            found[inputs] = train_dlrm(parse_arguments(arguments.split()))
    thinned, whole = found["thinning"], found["off"]
    assert thinned["slipstream"]["inputs"]["dropped_share"] == pytest.approx(0.3, abs=0.05)
    assert thinned["slipstream"]["inputs"]["logit_shift"] < -0.2
    assert thinned["test"]["samples"] == whole["test"]["samples"] == 1200
    assert thinned["test"]["auc"] == pytest.approx(whole["test"]["auc"], abs=0.05)
    assert thinned["test"]["log_loss"] == pytest.approx(whole["test"]["log_loss"], abs=0.05)
