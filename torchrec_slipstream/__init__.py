"""torchrec_slipstream: measured traffic decides which embedding rows get fast memory, and which updates are left out.

A *hot* row is one of those given fast memory. A *stale* row is a **trained** row whose updates have next to nothing
left to gain. (Elsewhere "stale" often means untouched for long; ours is the opposite: a row must have been touched.)

:class:`Slipstream` attaches to a model; its ``detach()`` makes the model stock again, and so does :func:`detach` where
nobody has the session any more.
"""

from torchrec_slipstream.installed import versions_note

try:
    from torchrec_slipstream.access import AccessProfile, TableAccess
    from torchrec_slipstream.config import (
        AccessConfig,
        FaeInputs,
        InputsConfig,
        PlacementConfig,
        SlipstreamConfig,
        SlipstreamInputs,
        StalenessConfig,
    )
    from torchrec_slipstream.errors import (
        AttachError,
        ConfigError,
        InputError,
        LookupRangeError,
        PlanError,
        ProfileError,
        SlipstreamError,
        StateError,
    )
    from torchrec_slipstream.inputs import WeightedBatch
    from torchrec_slipstream.placement import Placement, SlipstreamPlanner, SlipstreamStats
    from torchrec_slipstream.report.inputs import InputReport
    from torchrec_slipstream.report.placement import PlacementReport
    from torchrec_slipstream.report.report import Report, TableReport
    from torchrec_slipstream.session import Slipstream
    from torchrec_slipstream.tbe.class_swap import detach
except Exception as error:
    # Most likely a name that this FBGEMM or TorchRec has elsewhere, or libraries that do not load together.
    error.add_note(versions_note())
    raise

__all__ = [
    "AccessConfig",
    "AccessProfile",
    "AttachError",
    "ConfigError",
    "FaeInputs",
    "InputError",
    "InputReport",
    "InputsConfig",
    "LookupRangeError",
    "Placement",
    "PlacementConfig",
    "PlacementReport",
    "PlanError",
    "ProfileError",
    "Report",
    "Slipstream",
    "SlipstreamConfig",
    "SlipstreamError",
    "SlipstreamInputs",
    "SlipstreamPlanner",
    "SlipstreamStats",
    "StalenessConfig",
    "StateError",
    "TableAccess",
    "TableReport",
    "WeightedBatch",
    "detach",
]
