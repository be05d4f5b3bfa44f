"""Which samples still teach? Input batches are read, the samples that a method keeps are dealt into full batches."""

from torchrec_slipstream.inputs.batches import WeightedBatch
from torchrec_slipstream.inputs.choice import Choice, OneLane, Scheduler, Selector
from torchrec_slipstream.inputs.hot import hot_of_calibration, hot_of_overlays, hot_of_placement, hot_of_profile
from torchrec_slipstream.inputs.hotline import Hotline
from torchrec_slipstream.inputs.live import LiveInputs
from torchrec_slipstream.inputs.rows import RowSets
from torchrec_slipstream.inputs.stream import InputStream

__all__ = [
    "Choice",
    "Hotline",
    "InputStream",
    "LiveInputs",
    "OneLane",
    "RowSets",
    "Scheduler",
    "Selector",
    "WeightedBatch",
    "hot_of_calibration",
    "hot_of_overlays",
    "hot_of_placement",
    "hot_of_profile",
]
