"""FBGEMM and TorchRec internals: the one room that knows them.

Three jobs: find the table-batched embeddings (TBEs) that TorchRec hides in a sharded model; say which of them can
have updates left out; and attach the *update filter* to one, by changing its class in place as FSDP2's
``fully_shard`` does, so that isinstance checks, ``state_dict``, ``flush`` and the fused optimizer's keys stay stock.

How the filter works. FBGEMM's look-up is a C++ autograd function which saves ``indices``, ``offsets``, the per-sample
weights and (on a GPU) ``lxu_cache_locations``, and hands them to the fused backward-and-update. The stock forward
runs over all look-ups inside ``torch.autograd.graph.saved_tensors_hooks``; when the backward unpacks those four, it
gets them cut down to the live look-ups. The forward is therefore bit for bit stock, live rows are updated bit for
bit as stock (but for a rounding in a mean-pooled bag that is live in part), stale rows and their optimizer state are
untouched, and the backward's sort, gradient reads and row writes shrink with the look-ups.
"""

from torchrec_slipstream.tbe.finding import FoundTbe, TableShard, find_tbes, process_group_of
from torchrec_slipstream.tbe.update_filter import Sampling, UpdateFilter

__all__ = ["FoundTbe", "Sampling", "TableShard", "UpdateFilter", "find_tbes", "process_group_of"]
