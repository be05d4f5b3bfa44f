"""What this room relies on of FBGEMM and TorchRec, checked when a session attaches.

Other versions name things otherwise. Whoever has one of them shall hear so before anything changes, with what is
missing, and not by an AttributeError in the middle of a step. What counts is that everything is there, not a number:
versions outside of those supported are warned of once (``installed.py``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_kernel import BaseEmbedding

from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.installed import versions_note, warn_if_outside

# What FBGEMM's forward takes after the five that are always there, in its order (the same from 1.6 to 1.8).
MORE_ARGUMENTS = (
    "total_unique_indices",
    "hash_zch_identities",
    "hash_zch_runtime_meta",
    "vbe_output",
    "vbe_output_offsets",
)

# Of a TBE whatever is done with it: state, and methods that are not called with arguments (`CALLS` has the others).
ATTRIBUTES = (
    *("current_device", "use_cpu", "embedding_specs", "feature_table_map", "rows_per_table"),
    *("weights_precision", "output_dtype", "pooling_mode", "bounds_check_mode_int"),
    *("weights_host", "weights_dev", "weights_uvm", "weights_placements", "weights_offsets"),
    *("D_offsets", "max_D", "info_B_num_bits", "info_B_mask"),
    *("optimizer", "optimizer_args", "_used_rowwise_adagrad_with_counter"),
    "_used_rowwise_adagrad_with_global_weight_decay",
    *("_indices", "_offsets", "_vbe_B_offsets", "lxu_cache_locations", "lxu_cache_weights"),
    *("prefetch_pipeline", "use_uniq_cache_locations_bwd", "total_cache_hash_size"),
    *("flush", "split_embedding_weights", "split_optimizer_states", "reset_embedding_weight_momentum"),
)
# Where FBGEMM's cache holds rows ...
CACHE_ATTRIBUTES = ("lxu_cache_state", "cache_hash_size_cumsum")
# ... and locks them.
LOCKING_ATTRIBUTES = ("lxu_cache_locking_counter",)
# Where the TBE gets an overlay.
OVERLAY_ATTRIBUTES = (
    *("lxu_cache_locations_list", "prefetch_stream", "learning_rate_tensor", "weight_decay_mode"),
    *("use_rowwise_bias_correction", "use_writeback_bwd_prehook", "enable_raw_embedding_streaming"),
    *("hash_size_cumsum", "total_hash_size", "total_hash_size_bits"),
)
_OPTIMIZER_ARGUMENTS = ("gradient_clipping", "max_gradient", "total_hash_size", "_replace")
_VARIABLE_BATCH = (
    *("B_offsets", "B_offsets_rank_per_feature", "output_offsets_feature_rank", "max_B_feature_rank", "max_B"),
)
# Methods, with what they are given by position and by name.
CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "forward": (
        ("indices", "offsets", "per_sample_weights", "feature_requires_grad", "batch_size_per_feature_per_rank"),
        (),
    ),
    "prefetch": (("indices", "offsets", "forward_stream", "batch_size_per_feature_per_rank"), ()),
    "prepare_inputs": (
        ("indices", "offsets", "per_sample_weights", "batch_size_per_feature_per_rank"),
        ("force_cast_input_types", "prefetch_pipeline", "vbe_output", "vbe_output_offsets"),
    ),
    "_generate_vbe_metadata": (
        ("offsets", "batch_size_per_feature_per_rank", "vbe_output", "vbe_output_offsets"),
        (),
    ),
    "get_optimizer_buffer": (("state",), ()),
}
# How an overlay's TBE is made.
_CONSTRUCTOR = (
    *("feature_table_map", "optimizer", "weight_decay_mode", "optimizer_state_dtypes", "weights_precision"),
    *("output_dtype", "pooling_mode", "bounds_check_mode", "device", "extra_optimizer_config"),
)
OPERATORS = (
    "split_embedding_codegen_grad_indice_weights_pt2_wrapper",
    "split_embedding_codegen_grad_indice_weights_vbe_pt2_wrapper",
    "generate_vbe_metadata",
    "lxu_cache_lookup",
    "linearize_cache_indices",
)
_TABLE = ("name", "local_rows", "local_cols", "num_embeddings", "embedding_dim", "local_metadata")


def check_tbe(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    """Raises AttachError unless a stock TBE has all that counting, filtering and reading its rows rely on."""
    kind = type(tbe).__name__
    lacks = _lacking(tbe, ATTRIBUTES, kind)
    if not lacks and tbe.lxu_cache_weights.numel() > 0:
        lacks += _lacking(tbe, CACHE_ATTRIBUTES, kind)
        if tbe.prefetch_pipeline:
            lacks += _lacking(tbe, LOCKING_ATTRIBUTES, kind)
    lacks += _lacking(getattr(tbe, "optimizer_args", None), _OPTIMIZER_ARGUMENTS, f"{kind}.optimizer_args")
    for name, (positional, named) in CALLS.items():
        lacks += misfits(getattr(type(tbe), name, None), f"{kind}.{name}", positional, named)
    lacks += _forwards_otherwise(tbe)
    fields = getattr(_returns(getattr(type(tbe), "_generate_vbe_metadata", None)), "_fields", _VARIABLE_BATCH)
    lacks += [f"{kind}._generate_vbe_metadata().{name}" for name in _VARIABLE_BATCH if name not in fields]
    lacks += _lacking(torch.ops.fbgemm, OPERATORS, "torch.ops.fbgemm")
    _refuse(lacks)
    warn_if_outside()


def check_overlay(tbe: SplitTableBatchedEmbeddingBagsCodegen, optimizer: Any = None) -> None:
    """Raises AttachError unless the TBE has what an overlay relies on besides.

    Args:
        optimizer: the fused optimizer that TorchRec keeps for it, if any.
    """
    kind = type(tbe).__name__
    lacks = _lacking(tbe, OVERLAY_ATTRIBUTES, kind)
    if hasattr(tbe, "iter_cpu"):  # not every optimizer counts steps
        lacks += _lacking(tbe, ("iter",), kind)
    lacks += misfits(SplitTableBatchedEmbeddingBagsCodegen, kind, (), _CONSTRUCTOR)
    # Keeps the order of its hooks by name.
    lacks += _lacking(tbe, ("_load_state_dict_pre_hooks",), "torch.nn.Module")
    if optimizer is not None:
        lacks += _lacking(optimizer, ("_emb_module",), type(optimizer).__name__)
        if "state" not in vars(optimizer):
            lacks.append(f"{type(optimizer).__name__}.state")
    _refuse(lacks)


def check_kernel(kernel: BaseEmbedding) -> None:
    """Raises AttachError unless a TorchRec kernel keeps its TBE and its tables where they are looked for."""
    kind = type(kernel).__name__
    if not hasattr(kernel, "emb_module"):
        # Kernels of plain torch modules have none.
        has_tbe = any(isinstance(module, SplitTableBatchedEmbeddingBagsCodegen) for module in kernel.modules())
        _refuse([f"{kind}.emb_module"] if has_tbe else [])
        return
    tables = getattr(getattr(kernel, "config", None), "embedding_tables", None)
    if tables is None:
        _refuse([f"{kind}.config.embedding_tables"])
        return
    _refuse(_lacking(tables[0], _TABLE, f"{kind}.config.embedding_tables[0]") if tables else [])


def check_specs(tbe: nn.Module) -> None:
    """Raises AttachError unless a TBE that no kernel describes says itself which tables it has."""
    _refuse(_lacking(tbe, ("embedding_specs",), type(tbe).__name__))


def check_collection(path: str, found: bool) -> None:
    """Raises AttachError unless the sharded collection of the kernel at ``path`` was ``found``."""
    _refuse([] if found or "._lookups" not in path else ["module_sharding_plan of the collection above " + path])


def check_parallel(model: nn.Module) -> None:
    """Raises AttachError unless a DistributedModelParallel says which ranks it is on."""
    if isinstance(model, DistributedModelParallel):
        _refuse(_lacking(getattr(model, "_env", None), ("process_group",), f"{type(model).__name__}._env"))


def misfits(
    function: Callable[..., Any] | None, called: str, positional: tuple[str, ...], named: Iterable[str]
) -> list[str]:
    """What keeps ``function`` from being called so: with ``positional`` arguments in this order, and ``named`` ones.

    Returns:
        Names for a message, none if it can.
    """
    if function is None:
        return [called]
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # nothing to be known of it
        return []
    kinds = {one.kind for one in parameters}
    names = names_of(function)
    lacks = []
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        lacks = [f"{called}({name}=)" for name in positional if name not in names]
        if not lacks and names[: len(positional)] != positional:
            lacks = [f"{called}({', '.join(positional)}) in this order"]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        lacks += [f"{called}({name}=)" for name in named if name not in names]
    return lacks


def names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's arguments, without ``self``, ``*these`` and ``**those``."""
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, one in inspect.signature(function).parameters.items() if one.kind not in many]
    return tuple(names[1:] if names[:1] == ["self"] else names)


def lacking_message(lacks: Iterable[str]) -> str:
    """The message for what is missing."""
    return f"this version has no {', no '.join(lacks)}, which torchrec_slipstream relies on. {versions_note()}"


def _forwards_otherwise(tbe: SplitTableBatchedEmbeddingBagsCodegen) -> list[str]:
    """Arguments that our forward would hand on under another's name where they are given by position."""
    if not hasattr(type(tbe), "forward"):
        return []  # said already
    theirs = names_of(type(tbe).forward)[5:]
    wrong = [ours for ours, their in zip(MORE_ARGUMENTS, theirs, strict=False) if ours != their]
    return [f"{type(tbe).__name__}.forward with {wrong[0]} where it was"] if wrong else []


def _returns(function: Callable[..., Any] | None) -> Any:
    return inspect.signature(function).return_annotation if function is not None else None


def _lacking(thing: Any, names: Iterable[str], called: str) -> list[str]:
    return [f"{called}.{name}" for name in names if not hasattr(thing, name)]


def _refuse(lacks: list[str]) -> None:
    if lacks:
        raise AttachError(f"cannot attach: {lacking_message(lacks)}")
