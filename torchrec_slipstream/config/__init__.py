"""Every knob, with its unit, its default and where it comes from. One frozen dataclass a room."""

from torchrec_slipstream.config.access import COUNTERS, AccessConfig
from torchrec_slipstream.config.inputs import INPUT_METHODS, MOVEMENTS, FaeInputs, InputsConfig, SlipstreamInputs
from torchrec_slipstream.config.placement import PlacementConfig
from torchrec_slipstream.config.session import SlipstreamConfig
from torchrec_slipstream.config.staleness import SELECTIONS, SIGNALS, StalenessConfig

__all__ = [
    "COUNTERS",
    "INPUT_METHODS",
    "MOVEMENTS",
    "SELECTIONS",
    "SIGNALS",
    "AccessConfig",
    "FaeInputs",
    "InputsConfig",
    "PlacementConfig",
    "SlipstreamConfig",
    "SlipstreamInputs",
    "StalenessConfig",
]
