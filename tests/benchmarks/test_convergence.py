"""The convergence benchmark, tiny, and its controls."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import convergence
from benchmarks.controls import PROVIDERS, RandomLookups, attach_provider
from tests.tables import make_lookups, make_tbe, table_states
from torchrec_slipstream import AccessConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.tbe.update_filter import ALWAYS_LIVE

TINY = ["--samples", "4000", "--rows-per-table", "100", "--batch-size", "50", "--embedding-dim", "8", "--interval", "8"]
KEYS = {"auc_delta", "auc_delta_sd", "logloss_delta", "logloss_delta_sd", "measured_share", "tracker_share"}
# Every step is counted: from a sample of the steps, a row can be taken for trained that is not.
STALENESS = StalenessConfig(
    where="everywhere", target_share=0.4, warmup_steps=5, interval=4, min_touches=3, max_table_share=1.0
)
CONFIG = SlipstreamConfig(staleness=STALENESS, access=AccessConfig(counter="exact"))


def test_it_ends_with_one_json_line_and_appends_to_the_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "all.csv"
    convergence.main([*TINY, "--seeds", "2", "--first-seed", "3", "--share", "0.4", "--json", "--csv", str(path)])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(printed[-1])
    assert result["seeds"] == 2
    assert list(result["share"]) == ["0.4"]
    assert set(result["share"]["0.4"]) == set(PROVIDERS)
    for one in result["share"]["0.4"].values():
        assert set(one) == KEYS
        assert abs(one["auc_delta"]) < 0.2
        assert one["auc_delta_sd"] > 0, "two seeds do not move alike"
        assert one["measured_share"] == pytest.approx(0.4, abs=0.15)
    rows = list(csv.DictReader(path.open(newline="")))
    assert [row["provider"] for row in rows] == list(PROVIDERS)
    parameters = json.loads(rows[0]["parameters"])
    assert (parameters["share"], parameters["first_seed"], parameters["rows_per_table"]) == (0.4, 3, 100)
    runs = json.loads(rows[0]["quality"])["runs"]
    assert [run["seed"] for run in runs] == [3, 4]
    assert runs[0]["auc_delta"] == pytest.approx(runs[0]["auc"] - runs[0]["auc_none"])


def test_nothing_left_out_is_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    result = convergence.main([*TINY, "--seeds", "1", "--share", "0", "--no-record", "--providers", *PROVIDERS])
    for one in result["share"]["0"].values():
        assert one["auc_delta"] == one["logloss_delta"] == one["measured_share"] == 0.0


def test_the_jobs_own_checks_are_made(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convergence.main([*TINY, "--embedding-dim", "6", "--no-record"])
    assert "give a multiple of 4" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"nowhere\.tsv does not exist"):
        convergence.main(["--data", "nowhere.tsv", "--no-record"])
    with pytest.raises(SystemExit):
        convergence.main(["--seeds", "0", "--no-record"])


def test_random_lookups_are_left_out_at_their_share_and_blindly() -> None:
    tbe = make_tbe(rows=(40,), dims=(8,))
    session = RandomLookups(nn.ModuleList([tbe]), STALENESS, seed=0)
    (one,) = session.filters
    chosen: list[Tensor] = []
    choose = one.choose_live
    one.choose_live = lambda rows: chosen.append(choose(rows)) or chosen[-1]  # type: ignore[method-assign]
    for step in range(40):
        batch = make_lookups((40,), (256,), seed=step)
        batch.run(tbe).sum().backward()
        assert (int(one.skipped.sum()) > 0) == (step >= 8), "from the first decision after the warm-up on"
        session.step()
    assert len(chosen) == 32
    live = torch.cat(chosen)
    # About 16,000 draws: three standard deviations are 0.012.
    assert 1 - float(live.float().mean()) == pytest.approx(0.4, abs=0.012)
    by_step = torch.stack([part[:256].float() for part in chosen])
    assert float(by_step.mean(dim=0).min()) > 0.2, "no place in the batch is spared or struck every time"
    assert session.report().measured_share == pytest.approx(1 - float(live.float().mean()))
    # Drawn by the seed alone.
    again = RandomLookups(nn.ModuleList([make_tbe(rows=(40,), dims=(8,))]), STALENESS, seed=0).filters[0]
    other = RandomLookups(nn.ModuleList([make_tbe(rows=(40,), dims=(8,))]), STALENESS, seed=1).filters[0]
    rows = torch.zeros(chosen[0].numel(), dtype=torch.int64)
    assert torch.equal(again.choose_live(rows), chosen[0])
    assert not torch.equal(other.choose_live(rows), chosen[0])


def random_rows_run(seed: int) -> tuple[list[Tensor], float]:
    """The stale rows (bool ``[200]``) of each decision of a short run, checked against what was trained and moved."""
    tbe = make_tbe(rows=(200,), dims=(8,))
    session = attach_provider("random_rows", nn.ModuleList([tbe]), CONFIG, seed=seed)
    assert isinstance(session, Slipstream)
    (one,) = session._filters
    touches = torch.zeros(200, dtype=torch.int64)
    decisions: list[Tensor] = []
    for step in range(40):
        batch = make_lookups((40 if step % 4 else 200,), (32,), seed=step)
        touches += torch.bincount(batch.indices, minlength=200)
        before = table_states(tbe)[0]
        stale = one.patterns != ALWAYS_LIVE
        batch.run(tbe).sum().backward()
        moved = (table_states(tbe)[0][0] != before[0]).any(dim=1)
        assert not bool((moved & stale).any())
        session.step()
        if (step + 1) % 4 == 0 and step >= 5:
            stale = one.patterns != ALWAYS_LIVE
            assert int(stale.sum()) > 3
            assert int(touches[stale].min()) >= STALENESS.min_touches, "a row that has not trained"
            decisions.append(stale)
    return decisions, session.report().measured_share


def test_random_rows_are_trained_rows_and_new_ones_at_every_decision() -> None:
    decisions, share = random_rows_run(seed=0)
    changed = [float((a ^ b).sum() / (a | b).sum()) for a, b in pairwise(decisions)]
    assert min(changed) > 0.3, changed
    assert share == pytest.approx(0.4, abs=0.08)
    # Nothing but the seed tells which.
    again, other = random_rows_run(seed=0)[0], random_rows_run(seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(decisions, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(decisions, other, strict=True))


def test_providers_differ_in_their_choice_alone() -> None:
    for provider in PROVIDERS:
        session = attach_provider(provider, nn.ModuleList([make_tbe()]), CONFIG, seed=0)
        report = session.report()
        assert report.target_share == STALENESS.target_share
    with pytest.raises(ValueError, match="provider is 'luck'; give one of ours, ours_tail, random_rows"):
        attach_provider("luck", nn.ModuleList([make_tbe()]), CONFIG, seed=0)
