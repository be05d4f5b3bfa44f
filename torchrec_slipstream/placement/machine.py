"""The devices that a plan is for: those of this machine and process group."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torchrec.distributed.planner.types import Topology

from torchrec_slipstream.errors import PlanError


def this_topology() -> Topology:
    """The topology of the default process group (or of this process alone), with the memory that this machine has.

    TorchRec's default assumes 32 GiB of HBM and 128 GiB of host memory a device.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    host = _host_memory() // here
    if torch.cuda.is_available():
        hbm = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return Topology(world_size=ranks, local_world_size=here, compute_device="cuda", hbm_cap=hbm, ddr_cap=host)
    return Topology(world_size=ranks, local_world_size=here, compute_device="cpu", ddr_cap=host)


def check_size(topology: Topology, ranks: int) -> None:
    """Of a process group that is to shard by a plan for the topology.

    Raises:
        PlanError: it has another number of ranks than the topology devices.
    """
    if topology.world_size != ranks:
        raise PlanError(
            f"the planner's topology has {topology.world_size} device(s), and the process group {ranks} rank(s): the "
            "plan would not be for them. Make the planner after torch.distributed.init_process_group(), or give it "
            f"topology=Topology(world_size={ranks}, ...), or as pg= the group that tables are sharded over; to plan "
            "for devices that are not running, call plan()"
        )


def _host_memory() -> int:
    """Bytes that this machine has, or this container may use."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    return memory
