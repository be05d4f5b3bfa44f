"""Bandwidths of a GPU's memories, measured on one, and the UVM rows that they are measured with."""

from __future__ import annotations

import pytest
import torch

from torchrec_slipstream.placement.calibration import calibrate
from torchrec_slipstream.tbe.uvm import managed_rows

pytestmark = pytest.mark.gpu


def test_managed_rows_are_read_and_written_from_the_gpu_and_lie_in_unified_memory() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    rows = managed_rows(1000, 8, device)
    assert rows.device == device
    assert rows.shape == (1000, 8)
    assert rows.dtype == torch.float32
    assert int(rows.count_nonzero()) == 0
    assert torch.ops.fbgemm.is_uvm_tensor(rows)
    ids = torch.tensor([5, 999], device=device)
    rows.index_copy_(0, ids, torch.ones(2, 8, device=device))
    torch.testing.assert_close(torch.index_select(rows, 0, ids).cpu(), torch.ones(2, 8))
    assert int(rows.count_nonzero()) == 16


def test_a_gpu_has_three_memories() -> None:
    found = calibrate("cuda", seconds=1.5)
    assert found.hbm_mem_bw is not None
    assert found.hbm_to_ddr_mem_bw is not None
    assert found.ddr_mem_bw is not None
    # PCIe 3 x8 to NVLink-C2C; HBM is faster than any of them.
    assert 1e6 < found.hbm_to_ddr_mem_bw < 9e8
    assert found.hbm_mem_bw > 2 * found.hbm_to_ddr_mem_bw
    again = calibrate("cuda", seconds=1.5)
    assert again.hbm_to_ddr_mem_bw is not None
    assert 0.5 < again.hbm_to_ddr_mem_bw / found.hbm_to_ddr_mem_bw < 2
