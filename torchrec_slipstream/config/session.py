"""One part a room."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from torchrec_slipstream.config.access import AccessConfig
from torchrec_slipstream.config.checks import instance
from torchrec_slipstream.config.inputs import InputsConfig
from torchrec_slipstream.config.placement import PlacementConfig
from torchrec_slipstream.config.staleness import StalenessConfig
from torchrec_slipstream.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SlipstreamConfig:
    """Configuration of a session: one part a room.

    Raises:
        ConfigError: two parts do not go together, or one is of another kind.

    Warns where ``inputs.method="slipstream"`` meets ``staleness.target_share`` above 0. Both may be wanted, but what
    the method then drops says less: a row whose updates are left out does not move, whatever it has still to learn, and
    so looks stale.
    """

    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    """Which updates are left out."""

    access: AccessConfig = field(default_factory=AccessConfig)
    """How look-ups are counted."""

    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Which rows are hot, and when that changes."""

    inputs: InputsConfig = field(default_factory=InputsConfig)
    """Which samples are trained on."""

    def __post_init__(self) -> None:
        for name, kind in (
            ("staleness", StalenessConfig),
            ("access", AccessConfig),
            ("placement", PlacementConfig),
            ("inputs", InputsConfig),
        ):
            instance(name, getattr(self, name), kind)
        if self.placement.replan_every and self.access.counter in ("sketch", "off"):
            raise ConfigError(
                f"replan_every={self.placement.replan_every} needs every row's access count, which "
                f"counter={self.access.counter!r} does not give; use counter='sampled' or 'exact'"
            )
        if self.access.counter in ("sketch", "off") and self.staleness.target_share > 0.0:
            raise ConfigError(
                f"counter={self.access.counter!r} does not count every row's look-ups, by which "
                f"target_share={self.staleness.target_share} chooses the updates to leave out. Use counter='sampled' "
                "or 'exact' (with sketch_tables for those too large), or StalenessConfig(target_share=0)."
            )
        if self.access.counter in ("sketch", "off") and self.inputs.method == "slipstream":
            raise ConfigError(
                f"counter={self.access.counter!r} does not count every row's look-ups, so method='slipstream' would "
                "know no row to be stale and drop nothing. Use counter='sampled' or 'exact' (with sketch_tables for "
                "those too large)"
            )
        if self.inputs.method == "slipstream" and self.staleness.target_share > 0.0:
            warnings.warn(
                f"method='slipstream' drops samples whose rows do not move, and target_share="
                f"{self.staleness.target_share} leaves updates out, which keeps rows from moving: they will look stale "
                "before they are. Give StalenessConfig(target_share=0), unless both are wanted",
                stacklevel=3,
            )
