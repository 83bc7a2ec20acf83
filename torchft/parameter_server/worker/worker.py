"""A training loop as a worker of the parameter server, in three lines.

    with DiLoCoWorker(model, optimizer, "gpu-1:8512") as worker:
        for batch in data:
            train(batch)          # worker counts the optimizer's steps

At a slot of the schedule the newest update is applied, then the next fragment is submitted. With
`in_flight` 0 training waits for the round; else it goes on, and the steps taken meanwhile are kept.
A server that cannot be reached stops nobody: steps go on and are part of the next submission. At
the end the last steps are submitted, and the weights become the newest common ones.

Under DDP and FSDP2 every rank makes a worker, with the same settings, and together they are one:
all count steps, the first rank speaks with the server, and updates are written at all of them after
the same step. `start`, `stop` and `force_sync` are then for all ranks together.

Without a server's address nothing is done. (DiLoCo: arXiv 2311.08105, Streaming: 2501.18512.)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import PhaseError
from torchft.parameter_server.core.options import SharedSettings
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.worker.connection import ServerConnection
from torchft.parameter_server.worker.download_cache import DownloadedUpdate
from torchft.parameter_server.worker.options import WorkerOptions
from torchft.parameter_server.worker.ranks import Ranks
from torchft.parameter_server.worker.sharded import named_parameters, unwrapped
from torchft.parameter_server.worker.submissions import PendingSubmission, Submissions
from torchft.parameter_server.worker.weights import WorkerWeights
from torchft.quantization import codec_of
from torchft.step_hooks import StepHooks, check_optimizer, check_trains
from torchft.strategies.parts.broken import begin_anew, states_of
from torchft.strategies.rounds_schedule import RoundSchedule
from torchft.strategies.trained import TrainedModel
from torchft.uncopied import Uncopied

__all__ = ["DiLoCoWorker"]

logger = logging.getLogger(__name__)

_SLICE_S = 0.05
_END_S = 30.0
"""How long `stop` waits for the last submissions to be sent, and again for their round."""
_APART = 4
"""The other ranks wait this many times as long for the first one as it waits for a round."""


class DiLoCoWorker(Uncopied):
    """Synchronises `model` with the server while `optimizer` steps.

    Args:
        server: `host:port`; None: what `DILOCO_SERVER` says; empty: do nothing.
        tokens: how many tokens the next step trains on, asked after every step; the weight of this
            worker's work in decoupled rounds. None: every step counts as one. In a group each rank
            says its own.
        process_group: the ranks that train this model together; None: all that there are.
        options: the fields of `WorkerOptions`. Those not given come from `DILOCO_*` variables.

    Raises:
        SettingsError: if an option is out of its range, the model cannot be synchronised, or the
            optimizer is of another model.
        PhaseError: at the first training step before `start`.
        MismatchError: at a step, when other parameters are trained than at the beginning, or one
            has been frozen for a whole cycle.
    """

    copy_instead = "save the model's state, and make a worker in each process"

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        server: str | None = None,
        *,
        tokens: Callable[[], int] | None = None,
        process_group: torch.distributed.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        self.options = WorkerOptions.resolve(server=server, **options)
        self.active = bool(self.options.server)
        self.sync_count = self.local_step = self.refused = 0
        self.sync_time_s = self.last_sync_time_s = 0.0
        self.last_send_bytes = self.last_receive_bytes = 0
        self._tokens = tokens
        self._started = False
        if not self.active:
            return
        self.worker_id = self.options.named()
        self._ranks = Ranks.of(process_group, _APART * self.options.timeout_s)
        parameters = named_parameters(model, self._ranks)
        check_optimizer("optimizer", optimizer)
        check_trains(list(parameters), list(parameters.values()), optimizer)
        shape = ModelShape.of(parameters.items())
        self._weights = WorkerWeights(parameters, shape, self._ranks)
        self._submissions = Submissions()
        self._fresh = 0
        self._began: float | None = None
        self._rate = 0.0
        self._together(lambda: self._make_connection(shape))
        self._model = TrainedModel([unwrapped(model)], optimizer, front="DiLoCoWorker")
        # From now on, so that training before `start` is noticed.
        self._optimizer = optimizer
        self._hooks = StepHooks(optimizer, before=self._before_step, after=self._after_step)
        self._hooks.attach()

    # ------------------------------------------------------------------ begin and end

    def __enter__(self) -> DiLoCoWorker:
        return self.start()

    def __exit__(self, kind: object, *raised: object) -> None:
        self.stop(submit=kind is None)

    def start(self) -> DiLoCoWorker:
        """Register and take the common weights over; the first worker's are the common ones.

        Raises:
            UnreachableError: if the server cannot be reached within `timeout_s`.
            Refused: if the server does not take this worker.
            MismatchError: if the server has another model.
        """
        if not self.active or self._started:
            return self
        self._together(self._begin)
        self._hooks.attach()
        self._started = True
        return self

    def stop(self, *, submit: bool = True) -> None:
        """Submit the last steps, take the newest common weights, deregister. Harmless to repeat.

        Raises:
            PhaseError: if gradients were computed, and no step of the optimizer was seen.
        """
        if not self.active or not self._started:
            return
        self._hooks.detach()
        self._started = False
        try:
            if submit:
                self._hooks.watch.check_any()
                self._together(self._finish)
                self._ranks.close()
        finally:
            if self._ranks.leads:
                self._connection.stop()

    def force_sync(self) -> None:
        """Synchronise now: submit the fragment that is due, and wait for its round."""
        if self.active and self._started:
            self._together(lambda: self._slot(wait=True))
            self._hooks.watch.forget()

    # ------------------------------------------------------------------ while training

    @property
    def version(self) -> int:
        """How many outer steps these weights have had: the fewest of all fragments. Only the first
        of several ranks knows it."""
        return self._submissions.version if self.active else 0

    @property
    def sync_every(self) -> int:
        """How many inner steps a cycle has now; in each cycle every fragment is submitted once."""
        return (
            self._schedule.sync_every if self.active and self._started else self.options.sync_every
        )

    @property
    def bases(self) -> dict[int, Tensor]:
        """Fragment → what this worker and the server hold alike, fp32 `[1, n]`: not a copy."""
        return self._weights.bases

    def metrics(self) -> dict[str, float]:
        """Counts, seconds and megabytes of the synchronisation, by name, for logs."""
        if not self.active:
            return {}
        return {
            "diloco/sync_count": self.sync_count,
            "diloco/local_step": self.local_step,
            "diloco/last_sync_time": self.last_sync_time_s,
            "diloco/total_sync_time": self.sync_time_s,
            "diloco/last_send_mb": self.last_send_bytes / 1e6,
            "diloco/last_recv_mb": self.last_receive_bytes / 1e6,
            "diloco/steps_per_second": self._rate,
            "diloco/sync_every": self.sync_every,
            "diloco/reconnections": self._connection.reconnections if self._ranks.leads else 0,
            "diloco/in_flight": len(self._submissions.pending),
        }

    def _before_step(self) -> None:
        if self._started:
            self._model.check(self.sync_every)
        elif self._hooks.watch.saw_backward:
            raise PhaseError(
                "this DiLoCoWorker was made and not started, so nothing would be submitted: write "
                "`with DiLoCoWorker(…):` around the training loop, or call start()"
            )

    def _after_step(self) -> None:
        if not self._started:
            return
        now = time.monotonic()
        if self._began is not None and now > self._began:
            seen = 1 / (now - self._began)
            self._rate = seen if not self._rate else self._rate + (seen - self._rate) / 10
        self.local_step += 1
        self._fresh += 1 if self._tokens is None else max(1, int(self._tokens()))
        self._submissions.count(steps=1)
        if self._schedule.advance():
            self._together(lambda: self._slot(wait=self._in_flight == 0))
        self._began = time.monotonic()

    def _slot(self, *, wait: bool) -> None:
        if self._connection.fault is not None:
            raise self._connection.fault
        began = time.monotonic()
        self._count_tokens()
        if self.options.dylu and self._connection.recommended:
            self._ranks.say("every", self._connection.recommended)
            self._schedule.change(self._connection.recommended)
        pending = self._submissions.pending
        if len(pending) >= max(1, self._in_flight):
            self._wait_for(next(iter(pending.values())))
        self._land()
        if len(pending) < max(1, self._in_flight):
            submission = self._submit()
            if wait and submission is not None:
                self._wait_for(submission)
                self._land()
        self.last_sync_time_s = time.monotonic() - began
        self.sync_time_s += self.last_sync_time_s
        self._ranks.say("counts", self.sync_count, self.refused)

    # ------------------------------------------------------------------ how

    def _together(self, lead: Callable[[], None]) -> None:
        self._ranks.together(
            lead,
            {
                "agreed": self._agree,
                "anew": self._begin_anew,
                "counts": self._take_counts,
                "every": lambda steps: self._schedule.change(steps),
                "read": self._weights.read_along,
                "tokens": self._count_tokens,
                "write": self._weights.write_along,
            },
        )

    def _agree(self, agreed: dict[str, Any], model: dict[str, Any]) -> None:
        """Take over the server's settings, at every rank."""
        settings = SharedSettings(**agreed)
        self._weights.shape = ModelShape.from_json(model)
        self._codec = codec_of(settings.codec)
        self._schedule = RoundSchedule(settings.sync_every, settings.fragments)
        default = 0 if settings.fragments == 1 else 1
        self._in_flight = default if self.options.in_flight is None else self.options.in_flight

    def _take_counts(self, sync_count: int, refused: int) -> None:
        self.sync_count, self.refused = sync_count, refused

    def _count_tokens(self) -> None:
        """Sum up what all ranks trained since the last slot. Without counts each step is one."""
        if self._tokens is not None and self._ranks.leads:
            self._ranks.say("tokens")
        if self._tokens is not None or not self._ranks.leads:
            self._fresh = self._ranks.total(self._fresh)
        self._submissions.count(tokens=self._fresh)
        self._fresh = 0

    def _make_connection(self, shape: ModelShape) -> None:
        self._connection = ServerConnection(
            self.options, self.worker_id, shape, self._row, lambda: self._rate
        )

    def _row(self, fragment: int) -> Tensor:
        """What a server without weights gets: the base, or else these weights, the first ones."""
        if fragment in self._weights.bases:
            return self._weights.bases[fragment]
        self._hear_agreed()
        return self._weights.row(fragment)

    def _hear_agreed(self) -> None:
        agreed, model = asdict(self._connection.agreed), self._connection.shape.to_json()
        self._ranks.say("agreed", agreed, model)
        self._agree(agreed, model)

    def _begin(self) -> None:
        try:
            self._connection.connect()
            self._hear_agreed()
            self._take_over()
        except BaseException:
            self._connection.stop()
            raise
        self._connection.start()

    def _take_over(self) -> None:
        versions = []
        for fragment in self._weights.shape.fragments:
            update = self._fetch(fragment.index)
            update.drop()
            versions.append(update.version)
        self._submissions.begin(versions)

    def _fetch(self, fragment: int, beyond: Tensor | None = None) -> DownloadedUpdate:
        """Set a fragment to the newest common weights, and add `beyond` where it is given."""
        update = self._connection.fetch(fragment)
        self._weights.load(fragment, update.files, self._codec)
        self._weights.restore(fragment, beyond)
        return update

    def _submit(self) -> PendingSubmission | None:
        submission = self._submissions.submit(self._weights, self._codec)
        if submission is not None:
            self.last_send_bytes = submission.nbytes
            self._connection.launch(submission)
        return submission

    def _wait_for(self, submission: PendingSubmission) -> None:
        """Wait until its update is here, the server cannot be reached, or `timeout_s` is over."""
        end = time.monotonic() + self.options.timeout_s
        while not submission.over.wait(_SLICE_S):
            if self._connection.down.is_set():
                return
            if time.monotonic() > end:
                logger.warning(
                    "the round of fragment %d is still open after %g s: training goes on and the "
                    "submission stays open; see `diloco status` for what it waits for",
                    submission.fragment,
                    self.options.timeout_s,
                )
                return

    def _land(self) -> None:
        for submission in self._submissions.over():
            if self._connection.fault is not None:
                return
            del self._submissions.pending[submission.fragment]
            if submission.refused is not None:
                self._give_up(submission)
            elif submission.update is not None:
                self._apply(submission, submission.update)

    def _apply(self, submission: PendingSubmission, update: DownloadedUpdate) -> None:
        identity = self._weights.apply(
            submission.fragment, submission.chunks, update.files, self._codec, self.options.mix
        )
        if identity != update.identity:
            logger.warning(
                "the base of fragment %d was damaged: fetching all of it", submission.fragment
            )
            kept = self._weights.beyond_base(submission.fragment)
            update.drop()
            update = self._fetch(submission.fragment, kept)
        self.last_receive_bytes = update.nbytes
        update.drop()
        self._submissions.applied(submission, update)
        self.sync_count += 1

    def _give_up(self, submission: PendingSubmission) -> None:
        """Go back to the common weights: what the server refused would spoil these too."""
        logger.error(
            "the server refused the work of %d steps: %s. The weights go back to the last common "
            "ones",
            submission.steps,
            submission.refused,
        )
        self.refused += 1
        self._weights.restore(submission.fragment)
        self._ranks.say("anew")
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Reset the optimizer: NaN in its moments would spoil the weights with the next step."""
        begin_anew(states_of(self._optimizer))

    def _finish(self) -> None:
        """Submit every fragment that was trained, if the server can be reached."""
        if self._connection.fault is not None:
            return
        self._count_tokens()
        end = time.monotonic() + _END_S
        self._until(self._submissions.are_over, end, True)
        self._land()
        while self._submit() is not None:
            pass
        last = list(self._submissions.pending.values())
        sent = self._until(lambda: all(f.is_sent or f.over.is_set() for f in last), end, True)
        if not sent:
            logger.warning("the last steps did not reach the server within %g s", _END_S)
        self._connection.leave()
        self._until(self._submissions.are_over, time.monotonic() + _END_S)
        self._land()
        for fragment in self._weights.bases.keys() - self._submissions.pending.keys():
            self._weights.restore(fragment)
        self._ranks.say("counts", self.sync_count, self.refused)

    def _until(self, done: Callable[[], bool], end: float, through_outages: bool = False) -> bool:
        """Wait in slices; gives up when the time is over, or the server away, which may end."""
        while not done():
            away = self._connection.down.is_set() and not through_outages
            if self._connection.fault is not None or time.monotonic() > end or away:
                return False
            self._connection.pause(_SLICE_S)
        return True
