"""Memory that a GPU reads and writes over the bus, as FBGEMM allocates it for a table in host memory."""

from __future__ import annotations

import fbgemm_gpu  # noqa: F401  # registers torch.ops.fbgemm
import torch
from torch import Tensor


def managed_rows(rows: int, dim: int, device: torch.device) -> Tensor:
    """float32 zeros ``[rows, dim]`` in unified memory that stays in host memory, as FBGEMM's MANAGED tables do.

    FBGEMM tells the driver that the host is where the pages belong and that ``device`` accesses them in place, so
    rows are not migrated: each look-up crosses the bus.

    Args:
        device: a CUDA device.
    """
    # The prototype gives dtype and device; FBGEMM's own tables are made the same way (uvm_host_mapped=False).
    prototype = torch.zeros(1, dtype=torch.float32, device=device)
    managed: Tensor = torch.ops.fbgemm.new_unified_tensor(prototype, [rows, dim], is_host_mapped=False)
    return managed.zero_()  # touches every page: the first touch would cost more than the bus
