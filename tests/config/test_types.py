"""What is of another type than its field is refused by the field's name, before anything is attached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from torchrec_slipstream import (
    AccessConfig,
    ConfigError,
    InputsConfig,
    PlacementConfig,
    SlipstreamConfig,
    SlipstreamInputs,
    StalenessConfig,
)


@pytest.mark.parametrize(
    ("part", "field", "value", "remedy"),
    [
        (PlacementConfig, "chunk_bytes", None, "None is not a size of memory; give bytes as a whole number"),
        (PlacementConfig, "hbm_budget", True, "True is not a size of memory"),
        (PlacementConfig, "hysteresis", float("nan"), "must be a finite number of at least 1"),
        (PlacementConfig, "move_cost", "2", "must be a finite number of at least 0"),
        (SlipstreamInputs, "max_threshold", "a", "must be a finite number above 0, or None"),
        (SlipstreamInputs, "max_threshold", True, "must be a finite number above 0"),
        (SlipstreamInputs, "max_threshold", float("inf"), "must be a finite number above 0"),
        (SlipstreamInputs, "max_threshold", float("nan"), "must be a finite number above 0"),
        (SlipstreamInputs, "max_threshold", 0.0, "must be a finite number above 0"),
        (SlipstreamInputs, "each_table", "no", "must be True or False"),
        (SlipstreamInputs, "per_table", "no", "must be True or False"),
        (SlipstreamInputs, "sample_share", 0.0, "give more than 0"),
        (SlipstreamInputs, "movement", ["plain"], "must be one of 'plain'"),
        (StalenessConfig, "normalise_tables", "off", "must be True or False"),
        (InputsConfig, "weigh", 1, "must be True or False"),
        (InputsConfig, "fae", 5, r"is no FaeInputs; give fae=FaeInputs\(...\)"),
        (InputsConfig, "slipstream", None, "give slipstream=SlipstreamInputs"),
        (InputsConfig, "positive_weight", None, "must be a finite number of at least 1, or 'auto'"),
        (SlipstreamConfig, "staleness", {"target_share": 0.1}, r"give staleness=StalenessConfig\(...\)"),
        (SlipstreamConfig, "staleness", AccessConfig(), "give staleness=StalenessConfig"),
        (SlipstreamConfig, "access", None, "give access=AccessConfig"),
        (SlipstreamConfig, "placement", StalenessConfig(), "give placement=PlacementConfig"),
        (SlipstreamConfig, "inputs", "thinning", "'thinning' is no InputsConfig; give inputs=InputsConfig"),
    ],
)
def test_a_value_of_another_type_is_named(part: Callable[..., Any], field: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}[=:].*{remedy}"):
        part(**{field: value})


@pytest.mark.parametrize(("part", "field"), [(StalenessConfig, "exclude_tables"), (AccessConfig, "sketch_tables")])
def test_names_of_tables_are_in_one_order_each_once(part: Callable[..., Any], field: str) -> None:
    """The order of a set is another in each process, and a resumed run compares its configuration with the saved."""
    tables = [f"t_{i}" for i in range(20)]
    for given in (set(tables), tables[::-1], [*tables, "t_3"], iter(tables)):
        assert getattr(part(**{field: given}), field) == tuple(sorted(tables))
    for wrong in ((1, 2), None, ("a", None), 7, b"ab"):
        with pytest.raises(ConfigError, match=rf"{field}=.* must be table names; give a tuple of strings"):
            part(**{field: wrong})
    with pytest.raises(ConfigError, match=rf"{field}='t_1' is a string; give a tuple .*: {field}=\('t_1',\)"):
        part(**{field: "t_1"})
