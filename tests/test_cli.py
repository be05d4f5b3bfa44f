"""The command line: what it prints and writes, and one line for everything that is wrong with what it was given."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_slipstream import AccessProfile, Placement, TableAccess
from torchrec_slipstream.cli import main
from torchrec_slipstream.placement.calibration import Bandwidths
from torchrec_slipstream.report.page import page
from torchrec_slipstream.report.record import RunRecord, load

ROOT = Path(__file__).resolve().parents[1]


def log(folder: Path, samples: int = 2000) -> Path:
    """A click log: two id columns, one of lists of ids, and two that are none."""
    random = np.random.default_rng(0)
    user = (900 * random.random(samples) ** 6).astype(np.int64)
    item = (5000 * random.random(samples) ** 6).astype(np.int64)
    table = pa.table(
        {
            "user": user,
            "item": pa.array([None if i % 10 == 0 else int(one) for i, one in enumerate(item)], pa.int64()),
            "seen": pa.array([item[i : i + 3].tolist() for i in range(samples)], pa.list_(pa.int64())),
            "price": random.random(samples),
            "name": ["x"] * samples,
        }
    )
    path = folder / "log.parquet"
    pq.write_table(table, path)
    return path


def profile(folder: Path, *more: str) -> Path:
    """The log's profile by the command line."""
    out = folder / "profile.npz"
    arguments = [
        "profile",
        str(log(folder)),
        "--columns",
        "user,item",
        "--rows",
        "5000",
        "--dim",
        "16",
        "--out",
        str(out),
    ]
    assert main([*arguments, *more]) == 0
    return out


@pytest.fixture
def saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    out = profile(tmp_path)
    capsys.readouterr()
    return out


# ------------------------------------------------------------------------------------------------------------ profile


def test_profile_is_the_librarys_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = AccessProfile.load(profile(tmp_path))
    expected = AccessProfile.from_parquet(tmp_path / "log.parquet", ["user", "item"], embedding_dim=16, rows=5000)
    assert found == expected
    assert str(found) in capsys.readouterr().out


def test_every_option_of_profile_arrives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--hash modulo --null-row 0 --samples 1000 --element-size 2 --optimizer adam --table-names t_{} --rows 1,000 "
        f"--columns u*,*em --picture {tmp_path / 'profile.png'} --json"
    )
    found = AccessProfile.load(profile(tmp_path, *options.split()))
    expected = AccessProfile.from_parquet(
        tmp_path / "log.parquet",
        {"user": "t_user", "item": "t_item"},
        embedding_dim=16,
        rows=1000,
        hashing="modulo",
        limit=1000,
        null_row=0,
        element_size=2,
        optimizer="adam",
    )
    assert found == expected
    assert found["t_user"].row_bytes == 16 * 2 + 16 * 8
    shown = json.loads(capsys.readouterr().out)
    assert shown["samples"] == 1000
    assert shown["hit_rate"]["0.05"] == found.hit_rate(0.05)
    item = shown["tables"]["t_item"]
    assert item["used_rows"] == np.count_nonzero(found["t_item"].counts)
    assert item["cacheability"] == found["t_item"].cacheability
    assert item["hit_rate"]["0.1"] == found["t_item"].hit_rate(100)
    assert (tmp_path / "profile.png").stat().st_size > 10_000


def test_without_columns_all_of_integers_are_counted(tmp_path: Path) -> None:
    out = tmp_path / "all.npz"
    assert main(["profile", str(log(tmp_path)), "--out", str(out)]) == 0
    assert set(AccessProfile.load(out).tables) == {"user", "item", "seen"}


def test_raw_ids_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"raw": [3, 7, 1 << 40], "small": [0, 1, 2]}), tmp_path / "raw.parquet")
    arguments = ["profile", str(tmp_path / "raw.parquet"), "--out", str(tmp_path / "raw.npz")]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "column raw (of 1 such) has ids up to 1,099,511,627,776, hence as many rows" in said
    assert "give --rows N --hash modulo" in said
    assert main([*arguments, "--rows", "100", "--hash", "modulo"]) == 0
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------------------- plan


def test_plan_keeps_to_its_budget_and_is_shown(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = saved.parent / "placement.npz", saved.parent / "plan.png"
    rest = ["--hbm-budget", "60KiB", "--devices", "2", "--out", str(out), "--picture", str(picture)]
    assert main(["plan", "--profile", str(saved), *rest]) == 0
    printed = capsys.readouterr().out
    made = Placement.load(out)
    assert str(made) in printed
    assert made.hbm_budget == 60 * 1024
    assert {table.name for table in made.tables.values()} == {"user", "item"}
    assert all(made.placed_on(rank) <= 60 * 1024 for rank in range(2))
    assert 0.5 < made.hit_rate < 1
    assert picture.stat().st_size > 10_000


def test_plan_as_json_says_what_the_placement_says(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = saved.parent / "placement.npz"
    assert main(["plan", "--profile", str(saved), "--hbm-budget", "60KiB", "--out", str(out), "--json"]) == 0
    shown, made = json.loads(capsys.readouterr().out), Placement.load(out)
    assert shown["hit_rate"] == pytest.approx(made.hit_rate)
    assert shown["expected_ms"] == pytest.approx(made.expected_ms)
    assert shown["hbm_bytes"] == list(made.hbm_bytes)
    for fqn, table in made.tables.items():
        assert fqn == f"tables.{table.name}"
        assert shown["tables"][table.name]["hot_rows"] == table.hot_rows
        assert shown["tables"][table.name]["kernel"] == table.kernel
        assert shown["tables"][table.name]["ranks"] == [0]


def planned(saved: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["plan", "--profile", str(saved), "--json", *options]) == 0
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


def test_options_of_plan_arrive(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_hosts = planned(saved, capsys, "--devices", "4", "--per-host", "2", "--sharding", "row_wise")
    assert all(table["sharding_type"] == "row_wise" for table in two_hosts["tables"].values())
    assert all(table["ranks"] == [0, 1, 2, 3] for table in two_hosts["tables"].values())
    in_one = planned(saved, capsys, "--devices", "4", "--per-host", "2", "--sharding", "table_row_wise")
    assert all(table["ranks"] in ([0, 1], [2, 3]) for table in in_one["tables"].values()), "on the devices of a host"
    share = planned(saved, capsys, "--hbm", "10MiB", "--hbm-budget", "1%")
    assert share["hbm_budget"] == 10 * 2**20 // 100
    small, large = (planned(saved, capsys, "--batch-size", size)["expected_ms"] for size in ("64", "65536"))
    assert large > 10 * small
    plain, heavy = (planned(saved, capsys, "--optimizer", name) for name in ("rowwise_adagrad", "adam"))
    assert plain == planned(saved, capsys), "the profile's own optimizer is the default"
    assert heavy["hbm_bytes"][0] > plain["hbm_bytes"][0]


def test_on_a_cpu_nothing_is_hot(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = planned(saved, capsys, "--device", "cpu")
    assert shown["hbm_bytes"] == [0]
    assert all(table["hot_rows"] == 0 for table in shown["tables"].values())


def test_measured_bandwidths_change_the_forecast(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for name, bus in (("slow", 1e4), ("fast", 1e8)):
        path = saved.parent / f"{name}.json"
        Bandwidths(hbm_to_ddr_mem_bw=bus, row_bytes=64, threads=1, machine="a test").save(path)
        options = ("--hbm-budget", "20KiB", "--bandwidths", str(path))
        times.append(planned(saved, capsys, *options)["expected_ms"])
    assert times[0] > 10 * times[1]


def test_calibrate_measures_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bw.json"
    arguments = ["plan", "--calibrate", "--device", "cpu", "--seconds", "0.05", "--row-bytes", "64", "--out", str(out)]
    assert main(arguments) == 0
    found = Bandwidths.load(out)
    assert found.row_bytes == 64
    assert found.ddr_mem_bw is not None
    assert str(found) in capsys.readouterr().out


def test_logging_is_left_as_it_was(saved: Path) -> None:
    logger = logging.getLogger("torchrec")
    logger.setLevel(logging.DEBUG)
    try:
        main(["plan", "--profile", str(saved)])
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(logging.NOTSET)


# ------------------------------------------------------------------------------------------------------------- report


def test_report_makes_a_page_beside_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RUN.save(tmp_path / "run.json")
    assert main(["report", str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run.html'}: a run\n"
    assert (tmp_path / "run.html").read_text(encoding="utf-8") == page(load(tmp_path / "run.json"))


def test_report_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RUN.save(tmp_path / "one.json")
    (tmp_path / "two.json").write_text(json.dumps({"off": RUN.to_dict(), "rows": {**RUN.to_dict(), "name": "other"}}))
    out = tmp_path / "both.html"
    assert main(["report", str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: one: a run, two: a run, other\n"
    text = out.read_text(encoding="utf-8")
    assert all(f"{name}, step 2: 0.75" in text for name in ("one: a run", "two: a run", "other"))


# ------------------------------------------------------------------------------------------------------- what is wrong


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line on stderr of a command that ends with status 2."""
    try:
        status: Any = main(arguments)
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out == ""
    assert printed.err.endswith("\n")
    return printed.err.rstrip("\n")


RUN = RunRecord(report=None, name="a run", history=[{"step": 1, "auc": 0.625}, {"step": 2, "auc": 0.75}])
FILES = {
    "TEXT": "hello\n",
    "OTHER": "{}",
    "RUN.html": json.dumps(RUN.to_dict()),
    "NEWER": json.dumps(RUN.to_dict() | {"version": 99}),
}


NO_LOOKUPS = AccessProfile([TableAccess("t", 10, 16, np.zeros(10, np.int32), optimizer_bytes=4)], samples=0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "",
            r"^slipstream: the following arguments are required: profile \| plan \| report \(see slipstream --help\)$",
        ),
        ("frobnicate", "^slipstream: .*invalid choice: 'frobnicate'"),
        ("profile", "^slipstream profile: the following arguments are required: DATA, --out"),
        (
            "profile nowhere.parquet --out P.npz",
            "^slipstream profile: nowhere.parquet does not exist; give a parquet file$",
        ),
        ("profile . --out P.npz", r"\. is no file; give a parquet file$"),
        ("profile TEXT --out P.npz", "cannot be read as parquet .* give a whole parquet file$"),
        ("profile TEXT --columns a --out P.npz", "cannot be read as parquet .* give a whole parquet file$"),
        ("profile LOG --out P.txt", r"--out .*P.txt must end in .npz$"),
        ("profile LOG --out nowhere/P.npz", "there is no directory .*nowhere; make it first$"),
        ("profile LOG --out P.npz --picture p.jpg", "--picture .*p.jpg must end in .png$"),
        (
            "profile LOG --out P.npz --columns user,zip*",
            r"has no column 'zip\*'; it has user, item, seen, price, name$",
        ),
        ("profile LOG --out P.npz --columns=", "--columns: '' has an empty name; give names, or leave it out for all"),
        ("profile LOG --out P.npz --columns user,,item", "--columns: 'user,,item' has an empty name"),
        ("profile EMPTY --out P.npz", r"empty.parquet has no look-up in column\(s\) user \(in 0 of its 0 samples\)"),
        ("plan --profile NOTHING", "nothing.npz has no look-ups to plan by; profile data that has some$"),
        ("profile LOG --out P.npz --columns price", "column 'price' is double; give integers or lists of integers$"),
        ("profile LOG --out P.npz --rows 10 --columns user", "user"),
        ("profile LOG --out P.npz --hash modulo --columns user", "hashed by 'modulo', which needs rows="),
        ("profile LOG --out P.npz --dim 0", "--dim: '0' is not a whole number of at least 1"),
        ("profile LOG --out P.npz --samples x", "--samples: 'x' is not a whole number of at least 1"),
        ("profile LOG --out P.npz --optimizer magic", "--optimizer: invalid choice: 'magic'"),
        ("profile LOG --out P.npz --table-names t_{}", "--table-names needs --columns"),
        ("profile LOG --out P.npz --table-names t --columns user", "'t' names all tables alike; put {} where"),
        ("plan", "^slipstream plan: --profile is missing; give a profile of `slipstream profile`, or --calibrate$"),
        ("plan --profile nowhere.npz", "nowhere.npz does not exist; give a profile of `slipstream profile`$"),
        ("plan --profile TEXT", "TEXT"),
        ("plan --profile PROFILE --hbm-budget lots", "--hbm-budget: 'lots' is not a size of memory; give bytes"),
        ("plan --profile PROFILE --hbm-budget 120%", "'120%' is not a share of the HBM; give 0% to 100%, or a size"),
        (
            "plan --profile PROFILE --devices 6 --per-host 4",
            "--devices 6 is no multiple of --per-host 4; give whole hosts$",
        ),
        ("plan --profile PROFILE --sharding sideways", "'sideways' is not one of table_wise, row_wise"),
        ("plan --profile PROFILE --bandwidths TEXT", "TEXT is not a file of bandwidths .*; measure anew"),
        ("plan --profile PROFILE --out p.json", "--out .*p.json must end in .npz$"),
        ("plan --profile PROFILE --batch-size 0", "--batch-size: '0' is not a whole number of at least 1"),
        ("report", "^slipstream report: the following arguments are required: RUN"),
        (
            "report nowhere.json",
            "^slipstream report: nowhere.json does not exist; give a run's record: what Report.save",
        ),
        ("report .", r"\. is no file; give a run's record"),
        ("report TEXT", r"TEXT is not JSON \(.*\); give what Report.save or examples/train_dlrm.py --json wrote$"),
        ("report OTHER", "OTHER is not a run's record; give what Report.save or"),
        ("report NEWER", "NEWER is of version 99, and this release reads version 1; update torchrec_slipstream$"),
        ("report OTHER --out p.pdf", r"--out .*p.pdf must end in .html$"),
        ("report OTHER --out nowhere/p.html", "there is no directory .*nowhere; make it first$"),
        ("report RUN.html", r"^slipstream report: --out RUN.html is a RUN itself; give another path$"),
        (
            "plan --calibrate --profile PROFILE --hbm-budget 3GiB",
            "--calibrate measures instead of planning, which --profile, --hbm-budget would be for; give one or",
        ),
        ("plan --calibrate --devices 2 --json", "which --devices, --json would be for"),
        ("plan --calibrate --out b.npz", "--out .*b.npz must end in .json$"),
        ("plan --calibrate --seconds 0", "seconds=0.0 must be a positive number$"),
        ("plan --calibrate --row-bytes 6", "row_bytes=6 must be a positive multiple of 4$"),
    ],
)
def test_bad_arguments_end_with_one_line(
    arguments: str, said: str, saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    for name, text in FILES.items():
        (saved.parent / name).write_text(text)
    pq.write_table(pa.table({"user": pa.array([], pa.int64())}), "empty.parquet")
    NO_LOOKUPS.save("nothing.npz")
    words = {"LOG": "log.parquet", "PROFILE": "profile.npz", "EMPTY": "empty.parquet", "NOTHING": "nothing.npz"}
    before = sorted(saved.parent.iterdir())
    line = refused(capsys, [words.get(word, word) for word in arguments.split()])
    assert re.search(said, line)
    assert "\n" not in line
    assert "usage" not in line
    assert sorted(saved.parent.iterdir()) == before, "nothing was written"


def test_what_is_not_installed_is_named(
    saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("torchrec_slipstream.arguments.find_spec", lambda name: None)
    data = ["profile", str(saved.parent / "log.parquet"), "--out", str(saved.parent / "p.npz")]
    for arguments in (data, [*data, "--columns", "user"]):
        assert refused(capsys, arguments).endswith("reading parquet needs pyarrow: pip install pyarrow")
    drawn = ["plan", "--profile", str(saved), "--picture", str(saved.parent / "p.png")]
    assert refused(capsys, drawn).endswith("--picture needs matplotlib: pip install matplotlib")


def test_tables_that_do_not_fit_say_by_how_much(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, ["plan", "--profile", str(saved), "--ddr", "300KiB", "--hbm", "200KiB", "--devices", "2"])
    assert line.startswith("slipstream plan: ")
    assert "200 KiB of HBM and 150 KiB of host memory each" in line, "a host's memory is for all its devices"
    assert "too little" in line
    assert "What would fit: " in line


def test_mixed_optimizers_have_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = np.arange(10, dtype=np.int32)
    mixed = [TableAccess(f"t{bytes_}", 10, 16, counts, optimizer_bytes=bytes_) for bytes_ in (0, 4)]
    AccessProfile(mixed, samples=10).save(tmp_path / "mixed.npz")
    line = refused(capsys, ["plan", "--profile", str(tmp_path / "mixed.npz")])
    assert line.endswith("the profile's tables have different optimizers; say with --optimizer which one to plan for")
    assert main(["plan", "--profile", str(tmp_path / "mixed.npz"), "--optimizer", "sgd"]) == 0


def test_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torchrec_slipstream.cli", "plan", "--profile", str(tmp_path / "none.npz")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    # FBGEMM may have warned before, of a torch whose build it does not know.
    assert done.stderr.endswith(
        f"slipstream plan: {tmp_path / 'none.npz'} does not exist; give a profile of `slipstream profile`\n"
    )
