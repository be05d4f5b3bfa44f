"""A training job that is killed again and again, and resumes each time from its last checkpoint.

SIGKILL leaves no time to tidy up, wherever it hits: in a step, among rows that move, or in a half-written checkpoint.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torchrec import KeyedJaggedTensor

from tests.distributed.checkpoints import assert_same, both, copied, load
from tests.models import ROWS, TwoCollections, batches_for, sharded
from torchrec_slipstream import AccessConfig, PlacementConfig, Slipstream, SlipstreamConfig, StalenessConfig
from torchrec_slipstream.placement import hot_rows

pytestmark = pytest.mark.slow

SAVE_EVERY = 3
PHASES = ("start", "load", "train", "move", "save", "end", "failed")


# ------------------------------------------------------------------------------------------- the training job


def _config(ranks: int) -> SlipstreamConfig:
    return SlipstreamConfig(
        staleness=StalenessConfig(where="everywhere", target_share=0.3, warmup_steps=6, interval=4),
        access=AccessConfig(counter="exact"),
        # Small chunks, so that a move takes its time; no clock has a say in what moves.
        placement=PlacementConfig(
            hbm_budget=4500 // ranks, replan_every=3, min_gain=0.0, move_cost=0.0, max_stall_share=None, chunk_bytes=1
        ),
    )


def _drifting(batch: tuple[KeyedJaggedTensor, ...], step: int) -> list[KeyedJaggedTensor]:
    """The batch, of other rows every few steps, so that there is always something to move."""
    moved = []
    for one in batch:
        rows = torch.tensor(ROWS).repeat_interleave(torch.tensor(one.length_per_key()))
        moved.append(KeyedJaggedTensor(one.keys(), (one.values() + 37 * (step // 5)) % rows, lengths=one.lengths()))
    return moved


class Progress:
    """Where a job is, in memory that outlives it: its step and its phase."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(16))
        self._now = np.memmap(path, dtype=np.int64, mode="r+", shape=(2,))

    @property
    def step(self) -> int:
        return int(self._now[0])

    @property
    def phase(self) -> str:
        return PHASES[int(self._now[1])]

    def enter(self, phase: str, step: int | None = None) -> None:
        self._now[1] = PHASES.index(phase)
        if step is not None:
            self._now[0] = step


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*"))


def _save(folder: Path, step: int, rank: int, model: Any, session: Slipstream) -> None:
    """Whole or not at all: what is half-written has another name."""
    unfinished = folder / f"unfinished_{step:04d}"
    if rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a life before
    dist.barrier()
    dcp.save(both(model), checkpoint_id=unfinished)
    torch.save(session.state_dict(), unfinished / f"session_{rank}.pt")
    dist.barrier()
    if rank == 0:
        unfinished.rename(folder / f"step_{step:04d}")
        for old in _checkpoints(folder)[:-2]:
            shutil.rmtree(old)
    dist.barrier()


def _train(folder: Path, rank: int, ranks: int, steps: int, life: int, saves: bool) -> None:
    progress = Progress(folder / f"progress_{rank}")
    store = f"file://{folder}/store_{life}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    found = _checkpoints(folder)
    # With other weights where they are to be loaded.
    model = sharded(TwoCollections(), "row_wise" if ranks > 1 else "table_wise", seed=life if found else 0)
    session = Slipstream(model, _config(ranks))
    begin = 0
    if found:
        progress.enter("load")
        state = both(model)
        dcp.load(state, checkpoint_id=found[-1])
        load(model, state)
        session.load_state_dict(torch.load(found[-1] / f"session_{rank}.pt"))
        begin = int(found[-1].name[-4:])
    moves = hot_rows.migrate

    def migrate(*arguments: Any) -> Any:
        progress.enter("move")
        moved = moves(*arguments)
        progress.enter("train")
        return moved

    hot_rows.migrate = migrate  # type: ignore[assignment]  # this process is ours alone
    for step, batch in enumerate(batches_for(TwoCollections(), steps=steps, rank=rank)):
        if step < begin:
            continue
        progress.enter("train", step)
        model(*_drifting(batch, step)).square().sum().backward()
        session.step()
        if saves and (step + 1) % SAVE_EVERY == 0:
            progress.enter("save")
            _save(folder, step + 1, rank, model, session)
    result = copied(both(model))
    for one in session._filters:
        assert one.overlay is not None
        for place, shard in enumerate(one.shards):
            result[f"hot {shard.key}"] = one.overlay.hot_rows(place).numpy()
        result[f"patterns {one.shards[0].key}"] = one.patterns.numpy()
        result[f"hits {one.shards[0].key}"] = one.overlay.hits.numpy()
    result["moved"] = np.array([one.demoted + one.promoted for one in session._hot.replans])
    torch.save(result, folder / f"unfinished_{rank}.pt")
    (folder / f"unfinished_{rank}.pt").rename(folder / f"result_{rank}.pt")
    progress.enter("end")


# ------------------------------------------------------------------------------------------- who starts and kills it


def _serve(pipe: Connection) -> None:
    """Start jobs by forking, so that none has to import torch, FBGEMM and TorchRec anew."""
    # TorchRec imports this with the first model, and it takes longer than all else that a job does.
    import torch.distributed.optim

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        if isinstance(asked, int):
            pipe.send(os.waitpid(asked, 0)[1])
            continue
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with open(asked[0] / f"output_{asked[1]}", "w") as output:
                    os.dup2(output.fileno(), 1)
                    os.dup2(output.fileno(), 2)
                _train(*asked)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
                Progress(asked[0] / f"progress_{asked[1]}").enter("failed")
            finally:
                os._exit(code)
        pipe.send(child)


class Jobs:
    """Jobs of some ranks each, one after the other."""

    def __init__(self) -> None:
        self._pipe, theirs = mp.Pipe()
        self._server = mp.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
        self._server.start()
        theirs.close()

    def _ask(self, question: Any) -> int:
        self._pipe.send(question)
        answer: int = self._pipe.recv()
        return answer

    def start(self, folder: Path, ranks: int, steps: int, life: int, *, saves: bool = True) -> list[int]:
        for rank in range(ranks):
            Progress(folder / f"progress_{rank}").enter("start", 0)
        return [self._ask((folder, rank, ranks, steps, life, saves)) for rank in range(ranks)]

    def end(self, folder: Path, jobs: list[int]) -> list[dict[str, np.ndarray]]:
        """Wait for jobs that nobody kills; their results."""
        for rank, job in enumerate(jobs):
            assert self._ask(job) == 0, (folder / f"output_{rank}").read_text()[-3000:]
        return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(len(jobs))]

    def kill(self, folder: Path, jobs: list[int], step: int, phase: str | None, chance: random.Random) -> str:
        """Kill the jobs one after the other, some time after the first has come to a step, or to a phase in it or
        after it; in which phase it was then."""
        progress = Progress(folder / "progress_0")
        deadline = time.monotonic() + 60
        while progress.step < step or phase not in (None, progress.phase):
            running = progress.phase != "failed" and time.monotonic() < deadline
            assert running, (folder / "output_0").read_text()[-3000:]
            time.sleep(0.0002)
        # A move of these few rows is over in a millisecond or two.
        longest = {None: 0.05, "save": 0.005, "move": 0.0005}[phase]
        order = list(enumerate(jobs))
        chance.shuffle(order)
        found = ""
        for rank, job in order:
            time.sleep(chance.uniform(0.0, longest))
            os.kill(job, signal.SIGKILL)
            ended = self._ask(job)
            # Who waits for a rank that was killed may have an error of its own by then.
            assert ended == signal.SIGKILL or found, (folder / f"output_{rank}").read_text()[-3000:]
            found = found or Progress(folder / f"progress_{rank}").phase
        return found

    def stop(self) -> None:
        self._pipe.close()
        self._server.join()


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    server = Jobs()
    yield server
    server.stop()


@pytest.mark.parametrize(("ranks", "steps", "kills"), [(1, 110, 50), (2, 50, 6)])
def test_resumed_run_equals_an_uninterrupted_one(
    jobs: Jobs, tmp_path: Path, ranks: int, steps: int, kills: int
) -> None:
    chance = random.Random(ranks)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    want = jobs.end(whole, jobs.start(whole, ranks, steps, 0, saves=False))
    assert (want[0]["moved"] > 0).all()
    phases: Counter[str] = Counter()
    for life, step in enumerate(sorted(chance.randrange(steps - 10) for _ in range(kills))):
        running = jobs.start(torn, ranks, steps, life)
        # Every sixth soon after its start; some while rows move or a checkpoint is written; the others anywhere.
        aim = {3: "move", 5: "save"}.get(life % 6)
        phases[jobs.kill(torn, running, step if life % 6 else 0, aim, chance)] += 1
    got = jobs.end(torn, jobs.start(torn, ranks, steps, kills))
    for mine, theirs in zip(got, want, strict=True):
        assert_same(mine, theirs)
    assert phases.total() == kills
    if ranks == 1:
        assert all(phases[phase] for phase in ("train", "move", "save")), phases
        assert phases["start"] + phases["load"] > 0, phases
