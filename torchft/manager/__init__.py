"""The life of a step: begin, communicate, vote, then apply or discard.

    manager.start_quorum()             # begin: who is there, who heals (in the background)
    manager.allreduce(gradient)        # communicate: a failure is this step's, never raised
    if manager.should_commit():        # vote: all ranks of this group, or none
        optimizer.step()               # apply

What holds:

- A step is one `Step`; its errors, averages and bytes belong to it and end with it.
- A heal is loaded on the main thread, before the forward pass or at the vote, and stands whatever
  the vote says: it is the donor's commit, not ours.
- An error abandons the step's process group at once, so that no peer waits for a rank that has
  given up; the next quorum makes a new one.
- The vote is among the ranks of one group. Between groups a step is equal because a collective
  fails for all, and a group that missed it is behind and heals.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed import ReduceOp, Work
from torch.futures import Future

from torchft import settings
from torchft.checkpointing import CheckpointTransport, HTTPTransport
from torchft.coordination import watch_parent
from torchft.errors import QuorumError, SettingsError
from torchft.ledger import Bucket, Ledger
from torchft.manager.average import Name
from torchft.manager.begin import QuorumGroup
from torchft.manager.fingerprint import Fingerprint
from torchft.manager.group import MANAGER_ADDR_KEY, REPLICA_ID_KEY, ReplicaGroup
from torchft.manager.listeners import StepListeners
from torchft.manager.plan import Options, Phase, WorldSizeMode, extract_trailing_digits, follow
from torchft.manager.progress import Progress
from torchft.manager.queue import Steps
from torchft.manager.registering import Registering
from torchft.manager.starting_state import StartingState
from torchft.manager.step import Context, ExceptionWithTraceback, Step
from torchft.manager.telemetry import StepLog
from torchft.peers import Place
from torchft.process_group import ProcessGroup
from torchft.renamed import renamed_arguments
from torchft.settings import get_timeout
from torchft.uncopied import Uncopied

if TYPE_CHECKING:
    from torchft.quantization import Codec

__all__ = [
    "MANAGER_ADDR_KEY",
    "REPLICA_ID_KEY",
    "ExceptionWithTraceback",
    "Manager",
    "WorldSizeMode",
    "extract_trailing_digits",
    "get_timeout",
]

MANAGER_PORT_ENV = settings.MANAGER_PORT
TIMEOUT_SEC_ENV = settings.TIMEOUT_SEC
QUORUM_TIMEOUT_SEC_ENV = settings.QUORUM_TIMEOUT_SEC
CONNECT_TIMEOUT_SEC_ENV = settings.CONNECT_TIMEOUT_SEC
QUORUM_RETRIES_ENV = settings.QUORUM_RETRIES

T = TypeVar("T")


class Manager(Registering, Uncopied):
    """Runs the steps of one rank of a replica group.

    Args:
        pg: spans the groups, one rank of each; reconfigured whenever the members change.
        load_state_dict: loads what a healing group gets; None when all state is registered later.
        state_dict: returns what a healing group needs, such as model and optimizer.
        min_replica_size: fewer participating groups than this, and a step is discarded.
        use_async_quorum: form the quorum during the forward pass; a group that falls behind then
            heals while it contributes zeros. False: `start_quorum` waits, and heals first.
        timeout: deadline of a collective, and of a transfer of state in which nothing moves; a
            vote gets half as much again.
        quorum_timeout: deadline of a quorum.
        connect_timeout: deadline of each connection.
        rank: inside the group; default RANK.
        world_size: ranks of the group; default WORLD_SIZE.
        store_addr: host of the group's TCPStore, already serving; default MASTER_ADDR.
        store_port: its port; default MASTER_PORT.
        lighthouse_addr: `http://host:port`, used on rank 0; default TORCHFT_LIGHTHOUSE.
        replica_id: the group's name; a fresh suffix is added for each start.
        port: where rank 0's manager server listens.
        hostname: the name or address that others reach this process's host by.
        init_sync: at step 0, start every group from one group's state.
        max_retries: more discarded steps in a row than this raise DiscardedTooOften; None: never.
        quorum_retries: how often a failed quorum request is sent again within its deadline.
        check_finite: discard a step in all groups when an average has NaN or infinity in it. Such
            steps do not count towards `max_retries`. It costs about one read of what is averaged.
        lighthouse_timeout: how long a lighthouse that does not answer is waited for.

    Raises:
        SettingsError: an argument or variable that cannot be used.
        TimeoutError: the store or the lighthouse cannot be reached in `connect_timeout`.
    """

    copy_instead = "save its state_dict(), and make one in each process"

    def __init__(
        self,
        pg: ProcessGroup,
        load_state_dict: Callable[[Any], None] | None,
        state_dict: Callable[[], Any] | None,
        min_replica_size: int,
        use_async_quorum: bool = True,
        timeout: timedelta = timedelta(seconds=60),
        quorum_timeout: timedelta = timedelta(seconds=60),
        connect_timeout: timedelta = timedelta(seconds=60),
        rank: int | None = None,
        world_size: int | None = None,
        world_size_mode: WorldSizeMode = WorldSizeMode.DYNAMIC,
        store_addr: str | None = None,
        store_port: int | None = None,
        lighthouse_addr: str | None = None,
        replica_id: str | None = None,
        port: int | None = None,
        hostname: str | None = None,
        heartbeat_interval: timedelta = timedelta(milliseconds=100),
        checkpoint_transport: CheckpointTransport[Any] | None = None,
        init_sync: bool = True,
        max_retries: int | None = None,
        quorum_retries: int = 0,
        check_finite: bool = True,
        lighthouse_timeout: timedelta = timedelta(hours=1),
    ) -> None:
        if (load_state_dict is None) != (state_dict is None):
            raise SettingsError("give load_state_dict and state_dict together, or neither")
        self._ledger = Ledger()
        self.options = Options(
            min_replica_size=min_replica_size,
            sync=not use_async_quorum,
            mode=world_size_mode,
            timeout=settings.timeout(settings.TIMEOUT_SEC, timeout),
            quorum_timeout=settings.timeout(settings.QUORUM_TIMEOUT_SEC, quorum_timeout),
            connect_timeout=settings.timeout(settings.CONNECT_TIMEOUT_SEC, connect_timeout),
            max_retries=max_retries,
            check_finite=check_finite,
            lighthouse_timeout=settings.timeout(
                settings.LIGHTHOUSE_TIMEOUT_SEC, lighthouse_timeout
            ),
            init_sync=init_sync,
        )
        """How it runs its steps."""
        self.process_group = pg
        """Spans the groups; reconfigured whenever the members change."""
        with self.ledger.spending(Bucket.START), ExitStack() as undo:
            group = ReplicaGroup.join(
                name=replica_id or "",
                rank=rank,
                world_size=world_size,
                store_addr=store_addr,
                store_port=store_port,
                lighthouse_addr=lighthouse_addr,
                hostname=hostname,
                port=port,
                heartbeat_interval=heartbeat_interval,
                connect_timeout=self.options.connect_timeout,
                quorum_retries=settings.integer(settings.QUORUM_RETRIES, quorum_retries),
            )
            undo.callback(group.leave)
            self._log = StepLog(group, self.ledger)
            undo.callback(self._log.close)
            self._transport: CheckpointTransport[Any] = checkpoint_transport or HTTPTransport(
                timeout=self.options.timeout, num_chunks=0, hostname=hostname
            )
            undo.pop_all()  # from here on `shutdown` frees them
        Registering.__init__(self, self.options.timeout)
        self.group = group
        """This process in its replica group."""
        self.fingerprint = Fingerprint(self.options)
        """What is compared with the other groups before anything is averaged."""
        self._listeners = StepListeners()
        self._starting_state = StartingState(self.state, self.registered)
        self._progress = Progress(fresh=init_sync)
        context = Context(
            QuorumGroup(pg),
            self.options,
            self._progress,
            self.ledger,
            self._log,
            self.state.training,
        )
        self._steps = Steps(
            context,
            group,
            self._transport,
            self.state,
            self.fingerprint,
            self.listeners,
            self.starting_state,
        )
        if load_state_dict is not None and state_dict is not None:
            self.register_state_dict_fn("default", load_state_dict, state_dict)
        # Names that scripts written for existing versions read.
        self._pg = pg
        self._use_async_quorum = use_async_quorum
        self._replica_world_size_mode = world_size_mode
        self._init_sync = init_sync
        self._max_retries = max_retries
        self._quorum_retries = quorum_retries
        self._replica_id = group.name
        if settings.under_torchrun():
            watch_parent()

    # ------------------------------------------------------------------ what it is made of
    # Properties, so that `unittest.mock.create_autospec(Manager)` has them.

    @property
    def ledger(self) -> Ledger:
        """Where the time of this rank goes."""
        return self._ledger

    @property
    def listeners(self) -> StepListeners:
        """Who is called when a step begins and before its vote."""
        return self._listeners

    @property
    def steps(self) -> Steps:
        """The steps that are open, and how they begin, heal and close."""
        return self._steps

    @property
    def starting_state(self) -> StartingState:
        """What is compared with groups that start at the same step as this one."""
        return self._starting_state

    # ------------------------------------------------------------------ its own state

    def state_dict(self) -> dict[str, int]:
        """Return `step` and `batches_committed`, to be saved with a checkpoint of the model."""
        return self._progress.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from the `state_dict` that was saved with a checkpoint of the model."""
        self._progress.load_state_dict(state_dict)

    def _manager_state_dict(self) -> dict[str, Any]:  # as scripts for existing versions call it
        return self.state.collect(self.state_dict)

    # ------------------------------------------------------------------ begin

    def start_quorum(
        self,
        allow_heal: bool = True,
        shrink_only: bool = False,
        timeout: timedelta | None = None,
        place: Place = Place.BEFORE,
        wait: bool | None = None,
    ) -> None:
        """Begin a step. In async mode it returns at once, and the quorum forms meanwhile.

        It waits in sync mode, with `place=AFTER` unless `wait=False`, and in the first quorum of a
        process: a new group heals before it computes anything.

        Raises:
            TimeoutError, QuorumError: no quorum. In async mode the first collective, or the vote,
                raises it.
            StateDictError: registered state cannot travel to a group that joins, or this group
                joins and cannot load what it was given. Then it has left the job.
        """
        steps = self.steps
        early = place is Place.BEFORE and steps.is_open
        if early and steps.begun("start_quorum").is_meant_by_begin():
            return
        request = steps.request(
            place,
            timeout or self.options.quorum_timeout,
            allow_heal=allow_heal,
            shrink_only=shrink_only,
        )
        steps.begin(request, wait=place is Place.AFTER if wait is None else wait)

    def wait_quorum(self) -> None:
        """Wait until the quorum stands and this group can communicate; raises why it does not."""
        _ = self.steps.begun("wait_quorum").plan

    # ------------------------------------------------------------------ communicate

    @renamed_arguments(unsaid="error_feedback")
    def allreduce(
        self,
        tensor: torch.Tensor,
        should_quantize: bool | str | Codec = False,
        reduce_op: ReduceOp.RedOpType = ReduceOp.AVG,
        *,
        error_feedback: torch.Tensor | None = None,
        name: Name | None = None,
    ) -> Work:
        """Reduce `tensor` over the participating groups, in place; AVG divides by their number.

        A group that does not participate sends zeros. After an error of this step the tensor stays
        as it is. Errors discard the step; only a quorum that never formed is raised.

        NaN or infinity in an average or a sum discards the step in all groups alike, but not in a
        maximum or a minimum, nor with `check_finite=False`.

        Args:
            tensor: of any shape; dense.
            should_quantize: makes what travels smaller. True means int8, or fp8 on CUDA devices
                from capability 9.0 on; a name, or a codec, that one. All groups must mean the
                same: where their devices differ, name it, and have `fingerprint.describe_setting`
                compare it. Half of the work is done by who waits: wait for these in the order in
                which you began them.
            reduce_op: AVG, SUM, MAX, MIN, …; a codec takes SUM and AVG only.
            error_feedback: error-feedback buffer, with as many elements as `tensor`, fp32 or fp64.
                In: the exact values. Out: the quantisation error, to be added to the next round
                (`torchft.quantization.ErrorFeedback`).
            name: what a NotFiniteError calls the tensor, or a function from the tensor to its
                parts by name.

        Raises:
            ValueError: AVG of a tensor that is neither floating-point nor complex; a sparse tensor;
                a codec that does not exist, or cannot hold the tensor's dtype.
            NotImplementedError: quantised, and neither SUM nor AVG.
        """
        return self.steps.begun("allreduce").allreduce(
            tensor, should_quantize, reduce_op, error_feedback=error_feedback, name=name
        )

    def ordered_mean(self, tensor: torch.Tensor) -> Work:
        """Average `tensor` over the participating groups, in place, in the order of their ids.

        As `allreduce`, but with bits that depend on nothing else. Half of the work is done by who
        waits: wait for these in the order in which you began them.
        """
        return self.steps.begun("ordered_mean").ordered_mean(tensor)

    def allgather(self, tensor: torch.Tensor) -> tuple[Work, list[torch.Tensor]]:
        """Gather `tensor` from the participating groups: the work, and their tensors in order.

        After an error of this step, what is gathered is this group's own tensor.
        """
        return self.steps.begun("allgather").allgather(tensor)

    def report_error(self, e: Exception) -> None:
        """Discard the step that runs now, because of `e`."""
        self.steps.begun("report_error").report_error(e)

    def errored(self) -> ExceptionWithTraceback | None:
        """Return the error of the step that runs now; None while there is none."""
        return self.steps.last.error if self.steps.last else None

    def wrap_future(
        self, fut: Future[T], default: T, timeout: timedelta | None = None
    ) -> Future[T]:
        """Give `fut` a deadline; a failure is reported and completes with `default` instead."""
        return self.steps.begun("wrap_future").wrap_future(fut, default, timeout)

    # ------------------------------------------------------------------ vote

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        """Vote, once per step, on every rank. True: apply the step. False: discard it.

        Raises:
            PhaseError: no step is open.
            TimeoutError: a rank of this group does not vote in `timeout` (`torchft.timeouts`).
            DiscardedTooOften: more discarded steps in a row than `max_retries`.
            DeviceLostError: a device of this rank failed; its group has left the job.
        """
        follow(self.steps.phase, Phase.VOTING)
        step = self.steps.begun("should_commit")
        self.listeners.before_vote(step)
        return self.steps.close(step, timeout)

    def fall_behind(self) -> None:
        """The step that was just committed could not be applied here: heal it from the others."""
        self.steps.fall_behind(self.steps.begun("fall_behind"))

    def final_sync(self, timeout: timedelta | None = None) -> bool:
        """End a run: meet the others once more, so that whoever missed the last step heals.

        Call it after the last step, in every group. A group that still trains then heals in its
        next step, which is discarded.

        Args:
            timeout: of the quorum, in place of the manager's `quorum_timeout`.

        Returns:
            Whether the others came. If not, which is logged, this group may be the only one at its
            step.
        """
        until = time.monotonic() + (timeout or self.options.quorum_timeout).total_seconds()
        synced = self.steps.last is not None and self.steps.last.synced
        while not synced and time.monotonic() < until:
            left = timedelta(seconds=until - time.monotonic())
            with self.ledger.spending(Bucket.SETTLE):
                try:
                    self.steps.begin(
                        self.steps.request(Place.AFTER, left, final_sync=True), wait=True
                    )
                    synced = self.steps.close(self.steps.begun("final_sync"), counts=False)
                except (TimeoutError, QuorumError) as error:
                    said = "no final synchronisation with the other groups: %s"
                    self._log.say(logging.WARNING, self._progress.step, said, error)
                    break
        return synced

    def settle(self, timeout: timedelta | None = None) -> bool:
        """Meet the others once more. Deprecated: the former name of `final_sync`."""
        warnings.warn("Manager.settle is called final_sync now", DeprecationWarning, stacklevel=2)
        return self.final_sync(timeout)

    def take_step(self) -> Step:
        """The step that was begun last, for a caller who closes it. Deprecated: `steps.take`."""
        warnings.warn("Manager.take_step is steps.take now", DeprecationWarning, stacklevel=2)
        return self.steps.take()

    # ------------------------------------------------------------------ who, where

    def current_step(self) -> int:
        """Return the number of the last committed step, from 0."""
        return self._progress.step

    def num_skipped(self) -> int:
        """How many steps in a row, up to the last one, were discarded for NaN or infinity alone."""
        return self._progress.skipped

    def batches_committed(self) -> int:
        """How many groups' batches the committed steps hold."""
        return self._progress.batches_committed

    def num_participants(self) -> int:
        """How many groups participate in this step; waits for the quorum. 0 before the first."""
        return 0 if self.steps.last is None else len(self.steps.last.plan.participating)

    def participating_rank(self) -> int | None:
        """This group's position among the participating ones, None if it is not one of them; waits
        for the quorum."""
        return None if self.steps.last is None else self.steps.last.plan.participating_rank

    def is_participating(self) -> bool:
        """Whether this group participates in this step, as far as is known; does not wait."""
        plan = self.steps.last.known_plan if self.steps.last else None
        return plan is not None and plan.participates

    def note(self, **extra: Any) -> None:
        """Add values that JSON can hold, such as a loss, to the next step record to be written."""
        self._log.note(extra)

    def shutdown(self, wait: bool = True) -> None:
        """Free the server, the transport and the threads. Calling it again does nothing."""
        self.steps.shutdown(wait)
