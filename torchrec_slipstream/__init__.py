"""torchrec_slipstream: leave out the embedding updates that have stopped mattering, in a stock TorchRec model.

A *stale* row here is a **trained** row whose updates have next to nothing left to gain. (Elsewhere "stale" often means
untouched for long; ours is the opposite: a row must have been touched to be stale.)
"""

from torchrec_slipstream.config import SlipstreamConfig, StalenessConfig
from torchrec_slipstream.errors import AttachError, ConfigError, LookupRangeError, SlipstreamError, StateError
from torchrec_slipstream.report.report import Report, TableReport
from torchrec_slipstream.session import Slipstream

__all__ = [
    "AttachError",
    "ConfigError",
    "LookupRangeError",
    "Report",
    "Slipstream",
    "SlipstreamConfig",
    "SlipstreamError",
    "StalenessConfig",
    "StateError",
    "TableReport",
]
