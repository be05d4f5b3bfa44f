"""The picture: its lines are the profile's, its dots the plan's, and it leaves matplotlib as it was."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from hypothesis import given
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import Topology

from torchrec_slipstream.access import AccessProfile, TableAccess
from torchrec_slipstream.errors import PlanError
from torchrec_slipstream.placement import Placement, SlipstreamPlanner
from torchrec_slipstream.placement.picture import MAX_LABELLED, curve, draw, figure_of


def zipf_profile(tables: int = 3, rows: int = 5000) -> AccessProfile:
    """Tables t_0, t_1, ... of ever more look-ups, most of them on few rows."""
    random = np.random.default_rng(0)
    made = []
    for i in range(tables):
        counts = (1e5 * (i + 1) / np.arange(1, rows + 1) ** 1.1 / 10).astype(np.int32)
        made.append(TableAccess(f"t_{i}", rows, 16, random.permutation(counts), optimizer_bytes=4))
    return AccessProfile(made, samples=100_000)


def plan(profile: AccessProfile, budget: str) -> Placement:
    tables = [
        EmbeddingBagConfig(
            name=one.name, num_embeddings=one.rows, embedding_dim=one.embedding_dim, feature_names=[f"f_{one.name}"]
        )
        for one in profile.tables.values()
    ]
    planner = SlipstreamPlanner(
        profile=profile, topology=Topology(world_size=1, compute_device="cuda"), hbm_budget=budget, debug=False
    )
    optimizer = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD}
    model = EmbeddingBagCollection(tables=tables, device=torch.device("meta"))
    planner.plan(model, [EmbeddingBagCollectionSharder(fused_params=optimizer)])
    assert planner.placement is not None
    return planner.placement


def lines(figure: Any) -> dict[str, Any]:
    """Labelled lines, by the name before the share of look-ups."""
    return {
        line.get_label().split(" (")[0]: line
        for line in figure.axes[0].get_lines()
        if not line.get_label().startswith("_")
    }


def dots(figure: Any) -> list[tuple[float, float]]:
    return [tuple(map(float, dot.get_offsets()[0])) for dot in figure.axes[0].collections]


@given(counts=st.lists(st.integers(0, 20), min_size=1, max_size=60).filter(any))
def test_a_curve_is_the_tables_hit_rate(counts: list[int]) -> None:
    table = TableAccess("t", len(counts), 4, np.array(counts, np.int32), optimizer_bytes=4)
    size, rate = curve(table)
    assert (np.diff(size) > 0).all()
    for one_size, one_rate in zip(size.tolist(), rate.tolist(), strict=True):
        assert one_size % table.row_bytes == 0
        assert one_rate == pytest.approx(table.hit_rate(one_size // table.row_bytes))
    assert size[-1] == table.row_bytes * sum(count > 0 for count in counts)
    assert rate[-1] == pytest.approx(1.0)


def test_a_curve_of_many_different_counts_stays_small() -> None:
    table = TableAccess("t", 100_000, 4, np.random.default_rng(0).permutation(100_000).astype(np.int32))
    size, rate = curve(table)
    assert len(size) < 2000
    assert size[-1] == 99_999 * table.row_bytes, "the row of count 0 is no part of it"
    for i in (0, len(size) // 2, -1):
        assert rate[i] == pytest.approx(table.hit_rate(int(size[i]) // table.row_bytes))


def test_lines_and_dots_say_what_was_measured_and_chosen() -> None:
    profile = zipf_profile()
    placement = plan(profile, "300KiB")
    figure = figure_of(profile, placement)
    drawn = lines(figure)
    assert list(drawn) == ["t_2", "t_1", "t_0", "all tables"], "the most looked-up first"
    assert drawn["t_2"].get_label() == "t_2 (50%)"
    for name in profile.tables:
        size, rate = curve(profile[name])
        np.testing.assert_array_equal(drawn[name].get_xdata(), size)
        np.testing.assert_array_equal(drawn[name].get_ydata(), rate)
    some = drawn["all tables"]
    for size, rate in zip(some.get_xdata()[::40], some.get_ydata()[::40], strict=True):
        assert rate == pytest.approx(profile.hit_rate(int(size)))

    *tables, total = dots(figure)
    by_name = {one.name: one for one in placement.tables.values()}
    row_bytes = 16 * 4 + 4
    assert tables == [
        (by_name[name].hot_rows * row_bytes, pytest.approx(by_name[name].hit_rate)) for name in ("t_2", "t_1", "t_0")
    ]
    for name, (size, rate) in zip(("t_2", "t_1", "t_0"), tables, strict=True):
        assert rate == pytest.approx(np.interp(size, *curve(profile[name])), abs=1e-3), "dots lie on their lines"
    assert total == (sum(size for size, _ in tables), pytest.approx(placement.hit_rate))
    assert 0 < total[0] <= 300 * 1024
    title = figure.axes[0].get_title(loc="left")
    assert title.startswith(f"The plan: {placement.hit_rate:.1%} of look-ups to come hit")


def test_without_a_plan_there_are_no_dots() -> None:
    figure = figure_of(zipf_profile(), None)
    assert dots(figure) == []
    assert "plan" not in figure.axes[0].get_title(loc="left")


def test_a_plan_without_hot_rows_has_no_dots() -> None:
    profile = zipf_profile()
    figure = figure_of(profile, plan(profile, "0"))
    assert dots(figure) == []
    assert figure.axes[0].get_title(loc="left") == "The plan: no row is hot"


def test_many_tables_are_told_apart_as_far_as_colours_go() -> None:
    figure = figure_of(zipf_profile(MAX_LABELLED + 4, rows=50), None)
    drawn = lines(figure)
    assert len(drawn) == MAX_LABELLED + 2, "labelled ones, all tables, and how many more"
    assert "4 more tables" in drawn
    looks = {(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in drawn.values()}
    assert len(looks) == len(drawn)
    unnamed = [line for line in figure.axes[0].get_lines() if line.get_label().startswith("_")]
    assert len(unnamed) == 4
    assert {line.get_color() for line in unnamed} == {"0.78"}


def test_axis_names_a_handful_of_sizes() -> None:
    axes = figure_of(zipf_profile(), None).axes[0]
    named = [label.get_text() for label in axes.get_xticklabels()]
    axes.figure.canvas.draw()
    named = [label.get_text() for label in axes.get_xticklabels()]
    assert 3 <= len(named) <= 11
    assert all(text.split()[1] in ("B", "KiB", "MiB") for text in named)


def test_png_is_written_and_shows_the_lines(tmp_path: Path) -> None:
    from matplotlib.image import imread

    draw(zipf_profile(), None, tmp_path / "a.png")
    pixels = imread(str(tmp_path / "a.png"))
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1200
    colours = {tuple(colour) for colour in (pixels[..., :3] * 255).round().astype(int).reshape(-1, 3)[::7].tolist()}
    for hexadecimal in ("0072B2", "D55E00", "009E73", "000000", "FFFFFF"):
        assert tuple(bytes.fromhex(hexadecimal)) in colours


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    before, loaded = matplotlib.rcParams.copy(), set(sys.modules)
    draw(zipf_profile(), None, tmp_path / "a.png")
    assert "matplotlib.pyplot" not in set(sys.modules) - loaded, "pyplot would choose a backend for the whole process"
    assert dict.__eq__(before, matplotlib.rcParams)


def test_what_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    profile = zipf_profile()
    with pytest.raises(PlanError, match=r"'plan.jpg' would be a PNG; give it a name that ends in .png"):
        draw(profile, None, "plan.jpg")
    with pytest.raises(PlanError, match=r"a.png' cannot be written \(No such file or directory\); give another path"):
        draw(profile, None, tmp_path / "nowhere" / "a.png")
    silent = AccessProfile([TableAccess("t", 4, 4, np.zeros(4, np.int32))], samples=1)
    with pytest.raises(PlanError, match="no look-ups to draw; measure some batches"):
        draw(silent, None, tmp_path / "a.png")
    placement = plan(profile, "100KiB")
    with pytest.raises(PlanError, match="table 't_2' has 5000 rows in the plan and 50 in the profile"):
        draw(zipf_profile(rows=50), placement, tmp_path / "a.png")
    other = AccessProfile([TableAccess("other", 4, 4, np.ones(4, np.int32))], samples=1)
    with pytest.raises(PlanError, match="the plan has none of the profile's tables"):
        draw(other, placement, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
