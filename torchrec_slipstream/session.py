"""The session: attaches the rooms to a model, follows the training step by step, and reports."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, overload

import torch.distributed as dist
from torch import Tensor, nn

from torchrec_slipstream.access import AccessProfile
from torchrec_slipstream.access.live import LiveCounts, has_row_counts
from torchrec_slipstream.config import SlipstreamConfig
from torchrec_slipstream.errors import AttachError
from torchrec_slipstream.inputs.hotline import Hotline
from torchrec_slipstream.inputs.live import LiveInputs
from torchrec_slipstream.inputs.methods import Surroundings, make
from torchrec_slipstream.inputs.rows import RowSets
from torchrec_slipstream.placement import Placement
from torchrec_slipstream.placement.attaching import attach_hot_rows, check_can_have_hot_rows, wants_hot_rows
from torchrec_slipstream.placement.hot_rows import HotRows
from torchrec_slipstream.ranks import Ranks
from torchrec_slipstream.report.report import Report
from torchrec_slipstream.session_report import ScalarWriter, check_writer, report_of, write_scalars
from torchrec_slipstream.session_state import STATE_VERSION, check_whole, checking
from torchrec_slipstream.staleness.tracker import StalenessTracker
from torchrec_slipstream.tbe import UpdateFilter, find_tbes, process_group_of


class Slipstream:
    """Counts the look-ups of every row, and leaves out the fused updates of rows that have stopped moving, in a model
    that is otherwise stock.

    Args:
        model: a ``DistributedModelParallel`` model, or any module tree that contains FBGEMM TBEs. Several embedding
            collections are fine. Its parameters, state_dict keys and fused optimizer stay exactly TorchRec's.
        config: the knobs; the defaults leave out half of the look-ups' updates after 100 steps, where that saves time.
        placement: which rows are hot at first, as a :class:`SlipstreamPlanner` with ``backing="uvm"`` planned them
            together with the model's sharding (``planner.placement``). They get fast memory in an overlay, with their
            optimizer state; checkpoints do not know. None: no rows, or those that re-plans find
            (:class:`PlacementConfig`).
        writer: gets scalars of this rank while it trains: TensorBoard's ``SummaryWriter``, or anything with its
            ``add_scalar(tag, value, step)``.
        process_group: whose ranks agree on what is stale; default: the model's own if it is a
            ``DistributedModelParallel``, else the default group, else this process alone. All its ranks must
            attach, and call :meth:`step`, alike; with a placement or a budget, they wait for each other to attach.

    Raises:
        AttachError: the model has no TBE, or one that cannot be filtered, or is attached already; or a table is to be
            counted by a sketch and datasketches is not installed; or the placement is of another model; or an argument
            is of another type. Nothing changed; with a placement or a budget, on no rank.

    Example::

        model = DistributedModelParallel(model, ...)
        slip = Slipstream(model)
        for _ in range(steps):
            pipeline.progress(batches)
            slip.step()
        print(slip.report())
    """

    def __init__(
        self,
        model: nn.Module,
        config: SlipstreamConfig | None = None,
        *,
        placement: Placement | None = None,
        writer: ScalarWriter | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.config = config if config is not None else SlipstreamConfig()
        if not isinstance(self.config, SlipstreamConfig):
            raise AttachError(f"config must be a SlipstreamConfig, not {type(config).__name__}")
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            raise AttachError(f"process_group={process_group!r}; give a torch.distributed.ProcessGroup, or None")
        access = self.config.access
        is_placed = wants_hot_rows(self.config.placement, placement)
        group = process_group if process_group is not None else process_group_of(model)
        self._ranks = ranks = Ranks.of(group)
        # No part keeps a method of ours, but the filters while attached: a session that nobody has any more shall go at
        # once, with its fast memory.
        self._hot = hot = attach_hot_rows(
            lambda: self._prepare(model, placement, writer), ranks.total, ranks.device, collective=is_placed
        )
        self._around = Surroundings(
            model,
            self._filters,
            ranks,
            placement,
            moves=partial(_moves, hot) if is_placed and self.config.placement.replan_every else None,
            scale=access.scale,
            profile=partial(self._counts.profile, ranks),
        )
        self._inputs = LiveInputs(self.config.inputs, group, partial(make, self.config.inputs, self._around))
        self._writer = writer
        self._began, self._first_step = time.perf_counter(), 0
        self._attached = True
        for one in self._filters:
            one.attach(self.detach)

    def _prepare(self, model: nn.Module, placement: Placement | None, writer: ScalarWriter | None) -> HotRows:
        """Everything that this rank can refuse by itself, and that changes nothing of the model yet: its hot rows."""
        staleness, access, ranks = self.config.staleness, self.config.access, self._ranks
        check_writer(writer)
        check_can_have_hot_rows(model, self.config.placement, placement)
        found = find_tbes(
            model,
            frozenset(staleness.exclude_tables),
            sketch_tables=frozenset(access.sketch_tables),
            skips=staleness.target_share > 0.0,
        )
        self._filters = [
            UpdateFilter(one.counting(lambda shard: has_row_counts(shard, access)), fades=access.half_life is not None)
            for one in found
        ]
        self._counts = LiveCounts(self._filters, access)
        self._tracker = StalenessTracker(self._filters, staleness, ranks.total, ranks.device, scale=access.scale)
        return HotRows(
            self._filters,
            self.config.placement,
            placement,
            rank=ranks.mine,
            counted=self._counts.counted_steps,
            total=ranks.total,
            group_device=ranks.device,
        )

    def inputs(self, loader: Iterable[Any], **things: Any) -> Iterator[Any]:
        """The batches of one epoch to train on: those of ``loader``, less the samples that ``config.inputs`` drops.

        Batches are as large as the loader's first, and every rank gets the same number of them, whatever it dropped and
        however long its loader is; see :class:`InputStream`. Call :meth:`step` after the training step of each batch,
        and this method anew for each epoch; the method's state goes on. With ``method="off"`` this is ``iter(loader)``.
        A stream that is open when the session is detached goes on, and drops nothing more.

        A collective call: every rank makes it, and takes batches, alike.

        Args:
            loader: of this rank's TorchRec ``Batch``es (or dataclasses of tensors and KJTs, :mod:`.inputs.batches`), of
                any length, the same on resuming: one without a ``state_dict`` of its own is read on to where it was.
            things: what the method takes besides, in the first call: "slipstream" an access ``profile``, "fae" one too,
                its ``calibration`` and a ``test_loss``; see :class:`SlipstreamInputs` and :class:`FaeInputs`. Later
                calls may repeat them.

        Raises:
            AttachError: the session was detached.
            InputError: the method takes other ``things``, or took others in the first call.
            StateError: the state that was loaded is of other inputs.
        """
        if not self._attached:
            raise AttachError("this session was detached; iterate over the loader itself, or attach a new Slipstream")
        return self._inputs.open(loader, **things)

    def hotline(self, popular: RowSets | Callable[[Any], Tensor]) -> Hotline:
        """Train each batch as a popular and a non-popular micro-batch that make one step: see :class:`Hotline`.

        ::

            hotline = slip.hotline(popular)
            for batch in loader:
                optimizer.zero_grad()
                loss = hotline.backward(batch, lambda part: model(part)[0])
                optimizer.step()
                slip.step()

        Args:
            popular: the hot rows, or what says of a batch which of its samples are popular (bool ``[B]``).

        Raises:
            AttachError: the session was detached, or a table's update cannot be deferred.
        """
        if not self._attached:
            raise AttachError("this session was detached; attach a new Slipstream to go on")
        return Hotline(self._around.model, self._filters, popular, self._around.ranks)

    def step(self) -> None:
        """Tell the session that one training step (forward, backward and update) is over.

        A forward counts as training where gradients are enabled: evaluate under ``torch.no_grad()``, as TorchRec does.

        Raises:
            AttachError: the session was detached.
        """
        if not self._attached:
            raise AttachError("this session was detached; attach a new Slipstream to go on")
        for one in self._filters:
            one.warn_if_compiled()
        self._tracker.step()
        steps = self._tracker.steps
        self._counts.step(steps)
        self._hot.step(steps)
        self._inputs.step(steps)
        if self._writer is not None and steps % self.config.placement.record_every == 0:
            write_scalars(self._writer, self._filters, self._hot, steps)

    def detach(self) -> None:
        """Make the model stock again: every row is where it was, and from the next forward on updated.

        Call between two steps: a backward that is still to come may not find its hot rows. May be called twice. The
        overlays' fast memory is free when the session object is gone, which still reports. Without that object, the
        function :func:`torchrec_slipstream.detach` does it.

        Raises:
            StateError: others wrote into a tensor of a table with hot rows that was taken before the last step. Nothing
                was detached.
        """
        for overlay in self._hot.overlays:
            if overlay is not None:
                overlay.notice_writes()
        for one in self._filters:
            one.detach()
        self._hot.detach()
        self._inputs.detach()
        self._attached = False

    def report(self) -> Report:
        """What happened so far, over all ranks (a collective call: every rank must make it)."""
        report = report_of(
            self.config,
            self._around.model,
            self._filters,
            self._tracker,
            self._hot,
            self._inputs,
            self._ranks,
            seconds=time.perf_counter() - self._began,
            first_step=self._first_step,
        )
        self._ranks.rest()
        return report

    @overload
    def access_profile(self) -> AccessProfile: ...
    @overload
    def access_profile(self, dst: int | None) -> AccessProfile | None: ...
    def access_profile(self, dst: int | None = None) -> AccessProfile | None:
        """How often training looked up each row so far: whole logical tables, over all ranks.

        A collective call: every rank must make it, between two steps. Look-ups in evaluation are not counted. Tables
        are called by their names, or ``collection.table`` where two collections have one of the same name. Missing are
        the tables that the session is not attached to: data-parallel ones, and excluded ones without a TBE in common
        with others.

        Args:
            dst: the rank of the session's process group that gets the profile; None: all do, each with 4 bytes for
                every row of the whole model (8 if a count is above 2^31; a sketched table's 16 for every listed row).
                With a ``dst`` the others get None and need no memory for it.

        Raises:
            ProfileError: nothing is counted, or the group has no rank ``dst``.
        """
        profile = self._counts.profile(self._ranks, dst)
        self._ranks.rest()
        return profile

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model and its optimizers. Tensors only of this rank's shards.

        Save it a rank at a time, beside the model's checkpoint, between two steps. In the middle of an epoch it holds
        the samples that :meth:`inputs` has read and that were not trained on yet; after its last step, the next epoch
        is to come. A run resumed on the same sharding then equals an uninterrupted one bit for bit, as far as no clock
        has a say: with ``StalenessConfig(where="everywhere")``, and ``PlacementConfig(max_stall_share=None)`` where
        rows move. Without it, or on another sharding, rows are tracked afresh.
        """
        return {
            "version": STATE_VERSION,
            "staleness": self._tracker.state_dict(),
            "access": self._counts.state_dict(),
            "placement": self._hot.state_dict(),
            "inputs": self._inputs.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`'s state, after the model's own is loaded.

        Raises:
            StateError: it belongs to another version, model, sharding or configuration, or is damaged. Nothing was
                changed.
        """
        check_whole(state)
        checks: list[tuple[str, Callable[[Any], None]]] = [
            ("access", self._counts.check_config),
            ("staleness", self._tracker.check),
            ("access", self._counts.check),
            ("placement", self._hot.check),
            ("inputs", self._inputs.check),
        ]
        for part, check in checks:
            with checking(part):
                check(state[part])
        self._tracker.load_state_dict(state["staleness"])
        self._counts.load_state_dict(state["access"])
        self._counts.prepare(self._tracker.steps)
        self._hot.load_state_dict(state["placement"])
        self._inputs.load_state_dict(state["inputs"])
        self._began, self._first_step = time.perf_counter(), self._tracker.steps


def _moves(hot: HotRows) -> int:
    """Re-plans so far that moved rows."""
    return sum(one.moved for one in hot.replans)
