"""The life of a step: begin, communicate, vote, then apply or discard.

    manager.start_quorum()             # begin: who is there, who heals (in the background)
    manager.allreduce(gradient)        # communicate: a failure is this step's, never raised
    if manager.should_commit():        # vote: all ranks of this group, or none
        optimizer.step()               # apply

What holds:

- A step is one `Transaction`; its errors, averages and bytes belong to it and end with it.
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
from collections.abc import Callable, Sequence
from concurrent.futures import Future as ThreadFuture
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.distributed import ReduceOp, Work
from torch.futures import Future

from torchft import settings
from torchft.checkpointing import CheckpointTransport, HTTPTransport
from torchft.coordination import watch_parent
from torchft.errors import PhaseError, QuorumError, SettingsError
from torchft.ledger import Bucket, Ledger
from torchft.manager.average import Name
from torchft.manager.background import Background
from torchft.manager.begin import Former, Request
from torchft.manager.collectives import Communicator
from torchft.manager.fingerprint import describe
from torchft.manager.group import MANAGER_ADDR_KEY, REPLICA_ID_KEY, ReplicaGroup
from torchft.manager.listeners import StepListener, StepListeners
from torchft.manager.live_state import LiveState
from torchft.manager.loading import Loader
from torchft.manager.open_step import Means, OpenStep
from torchft.manager.plan import Options, Phase, WorldSizeMode, follow
from torchft.manager.progress import Progress
from torchft.manager.queue import OpenSteps
from torchft.manager.telemetry import StepLog
from torchft.manager.transaction import ExceptionWithTraceback, Transaction
from torchft.manager.vote import Closer
from torchft.peers import Place
from torchft.process_group import ProcessGroup
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
    "get_timeout",
]

MANAGER_PORT_ENV = settings.MANAGER_PORT
TIMEOUT_SEC_ENV = settings.TIMEOUT_SEC
QUORUM_TIMEOUT_SEC_ENV = settings.QUORUM_TIMEOUT_SEC
CONNECT_TIMEOUT_SEC_ENV = settings.CONNECT_TIMEOUT_SEC
QUORUM_RETRIES_ENV = settings.QUORUM_RETRIES

T = TypeVar("T")


class Manager(Uncopied):
    """Runs the steps of one rank of a replica group.

    Args:
        pg: spans the groups, one rank of each; reconfigured whenever the members change.
        load_state_dict: loads what a healing group gets; None when all state is registered later.
        state_dict: returns what a healing group needs, such as model and optimizer.
        min_replica_size: fewer counted groups than this, and a step is discarded.
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
        self.ledger = Ledger()
        """Where the time of this rank goes."""
        self._options = options = Options(
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
        )
        with self.ledger.spending(Bucket.START), ExitStack() as undo:
            self._group = ReplicaGroup.join(
                name=replica_id or "",
                rank=rank,
                world_size=world_size,
                store_addr=store_addr,
                store_port=store_port,
                lighthouse_addr=lighthouse_addr,
                hostname=hostname,
                port=port,
                heartbeat_interval=heartbeat_interval,
                connect_timeout=options.connect_timeout,
                quorum_retries=settings.integer(settings.QUORUM_RETRIES, quorum_retries),
            )
            undo.callback(self._group.leave)
            self._log = StepLog(self._group, self.ledger)
            undo.callback(self._log.close)
            self._transport: CheckpointTransport[Any] = checkpoint_transport or HTTPTransport(
                timeout=options.timeout, num_chunks=0, hostname=hostname
            )
            undo.pop_all()  # from here on `shutdown` frees them
        self._state = LiveState(options.timeout)
        if load_state_dict is not None and state_dict is not None:
            self.register_state_dict_fn("default", load_state_dict, state_dict)
        self._pg = pg
        self._former = Former(
            group=self._group,
            pg=pg,
            transport=self._transport,
            options=options,
            ledger=self.ledger,
            log=self._log,
            collect_state=lambda: self._state.collect(self.state_dict),
        )
        self._listeners = StepListeners(self._former.compare)
        self._progress = Progress(fresh=init_sync)
        communicator = Communicator(pg, timeout=options.timeout, check_finite=check_finite)
        closer = Closer(
            group=self._group,
            communicator=communicator,
            options=options,
            ledger=self.ledger,
            log=self._log,
            progress=self._progress,
            load_staged=lambda transaction: self._loader.load(transaction),
            leave=self._leave,
            withdraw=self._former.withdraw,
            bytes_offered=self._former.bytes_offered,
        )
        self._steps = OpenSteps(Means(communicator, closer, options.timeout))
        self._loader = Loader(
            state=self._state,
            progress=self._progress,
            load_progress=self.load_state_dict,
            healing=self._steps.healing,
            leave=self._leave,
            ledger=self.ledger,
            log=self._log,
        )
        self._executor = Background("torchft_quorum")
        self._forming: ThreadFuture[None] | None = None
        self._shut_down = False
        # Names that scripts written for existing versions read.
        self._use_async_quorum = use_async_quorum
        self._replica_world_size_mode = world_size_mode
        self._init_sync = init_sync
        self._max_retries = max_retries
        self._quorum_retries = quorum_retries
        self._replica_id = self._group.name
        if settings.under_torchrun():
            watch_parent()

    # ------------------------------------------------------------------ what is healed

    def register_state_dict_fn(
        self,
        key: str,
        load_state_dict: Callable[[Any], None],
        state_dict: Callable[[], Any],
    ) -> None:
        """Add state that a healing group needs. It is loaded in the order of registration."""
        self._state.register(key, load_state_dict, state_dict)

    def set_state_dict_fns(
        self, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None:
        """Register state under the name `default`. Deprecated: use `register_state_dict_fn`."""
        self.register_state_dict_fn("set_state_dict_fns", load_state_dict, state_dict)

    def offer_copies(self) -> None:
        """From now on donors copy their state first: training goes on while a step is open."""
        self._state.copies = True

    def describe_model(self, key: str, tensors: list[tuple[str, torch.Tensor]]) -> None:
        """Have `tensors` (names, shapes, dtypes) compared with the other groups before averages."""
        self._former.description[key] = describe(tensors)

    def describe_setting(self, name: str, value: str) -> None:
        """Have a setting compared with the other groups before averages, e.g. the codec."""
        self._former.description[name] = value

    def add_step_listener(self, listener: StepListener) -> None:
        """Call `listener` when a step begins and before it is voted on, while others hold it."""
        self._listeners.add(listener)

    def allow_state_dict_read(self) -> None:
        """The parameters are whole again: donors may read them."""
        self._state.allow_read()

    def disallow_state_dict_read(self) -> None:
        """Parameters are about to change. TimeoutError when readers hold on beyond `timeout`."""
        self._state.disallow_read()

    def state_dict(self) -> dict[str, int]:
        """To be saved with a checkpoint of the model: `step` and `batches_committed`."""
        return self._progress.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a checkpoint of the model."""
        self._progress.load_state_dict(state_dict)

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
        if (
            place is Place.BEFORE
            and self.is_step_open()
            and self._begun("start_quorum").expect_begin()
        ):
            return
        timeout = timeout or self._options.quorum_timeout
        wait = place is Place.AFTER if wait is None else wait
        self._begin(self._request(place, timeout, allow_heal, shrink_only), wait=wait)

    def _request(
        self,
        place: Place,
        timeout: timedelta,
        allow_heal: bool = True,
        shrink_only: bool = False,
        *,
        settling: bool = False,
    ) -> Request:
        """A request for a quorum, from where this rank stands."""
        return Request(
            place=place,
            step=self._progress.step,
            fresh=self._progress.fresh,
            commit_failures=self._progress.commit_failures,
            allow_heal=allow_heal,
            shrink_only=shrink_only,
            settling=settling,
            timeout=timeout,
        )

    def _begin(self, request: Request, *, wait: bool) -> None:
        if self._forming is not None:
            self._forming.result()
        if self._phase is Phase.OPEN:
            self._drop(self._begun("start_quorum").transaction)
        follow(self._phase, Phase.OPEN)
        self._listeners.before_step()
        if not self._steps.are_open():  # what is open is waited for where the state is read
            check, has_committed = self._transport.check_state, self._progress.has_committed
            self._state.verify(check, has_committed=has_committed)
        transaction = Transaction(self.ledger, self._failed)
        self._steps.begin(transaction)
        form = partial(self._former.form, transaction, request, self._steps.before_heals)
        if self._options.sync or wait or self._progress.fresh:
            form()
            self.wait_quorum()
            if request.place is Place.AFTER:
                self._begun("heal").heal()
            else:
                self._loader.load(transaction)
        else:
            self._forming = self._executor.submit(form)

    def _drop(self, transaction: Transaction) -> None:
        """A step was begun and not voted on: free whoever waits for this group in it."""
        if transaction.failure is None and len(transaction.wait_formed().members) > 1:
            transaction.report(PhaseError("the step is begun anew before it was voted on"))
            self._former.withdraw(transaction)

    @property
    def _phase(self) -> Phase:
        return Phase.CLOSED if self._shut_down else self._steps.phase

    def begin_in_forward(self) -> None:
        """Begin a step, if none is open, for a forward pass that may come before `start_quorum`,
        which then goes on with it."""
        if not self.is_step_open():
            self.start_quorum()
            self._begun("begin_in_forward").begun_early = True

    def is_step_open(self) -> bool:
        """Whether a step was begun and is not voted on yet."""
        return self._phase is Phase.OPEN

    def needs_new_step(self) -> bool:
        """Whether no step is open, or only one that failed or in which something was sent."""
        return not (self.is_step_open() and self._begun("needs_new_step").untouched)

    def refuse_unaveraged(self, param_groups: Sequence[dict[str, Any]]) -> None:
        """Raises SettingsError if an optimizer holds a gradient that nobody averages."""
        step = self._begun("refuse_unaveraged")
        self._listeners.refuse_unaveraged(param_groups, step.transaction)

    def voted_step(self) -> OpenStep | None:
        """The step that was voted on last; None before there is one, and while one is open."""
        return None if self.is_step_open() else self._steps.last

    def take_step(self) -> OpenStep:
        """The step that was begun last, to be closed by the caller: others can begin before that.

        Without `start_quorum` before it, AssertionError.
        """
        return self._steps.take()

    def take_over(self, **carried: Any) -> OpenStep:
        """While a heal is loaded: a step that the donor has open, by its `OpenStep.carried`."""
        return self._steps.take_over(Transaction(self.ledger, self._failed), **carried)

    def in_background(self, call: Callable[[], T]) -> ThreadFuture[T]:
        """Run `call` when the quorum has formed that was begun last, and what was given earlier."""
        return self._executor.submit(call)

    def wait_quorum(self) -> None:
        """Wait until the quorum stands and this group can communicate; raises why it does not."""
        self._begun("wait_quorum").transaction.wait_formed()

    def _leave(self, transaction: Transaction, error: Exception) -> None:
        """Leave the job: free the peers of this step, and tell this group's other ranks why."""
        transaction.report(error)
        self._group.end(f"{type(error).__name__}: {error}")
        self.shutdown(wait=False)

    # ------------------------------------------------------------------ communicate

    def allreduce(
        self,
        tensor: torch.Tensor,
        should_quantize: bool | str | Codec = False,
        reduce_op: ReduceOp.RedOpType = ReduceOp.AVG,
        *,
        unsaid: torch.Tensor | None = None,
        name: Name | None = None,
    ) -> Work:
        """Reduce `tensor` over the counted groups, in place; AVG divides by their number.

        A group that is not counted sends zeros. After an error of this step the tensor stays as it
        is. Errors discard the step; only a quorum that never formed is raised.

        `should_quantize` makes what travels smaller: True means int8, or fp8 on CUDA devices from
        capability 9.0 on; a name, or a codec, that one. All groups must mean the same: where their
        devices differ, name it, and `describe_setting` has them compare it. Half of the work is
        done by who waits: wait for these in the order in which you began them. `unsaid`, fp32 or
        fp64, holds what `tensor` should say, and afterwards what did not arrive of that: see
        `torchft.quantization.ErrorFeedback`.

        NaN or infinity in an average or a sum discards the step in all groups alike, with a
        NotFiniteError that calls the tensor by `name`, which may be a function from the tensor to
        its parts by name. Not in a maximum or a minimum, nor with `check_finite=False`.

        Raises:
            ValueError: AVG of a tensor that is neither floating-point nor complex; a sparse tensor;
                a codec that does not exist, or cannot hold the tensor's dtype.
            NotImplementedError: quantised, and neither SUM nor AVG.
        """
        return self._begun("allreduce").allreduce(
            tensor, should_quantize, reduce_op, unsaid=unsaid, name=name
        )

    def ordered_mean(self, tensor: torch.Tensor) -> Work:
        """Average `tensor` over the counted groups, in place, added in the order of their ids.

        As `allreduce`, but with bits that depend on nothing else. Half of the work is done by who
        waits: wait for these in the order in which you began them.
        """
        return self._begun("ordered_mean").ordered_mean(tensor)

    def allgather(self, tensor: torch.Tensor) -> tuple[Work, list[torch.Tensor]]:
        """Gather `tensor` from the counted groups: the work, and their tensors in counted order.

        After an error of this step, what is gathered is this group's own tensor.
        """
        return self._begun("allgather").allgather(tensor)

    def report_error(self, e: Exception) -> None:
        """Discard the step that runs now, because of `e`."""
        self._begun("report_error").report_error(e)

    def errored(self) -> ExceptionWithTraceback | None:
        """The error of the step that runs now."""
        return self._steps.last.errored() if self._steps.last else None

    def wrap_future(
        self, fut: Future[T], default: T, timeout: timedelta | None = None
    ) -> Future[T]:
        """`fut`, with a deadline; a failure is reported and completes with `default` instead."""
        return self._begun("wrap_future").wrap_future(fut, default, timeout)

    def _begun(self, what: str) -> OpenStep:
        assert self._steps.last is not None, f"call start_quorum before {what}"
        return self._steps.last

    def _failed(self, transaction: Transaction) -> None:
        """An error of a step that runs: free the peers that wait for us in it."""
        if not self._steps.are_running(transaction):
            return
        if (error := transaction.untold()) is not None:
            self._log.error(self._progress.step, error)
        if transaction.broken:
            self._former.abandon(transaction)

    # ------------------------------------------------------------------ vote

    def should_commit(self, timeout: timedelta | None = None) -> bool:
        """Vote, once per step, on every rank. True: apply the step. False: discard it.

        Raises:
            PhaseError: no step is open.
            TimeoutError: a rank of this group does not vote in `timeout` (`torchft.timeouts`).
            DiscardedTooOften: more discarded steps in a row than `max_retries`.
        """
        follow(self._phase, Phase.VOTING)
        step = self._begun("should_commit")
        self._listeners.before_vote(step.transaction)
        return step.should_commit(timeout)

    def fall_behind(self) -> None:
        """The step that was just committed could not be applied here: heal it from the others."""
        self._begun("fall_behind").fall_behind()

    def is_opening(self) -> bool:
        """Whether every group of this quorum is new, so that nobody has anything to contribute."""
        return self._begun("is_opening").plan.opening

    def close_opening(self) -> bool:
        """End a round in which nobody had anything to contribute: equal state, no step.

        False when a rank of this group failed to heal: open again.
        """
        follow(self._phase, Phase.VOTING)
        return self._begun("close_opening").close_opening()

    def settle(self, timeout: timedelta | None = None) -> bool:
        """End a run: meet the others once more, so that whoever missed the last step heals.

        Call it after the last step, in every group. A group that still trains then heals in its
        next step, which is discarded. `timeout` is that of a quorum. False when the others did not
        come, which is logged: then this group may be the only one at its step.
        """
        until = time.monotonic() + (timeout or self._options.quorum_timeout).total_seconds()
        settled = self._steps.last is not None and self._steps.last.settled
        while not settled and time.monotonic() < until:
            left = timedelta(seconds=until - time.monotonic())
            with self.ledger.spending(Bucket.SETTLE):
                try:
                    settled = self._settle_once(left)
                except (TimeoutError, QuorumError) as error:
                    self._log.say(logging.WARNING, self._progress.step, "not settled: %s", error)
                    break
        return settled

    def _settle_once(self, timeout: timedelta) -> bool:
        self._begin(self._request(Place.AFTER, timeout, settling=True), wait=True)
        return self.close_opening()

    # ------------------------------------------------------------------ who, where

    def current_step(self) -> int:
        """The last committed step, from 0."""
        return self._progress.step

    def num_skipped(self) -> int:
        """How many steps in a row, up to the last one, were discarded for NaN or infinity alone."""
        return self._progress.skipped

    def batches_committed(self) -> int:
        """How many groups' batches the committed steps hold."""
        return self._progress.batches_committed

    def has_met(self) -> bool:
        """Whether this process has begun from the others' state, or they from its."""
        return self._steps.last is not None and not self._progress.fresh

    def num_participants(self) -> int:
        """How many groups are counted in this step; waits for the quorum. 0 before the first."""
        return 0 if self._steps.last is None else len(self._steps.last.plan.counted)

    def participating_rank(self) -> int | None:
        """This group's position among the counted; waits for the quorum. None: it is not."""
        return None if self._steps.last is None else self._steps.last.plan.participating_rank

    def is_participating(self) -> bool:
        """Whether this group is counted in this step, as far as is known; does not wait."""
        plan = self._steps.last.transaction.plan if self._steps.last else None
        return plan is not None and plan.participates

    def note(self, **extra: Any) -> None:
        """Add values that JSON can hold, such as a loss, to the next step record to be written."""
        self._log.note(extra)

    def shutdown(self, wait: bool = True) -> None:
        """Free the server, the transport and the threads. Calling it again does nothing."""
        if self._phase is Phase.CLOSED:
            return
        self._shut_down = True
        self._former.stop_waiting()
        # The server first: a quorum that is still waited for then ends at once.
        self._group.leave()
        self._steps.give_up(PhaseError("the manager was shut down while the step was open"))
        self._transport.shutdown(wait=wait)
        self._executor.shutdown(wait=wait)
        self._pg.shutdown()
        self._log.close()
