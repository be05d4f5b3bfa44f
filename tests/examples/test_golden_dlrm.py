"""The golden script runs with and without its five lines, which are all that the switch costs."""

from __future__ import annotations

import difflib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from examples import golden_dlrm
from tests.examples.test_train_dlrm import run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "golden_dlrm.py"
SMALL = ["--rows", "2000", "--dim", "16", "--batch-size", "64", "--steps", "120"]
RESULT = re.compile(r"^(\d) rank\(s\) on cpu: ([\d,]+) samples/s, final loss (\d\.\d+)$", re.MULTILINE)


def marked() -> list[str]:
    """The lines that end in `# +1` to `# +5`, in that order; without their marks."""
    found = {int(m[2]): m[1] for m in re.finditer(r"^(.*\S)  # \+(\d)$", SCRIPT.read_text(), re.MULTILINE)}
    assert sorted(found) == list(found)
    return list(found.values())


def stock_script(folder: Path) -> Path:
    """The script without those lines."""
    path = folder / "stock_dlrm.py"
    lines = SCRIPT.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not re.search(r"  # \+\d$", line)))
    return path


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(printed: str) -> tuple[int, float, float]:
    """Ranks, samples a second, loss: printed once, however many ranks."""
    (found,) = RESULT.findall(printed)
    return int(found[0]), float(found[1].replace(",", "")), float(found[2])


def test_the_switch_costs_five_lines(tmp_path: Path) -> None:
    stock, both = stock_script(tmp_path).read_text().splitlines(), SCRIPT.read_text().splitlines()
    changed = [
        line
        for line in difflib.unified_diff(stock, both, lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    assert len(changed) == 5
    assert all(line.startswith("+") for line in changed), "lines are added, none is changed"
    # Nothing else touches the package: what is left is the switch itself, and words.
    code = [line for line in stock if "slip" in line.lower() and not line.lstrip().startswith(("#", '"""'))]
    code = [line for line in code if "parser.add_argument" not in line and not line.startswith("    torchrun ")]
    assert code == []
    assert len(both) < 165, "TorchRec's own has 164"


def test_readme_shows_the_five_lines() -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```diff\n(.*?)```", readme, re.DOTALL)
    added = [[line[1:].strip() for line in block.splitlines() if line.startswith("+")] for block in blocks]
    assert [line.strip() for line in marked()] in added, "show the diff of examples/golden_dlrm.py in the README"


def test_without_those_lines_it_is_the_script_without_the_switch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden_dlrm.main(SMALL)
    with_lines = capsys.readouterr().out
    stock = load(stock_script(tmp_path))
    assert not any("slipstream" in str(getattr(value, "__module__", "")) for value in vars(stock).values())
    stock.main(SMALL)
    without = capsys.readouterr().out
    assert "stock TorchRec" in with_lines
    assert "stock TorchRec" not in without
    ranks, speed, loss = result(without)
    assert (ranks, loss) == (1, result(with_lines)[2]), "bit for bit the same training"
    assert speed > 0
    assert loss < 0.66, "a coin gets 0.69"


def test_with_the_switch_rows_are_planned_and_updates_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    golden_dlrm.main([*SMALL, "--steps", "240", "--slipstream"])
    printed = capsys.readouterr().out
    ranks, _, loss = result(printed)
    assert ranks == 1
    assert loss < 0.66
    assert sum(line.split()[0].count(".t_cat_") for line in printed.splitlines() if line.strip()) == 26
    # 64 samples a step are too few for skipping to save time: half of the trials' steps left half of it out.
    skipped = re.search(r"^all tables .* ([\d.]+)%$", printed, re.MULTILINE)
    assert skipped is not None
    assert 5 < float(skipped[1]) < 20
    assert re.search(r"[\d.]+ ms a step with all updates, [\d.]+ with some left out .*: left alone", printed)
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "switch"), [(1, []), (2, ["--slipstream"])])
def test_it_runs_under_torchrun(ranks: int, switch: list[str]) -> None:
    done = run([*SMALL, *switch], script="examples/golden_dlrm.py", ranks=ranks)
    assert done.returncode == 0, done.stderr
    found, _, loss = result(done.stdout)
    assert found == ranks
    assert loss < 0.66
    assert done.stdout.count("all tables") == len(switch), "rank 0 alone prints the report"
