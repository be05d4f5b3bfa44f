"""The knobs of the inputs: ranges, and what does not go together."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

from torchrec_slipstream import (
    AccessConfig,
    ConfigError,
    FaeInputs,
    InputsConfig,
    SlipstreamConfig,
    SlipstreamInputs,
    StalenessConfig,
)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        (InputsConfig, "method", "some"),
        (InputsConfig, "drop_share", 1.0),
        (InputsConfig, "seed", -1),
        (InputsConfig, "weigh", "yes"),
        (InputsConfig, "min_probability", 0.0),
        (SlipstreamInputs, "hot_bytes", "some"),
        (SlipstreamInputs, "start", -1),
        (SlipstreamInputs, "snapshot_steps", 0),
        (SlipstreamInputs, "snapshot_share", 0),
        (SlipstreamInputs, "snapshot_share", 1.5),
        (SlipstreamInputs, "again", 100),
        (SlipstreamInputs, "sample_share", 0.0),
        (SlipstreamInputs, "search_window", 1.5),
        (SlipstreamInputs, "stale_lookups", 0),
        (SlipstreamInputs, "min_touches", 0),
        (SlipstreamInputs, "max_threshold", 0.0),
        (SlipstreamInputs, "movement", "fast"),
        (FaeInputs, "hot_bytes", "some"),
        (FaeInputs, "window", 0),
        (FaeInputs, "rate", 0.5),
        (FaeInputs, "rate", 101),
        (FaeInputs, "rate", float("nan")),
        (FaeInputs, "patience", 0),
    ],
)
def test_a_value_out_of_range_is_named(part: type, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field}=|'{value}' is not a size"):
        part(**{field: value})


def test_again_is_compared_once_the_steps_are_known() -> None:
    config = SlipstreamInputs(snapshot_share=0.5, again=20)
    with pytest.raises(ConfigError, match="again=20 must be 0, or more than snapshot_steps=30"):
        replace(config, snapshot_share=None, snapshot_steps=30)


@pytest.mark.parametrize("method", ["thinning", "slipstream", "fae"])
def test_only_methods_that_draw_weigh(method: str) -> None:
    with pytest.raises(ConfigError, match=f"weigh=True with method='{method}', which weighs no sample"):
        InputsConfig(method=method, weigh=True)
    InputsConfig(method=method, weigh=False)


def test_rows_that_skipping_keeps_from_moving_look_stale() -> None:
    inputs, skipping = InputsConfig(method="slipstream"), StalenessConfig(target_share=0.3)
    with pytest.warns(UserWarning, match=r"target_share=0.3 leaves updates out.*StalenessConfig\(target_share=0\)"):
        SlipstreamConfig(inputs=inputs, staleness=skipping)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SlipstreamConfig(inputs=inputs, staleness=StalenessConfig(target_share=0))
        SlipstreamConfig(inputs=InputsConfig(method="thinning"), staleness=skipping)


@pytest.mark.parametrize("counter", ["off", "sketch"])
def test_a_method_that_counts_rows_needs_a_counter_of_rows(counter: str) -> None:
    parts: dict[str, Any] = {
        "access": AccessConfig(counter=counter),
        "staleness": StalenessConfig(target_share=0),
    }
    with pytest.raises(ConfigError, match=rf"counter='{counter}'.*method='slipstream' would.*'sampled' or 'exact'"):
        SlipstreamConfig(inputs=InputsConfig(method="slipstream"), **parts)
    SlipstreamConfig(inputs=InputsConfig(method="thinning"), **parts)


def test_only_thinning_weighs_positives() -> None:
    for good in (4, "auto"):
        assert InputsConfig(method="thinning", positive_weight=good).positive_weight == good
    with pytest.raises(ConfigError, match=r"positive_weight=4 is of method='thinning', not of 'random'"):
        InputsConfig(method="random", positive_weight=4)
    for bad in (0.5, float("inf"), True, "4"):
        with pytest.raises(ConfigError, match=r"positive_weight=.* must be a finite number of at least 1"):
            InputsConfig(method="thinning", positive_weight=bad)
