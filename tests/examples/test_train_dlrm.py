"""The main job end to end: one process, two ranks, repeated in one process, and what it says of bad input."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import train_dlrm
from examples.arguments import parse_arguments
from examples.metrics import Evaluation
from examples.runtime import process_group
from examples.show import show
from examples.timing import PARTS, StepClock
from examples.train_dlrm import main, train
from torchrec_slipstream import Report

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--rows-per-table", "200", "--embedding-dim", "8", "--dense-mlp", "16", "--over-mlp", "16"]
CPU = torch.device("cpu")


def run(
    arguments: list[str], *, ranks: int = 0, module: bool = False, script: str = "examples/train_dlrm.py"
) -> subprocess.CompletedProcess[str]:
    """The script in processes of its own; `ranks` through torchrun."""
    command = [sys.executable]
    if ranks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    command += ["-m", "examples.train_dlrm"] if module else [script]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def test_one_process_learns_and_writes_its_results(tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    done = run([*SMALL, "--samples", "30000", "--batch-size", "64", "--json", str(out)])
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["steps"] == 24_000 // 64
    assert result["train_samples"] == 24_000
    assert result["test"]["samples"] == result["test_samples"] == 6000
    assert [point["step"] for point in result["history"]] == [94, 188, 281, 375]
    # Chance is 0.5; the planted model gets 0.8.
    assert 0.68 < result["test"]["auc"] <= result["best_possible"]["auc"] + 0.02
    assert result["test"]["normalized_entropy"] < 0.97
    assert set(result["plan"]) == {f"t_C{i}" for i in range(1, 27)}
    assert {table["kernel"] for table in result["plan"].values()} == {"fused"}
    assert 0 < result["step_ms"]["p20"] <= result["step_ms"]["median"] <= result["step_ms"]["p80"]
    assert "best possible on this data: AUC" in done.stdout
    assert f"{result['test']['auc']:.4f}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["table_wise", "row_wise"])
def test_two_ranks_train_as_well_as_one(tmp_path: Path, sharding: str) -> None:
    # 2401 test samples: the ranks' last batches differ in size.
    arguments = [*SMALL, "--samples", "12003", "--train-share", "0.8", "--evaluations", "1", "--sharding", sharding]
    out = tmp_path / "two.json"
    done = run([*arguments, "--batch-size", "32", "--json", str(out)], ranks=2, module=True)
    assert done.returncode == 0, done.stderr
    two = json.loads(out.read_text())
    assert two["world_size"] == 2
    assert two["test"]["samples"] == two["test_samples"] == 2401
    assert {table["sharding"] for table in two["plan"].values()} == {sharding}
    with process_group(CPU):
        one = train(parse_arguments([*arguments, "--batch-size", "64", "--device", "cpu"]))
    assert two["steps"] == one["steps"], "the global batch is the same"
    assert two["test"]["ctr"] == one["test"]["ctr"], "all test samples, each once"
    # Other initial weights for the rows of the second rank; the same data, order and global batch.
    assert two["test"]["auc"] == pytest.approx(one["test"]["auc"], abs=0.03)
    assert done.stdout.count("test AUC") == 2, "only rank 0 prints: one evaluation and one table"


def quick(*more: str) -> list[str]:
    return [*SMALL, "--samples", "2000", "--batch-size", "50", "--evaluations", "2", "--device", "cpu", *more]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return bool(a["history"] == b["history"])


def test_runs_repeat_bit_for_bit_in_one_process_and_over_groups() -> None:
    args = parse_arguments(quick())
    with process_group(CPU):
        first, second = train(args), train(args)
    with process_group(CPU):
        third = train(args)
        other = train(parse_arguments(quick("--seed", "1")))
    assert same(first, second)
    assert same(first, third)
    assert not same(first, other)


def test_evaluating_in_between_does_not_change_the_training() -> None:
    with process_group(CPU):
        often = train(parse_arguments(quick("--evaluations", "8", "--epochs", "2")))
        once = train(parse_arguments(quick("--evaluations", "1", "--epochs", "2")))
    assert len(often["history"]) == 8
    assert often["test"] == once["test"]


def test_compare_runs_every_mode_and_shows_them_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(quick("--compare", "--json", str(tmp_path / "all.json")))
    runs = json.loads((tmp_path / "all.json").read_text())
    assert list(runs) == ["off", "rows", "everywhere"]
    assert all(run["skip"] == mode for mode, run in runs.items())
    printed = capsys.readouterr().out
    assert show(runs) in printed
    assert "      skip off       skip rows skip everywhere\n" in printed
    assert "look-ups skipped                  none" in printed
    tables = printed.split("skip everywhere:\n")[1].splitlines()
    for i in range(1, 27):
        assert sum(line.split()[0].endswith(f".t_C{i}") for line in tables if line.strip()) == 1
    assert sum(line.startswith("all tables") for line in tables) == 1


def test_skipping_writes_its_report(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    main(quick("--skip", "everywhere", "--warmup-steps", "6", "--interval", "3", "--json", str(out)))
    result = json.loads(out.read_text())
    assert result["skip"] == "everywhere"
    slipstream = result["slipstream"]
    assert slipstream["steps"] == result["steps"] == 32
    assert [d["step"] for d in slipstream["decisions"]] == list(range(6, 33, 3))
    tables = slipstream["tables"].values()
    assert len(tables) == 26
    skipped, lookups = (sum(table[name] for table in tables) for name in ("skipped", "lookups"))
    assert lookups == 32 * 50 * 26, "one look-up a feature and sample; the tests in between count for nothing"
    assert 0 < skipped < lookups
    assert slipstream["skipped_share"] == pytest.approx(skipped / lookups)
    assert 0 < result["tracker_share"] < 1
    assert str(Report.from_dict(slipstream)) in show({"everywhere": result})


@pytest.mark.parametrize("method", ["random", "negatives", "thinning", "slipstream"])
def test_inputs_are_dropped_and_the_rest_is_trained_on(method: str, tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    words = ["--inputs", method, "--drop-share", "0.4", "--skip", "off", "--interval", "8", "--json", str(out)]
    main(quick("--samples", "8000", "--epochs", "2", *words))
    result = json.loads(out.read_text())
    inputs = result["slipstream"]["inputs"]
    assert (result["inputs"], inputs["method"], inputs["epochs"]) == (method, method, 2)
    assert inputs["read"] == 2 * 6400
    if method != "slipstream":  # of whose inputs few have nothing but stale rows
        assert inputs["dropped_share"] == pytest.approx(0.4, abs=0.03)
    assert inputs["used"] == 2 * 6400 - inputs["dropped"]
    # An epoch's rest is a shorter batch.
    assert result["steps"] == pytest.approx(inputs["used"] / 50, abs=1.01)
    assert result["history"][-1] == {"step": result["steps"], "samples_seen": result["steps"] * 50, **result["test"]}
    assert (inputs["logit_shift"] < -0.4) == (method == "thinning")
    assert result["test"]["samples"] == 1600


def test_dropped_negatives_leave_the_predictions_right() -> None:
    """The mean prediction after thinning half of the inputs is the clicks' share, not twice as much."""
    with process_group(CPU):
        arguments = quick("--samples", "20000", "--inputs", "thinning", "--drop-share", "0.5")
        thinned, whole = train(parse_arguments(arguments)), train(parse_arguments(quick("--samples", "20000")))
    assert thinned["steps"] == pytest.approx(0.5 * whole["steps"], rel=0.02)
    # In units of the entropy of the clicks' share; 0.4 too many log-odds would cost 0.03.
    assert thinned["test"]["normalized_entropy"] == pytest.approx(whole["test"]["normalized_entropy"], abs=0.02)


@pytest.mark.slow
def test_two_ranks_drop_inputs_in_lockstep(tmp_path: Path) -> None:
    out = tmp_path / "two.json"
    arguments = [*SMALL, "--samples", "12000", "--batch-size", "32", "--inputs", "thinning", "--skip", "everywhere"]
    done = run([*arguments, "--json", str(out)], ranks=2, module=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    inputs = result["slipstream"]["inputs"]
    assert inputs["read"] == 9600 == inputs["used"] + inputs["dropped"] + inputs["left_over"]
    assert inputs["left_over"] < 2
    assert inputs["dropped_share"] == pytest.approx(0.3, abs=0.03)
    assert result["slipstream"]["skipped_share"] > 0.1
    assert result["test"]["auc"] > 0.6


def test_parts_of_a_step_sum_to_the_whole() -> None:
    with process_group(CPU):
        args = parse_arguments(quick("--skip", "rows", "--warmup-steps", "6", "--interval", "3"))
        kept: list[StepClock] = []
        original = StepClock.milliseconds
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StepClock, "milliseconds", lambda clock: (kept.append(clock), original(clock))[1])
            result = train(args)
    (clock,) = kept
    assert len(clock.steps) == result["steps"]
    assert set(clock._parts) == set(PARTS)
    for step, whole in enumerate(clock.steps):
        parts = [clock._parts[part][step] for part in PARTS]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(whole)
    for part in ("forward", "backward", "optimizer", "session"):
        assert result["step_ms"][part] > 0


@pytest.mark.slow
def test_two_ranks_report_alike(tmp_path: Path) -> None:
    code = (
        "import json, os, sys, torch\n"
        "from examples.arguments import parse_arguments\n"
        "from examples.runtime import process_group\n"
        "from examples.train_dlrm import train\n"
        "with process_group(torch.device('cpu')) as (rank, _):\n"
        "    report = train(parse_arguments(sys.argv[2:]))['slipstream']\n"
        "    open(f'{sys.argv[1]}/{rank}.json', 'w').write(json.dumps(report))\n"
    )
    script = tmp_path / "reports.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}")
    arguments = quick("--skip", "everywhere", "--warmup-steps", "4", "--interval", "2", "--sharding", "row_wise")
    done = run([str(tmp_path), *arguments], ranks=2, script=str(script))
    assert done.returncode == 0, done.stderr
    reports = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    own = ("seconds", "tracker_seconds", "tracker_share")  # every rank has its own clock
    for report in reports:
        for name in own:
            del report[name]
        for decision in report["decisions"]:
            del decision["seconds"]
    assert reports[0] == reports[1]
    assert reports[0]["skipped_share"] > 0


def test_criteo_file_trains(tmp_path: Path) -> None:
    from tests.examples.test_criteo import make_records, tsv_line, write_tsv

    path = write_tsv(tmp_path / "a.tsv.gz", [tsv_line(record) for record in make_records(300)])
    with process_group(CPU):
        result = train(parse_arguments([*SMALL, "--data", str(path), "--batch-size", "30", "--device", "cpu"]))
    assert result["train_samples"] == 240
    assert result["steps"] == 8
    assert result["best_possible"] is None


def test_metrics_against_their_definitions() -> None:
    logits = torch.tensor([-2.0, 0.5, 1.0, -1.0, 3.0])
    labels = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])
    with process_group(CPU):
        evaluation = Evaluation(CPU)
        evaluation.update(logits[:2], labels[:2])
        evaluation.update(logits[2:], labels[2:])
        found = evaluation.compute()
    log_loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    base = torch.nn.functional.binary_cross_entropy(torch.full((5,), 0.4).double(), labels.double())
    assert found["auc"] == pytest.approx(5 / 6)  # of 6 pairs, only (0.5, 1.0) stands wrong
    assert found["log_loss"] == pytest.approx(float(log_loss))
    assert found["normalized_entropy"] == pytest.approx(float(log_loss / base))
    assert found["ctr"] == pytest.approx(0.4)
    assert found["samples"] == 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.tsv"], "nowhere.tsv does not exist; give the path"),
        (["--samples", "20", "--train-share", "1"], "n_train is 20, of 20 samples"),
        (["--samples", "20", "--batch-size", "100"], "16 samples make no batch of 100 on each of 1 ranks"),
    ],
)
def test_bad_data_ends_the_run_with_a_message(arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit, match=f"train_dlrm: .*{said}"):
        main([*arguments, "--device", "cpu"])


def test_bad_file_ends_the_run_with_a_message(tmp_path: Path) -> None:
    path = tmp_path / "short.tsv"
    path.write_text("1\t2\n")
    with pytest.raises(SystemExit, match=r"train_dlrm: .*short.tsv: .*Expected 40 columns, got 2"):
        main(["--data", str(path), "--skip", "rows", "--device", "cpu"])


@pytest.mark.parametrize("mode", [["--skip", "rows"], ["--compare"]])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--skip-share", "1"], r"target_share=1.0 must be a number in \[0.0, 1.0\)"),
        (["--min-probability", "0"], "min_probability=0 would let a kept look-up stand for infinitely many"),
    ],
)
def test_bad_staleness_ends_the_run_before_data_are_loaded(
    mode: list[str], arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_dlrm, "load_data", lambda args: pytest.fail("data were loaded"))
    with pytest.raises(SystemExit, match=f"train_dlrm: {said}"):
        main([*mode, *arguments, "--device", "cpu"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--warmup-steps", "-1"], "--warmup-steps: is -1; give 0 or more"),
        (["--interval", "0"], "--interval: is 0; give 1 or more"),
        (["--thaw-every", "1"], "--thaw-every: is 1; give 2 or more"),
        (["--batch-size", "0"], "--batch-size: is 0; give 1 or more"),
        (["--train-share", "1.5"], "--train-share: is 1.5; give a number from 0 to 1"),
        (["--embedding-dim", "6"], "--embedding-dim: is 6; give a multiple of 4"),
        (["--learning-rate", "nan"], "--learning-rate: is nan; give a number above 0"),
        (["--dense-mlp", "8,0"], "--dense-mlp: is 8,0; give widths of 1 or more"),
        (["--skip", "nothing"], "invalid choice: 'nothing'"),
        (["--inputs", "fae"], "invalid choice: 'fae'"),  # which needs to know what is hot
    ],
)
def test_bad_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert said in capsys.readouterr().err
