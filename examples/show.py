"""The results of train_dlrm.py, for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from examples.timing import PARTS
from torchrec_slipstream import Report

Run = dict[str, Any]


def show(runs: dict[str, Run]) -> str:
    """The runs side by side, a column each, and below them what was skipped, a line a table."""
    first = next(iter(runs.values()))
    lines: dict[str, Callable[[Run], str]] = {
        "test AUC": lambda run: f"{run['test']['auc']:.4f}",
        "normalised entropy": lambda run: f"{run['test']['normalized_entropy']:.4f}",
        "log-loss": lambda run: f"{run['test']['log_loss']:.4f}",
        "look-ups skipped": lambda run: f"{run['slipstream']['skipped_share']:.1%}" if run["slipstream"] else "none",
        "  while leaving out": lambda run: (
            f"{run['slipstream']['measured_share']:.1%}" if run["slipstream"] else "none"
        ),
        "step, median ms": lambda run: f"{run['step_ms']['median']:.2f}",
        **{f"  {part}": lambda run, part=part: f"{run['step_ms'][part]:.2f}" for part in PARTS},  # type: ignore[misc]
        "tracker, of the time": lambda run: f"{run['tracker_share']:.1%}" if run["slipstream"] else "none",
        "samples a second": lambda run: f"{run['samples_per_second']:,.0f}",
        "training, seconds": lambda run: f"{run['seconds']:.1f}",
    }
    out = [
        f"{first['train_samples']:,} training and {first['test_samples']:,} test samples of {first['data']}, "
        f"{first['rows']:,} rows x {first['embedding_dim']}, {first['world_size']} rank(s) on {first['device']}",
        "",
        f"{'':22}" + "".join(f"{'skip ' + mode:>16}" for mode in runs),
    ]
    out += [f"{name:22}" + "".join(f"{value(run):>16}" for run in runs.values()) for name, value in lines.items()]
    if first["best_possible"]:
        best = first["best_possible"]
        out += ["", f"best possible on this data: AUC {best['auc']:.4f}, log-loss {best['log_loss']:.4f}"]
    for mode, run in runs.items():
        if run["slipstream"]:
            out += ["", f"skip {mode}:", str(Report.from_dict(run["slipstream"]))]
    return "\n".join(out)
