"""Where should each row live? Rows by access count a byte, to a budget of HBM, in a stock TorchRec sharding plan."""

from torchrec_slipstream.placement.allocation import TableDemand, TableShare, allocate, hot_rows_of
from torchrec_slipstream.placement.placement import Placement, ShardPlacement, TablePlacement
from torchrec_slipstream.placement.planner import SlipstreamPlanner
from torchrec_slipstream.placement.stats import SlipstreamStats

__all__ = [
    "Placement",
    "ShardPlacement",
    "SlipstreamPlanner",
    "SlipstreamStats",
    "TableDemand",
    "TablePlacement",
    "TableShare",
    "allocate",
    "hot_rows_of",
]
