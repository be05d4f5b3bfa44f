"""How often is each row used? Access counts, what they say of a budget or a batch, and where they come from."""

from torchrec_slipstream.access.calibrator import Calibration, calibrate, least_hot_count
from torchrec_slipstream.access.curves import HitCurve
from torchrec_slipstream.access.drift import Drift, TableDrift
from torchrec_slipstream.access.histogram import CountHistogram
from torchrec_slipstream.access.profile import AccessProfile
from torchrec_slipstream.access.recurrence import Recurrence
from torchrec_slipstream.access.statistics import AccessStatistics, expected_distinct
from torchrec_slipstream.access.table import TableAccess

__all__ = [
    "AccessProfile",
    "AccessStatistics",
    "Calibration",
    "CountHistogram",
    "Drift",
    "HitCurve",
    "Recurrence",
    "TableAccess",
    "TableDrift",
    "calibrate",
    "expected_distinct",
    "least_hot_count",
]
