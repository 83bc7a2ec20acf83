"""The server without its network: rounds, shared weights, journal and checkpoints, put together.

Everything here runs on one event loop; what takes long (checking numbers, outer steps, files) runs
in threads. Outer steps and checkpoints are taken in the order in which they were decided, so a
checkpoint has all that was decided before it.

An order that matters: an event is decided, written to the journal, then applied and followed up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchft.parameter_server.core.chunks import ChunkError
from torchft.parameter_server.core.events import (
    Event,
    MemberLeft,
    OptimizerChanged,
    RoundClosed,
    WorkersExpected,
)
from torchft.parameter_server.core.options import OuterOptions, ServerOptions
from torchft.parameter_server.core.refused import Conflict, Gone, NotFound, NotReady, Unfit
from torchft.parameter_server.core.requests import Registration, SubmissionOffer, WorkerSession
from torchft.parameter_server.core.rounds import Taken
from torchft.parameter_server.core.rules import Departure, Refusal
from torchft.parameter_server.core.submission import Submission
from torchft.parameter_server.core.weight_update import WeightUpdate
from torchft.parameter_server.server.directory_lock import DirectoryLock
from torchft.parameter_server.server.first_weights import FirstWeights
from torchft.parameter_server.server.history import Counts, History
from torchft.parameter_server.server.run_factory import RunFactory
from torchft.parameter_server.server.state_records import StateRecorder
from torchft.parameter_server.server.storage import Storage
from torchft.parameter_server.server.training_run import TrainingRun
from torchft.parameter_server.server.upload import Upload, UploadTable
from torchft.parameter_server.server.work_queue import WorkQueue

__all__ = ["Counts", "ServerState"]

logger = logging.getLogger(__name__)

_PAST_S = 1e-3
"""A window has ended when its last moment is over."""


class ServerState:
    """The state of one server. Call `open` on the loop before all else, `close` at the end."""

    def __init__(self, options: ServerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self._clock = options, clock
        self.counts, self.history = Counts(), History()
        self.run: TrainingRun | None = None
        self.hosts: dict[str, str] = {}
        self._storage = Storage(options)
        self._run_factory = RunFactory(options, self._storage, clock)
        self._uploads = UploadTable(self._storage.create_upload, options.norm_bound)
        self._first = FirstWeights(self._storage.uploads, clock)
        self._work = WorkQueue()
        self._recorder = StateRecorder(self._storage.records, self._work, self._note)
        self._published = asyncio.Event()
        self._saving = False
        self._lock: DirectoryLock | None = None

    # ------------------------------------------------------------------ begin and end

    async def open(self) -> None:
        """Go on from the newest checkpoint and its journal, or begin afresh.

        Raises:
            SettingsError: what is there cannot be gone on from.
            StorageError: files there cannot be read or written.
        """
        await self._work.in_turn(self._run_factory.warm_up)
        try:
            self._lock = DirectoryLock(self.options.output_dir)
            self.run = await self._work.in_turn(self._run_factory.restored)
        except OSError as error:
            raise self._storage.ended("the server could not start", error) from error

    @property
    def failure(self) -> BaseException | None:
        """The error that the server ends with, once there is one."""
        return self._work.failure

    async def close(self, *, save: bool = True) -> None:
        """Finish what was decided, save it, and end the threads.

        Raises:
            StorageError: it could not be saved.
        """
        self._recorder.end()
        await self._work.finish()
        unsaved = self._storage.has_unsaved and self.options.save_every
        try:
            if save and self.failure is None and unsaved:
                await self.save()
        except OSError as error:
            raise self._storage.ended("the last checkpoint was not written", error) from error
        finally:
            self._work.end()
            if self._lock is not None:
                self._lock.release()

    # ------------------------------------------------------------------ what workers ask

    async def register(self, request: Registration) -> dict[str, Any]:
        """Take a process in as a member, and answer with what holds for it.

        Raises:
            MismatchError, SettingsError: its model or its wishes cannot be.
            Conflict: another process has its id.
        """
        run = self.run or await self._begin(request)
        run.shape.check_same(request.shape)
        who = request.who
        is_new = run.rounds.member(who.worker, who.session) is None
        beat_s = min(request.beat_s, self.options.rules.beat_s)  # as it is told below
        events = run.rounds.join(self._clock(), who.worker, who.session, beat_s)
        if isinstance(events, Refusal):
            raise Conflict(f"{who.worker}: {events}; it may register when that one is silent")
        self.hosts[who.worker] = request.hostname
        if is_new:
            self._note(f"worker {who.worker} on {request.hostname} has registered")
        self._carry_out(events)
        return {
            "agreed": asdict(run.agreed),
            "differences": run.agreed.differences(request.wished),
            "model": run.shape.to_json(),
            "beat_s": self.options.rules.beat_s,
            "mode": self.options.rules.mode,
            "sync_every": run.steps_for(who.worker, self.options),
            "send_weights": self._first.are_wanted_of(who, run),
        }

    async def _begin(self, request: Registration) -> TrainingRun:
        run = await self._work.in_turn(self._run_factory.begun, request)
        if self.run is not None:  # another one was first
            return self.run
        self.run = run
        if run.weights_or_none is not None:
            self._first_checkpoint()
        return run

    def beat(self, who: WorkerSession, steps_per_s: float) -> dict[str, Any]:
        """Note a sign of life, and answer with the newest versions.

        Raises:
            Gone: this process is not registered (any more).
        """
        run = self._known()
        refusal = run.rounds.beat(self._clock(), who.worker, who.session, steps_per_s)
        if refusal is not None:
            raise Gone(f"{who.worker}: {refusal}; register again")
        self._carry_out()
        return {"sync_every": run.steps_for(who.worker, self.options), "versions": run.versions}

    def leave(self, who: WorkerSession) -> dict[str, Any]:
        """Take a worker out that goes by itself; what it submitted still counts."""
        if self.run is not None:
            self._carry_out(self.run.rounds.leave(who.worker, who.session))
        return {}

    def offer(self, offer: SubmissionOffer) -> dict[str, Any]:
        """Answer whether the numbers of a submission are wanted, and from which chunk on.

        Raises:
            Gone, NotFound, NotReady, Unfit: they are not, and why.
        """
        run, submission = self._ready(), offer.submission
        if offer.fingerprint != run.shape.fingerprint:
            raise Unfit("the submission is of another model than the one that was registered")
        if self._wanted(run, submission).repeat:
            return {"done": True}
        upload = self._uploads.of(submission, run.weights)
        return {"done": False, "upload": submission.upload, "have": upload.have}

    def upload(self, name: str) -> Upload:
        """The upload of that name, which an offer began.

        Raises:
            NotFound: there is none.
        """
        return self._uploads.named(name)[1]

    async def take_chunk(self, upload: Upload, index: int, data: memoryview) -> None:
        """Check and keep one chunk, and give up an upload that would spoil the weights.

        Raises:
            Refused: it is not taken, and why.
        """
        self.counts.bytes_in += len(data)
        try:
            await self._work.beside(upload.take, index, data)
        except Unfit:
            self.counts.refused += 1
            self._uploads.drop(upload)
            raise

    def finish(self, name: str) -> dict[str, Any]:
        """Count a submission from now on, if all its chunks are here.

        Raises:
            Gone, NotFound, NotReady, Unfit: it is not taken, and why.
            OSError: the journal could not be written; the worker sends it again.
        """
        run = self._ready()
        submission, upload = self._uploads.named(name)
        if not upload.is_complete:
            return {"done": False, "have": upload.have}
        taken = self._wanted(run, submission)
        if taken.repeat:
            run.rounds.members[submission.worker].hear(self._clock())
            self._uploads.done(name)
        else:
            self._carry_out([submission])
            self.counts.late += taken.staleness > 0
        return {"done": True}

    def _wanted(self, run: TrainingRun, submission: Submission) -> Taken:
        verdict = run.rounds.ask(submission)
        if isinstance(verdict, Refusal):
            kinds = {Refusal.NOT_REGISTERED: Gone, Refusal.NO_FRAGMENT: NotFound}
            raise kinds.get(verdict, Unfit)(f"{submission.worker}: {verdict}")
        return verdict

    async def update(
        self, fragment: int, base: int, identity: str, wait_s: float
    ) -> WeightUpdate | None:
        """What has changed of a fragment since version `base`; None: nothing within `wait_s`.

        Raises:
            Gone, NotFound, NotReady: there can be none, and why.
        """
        run = self._ready()
        weights = run.weights
        if not 0 <= fragment < len(run.shape.fragments):
            raise NotFound(f"there is no fragment {fragment}")
        end = self._clock() + wait_s
        while True:
            at, changed = weights.published(fragment), self._published
            if (at.version, at.identity) != (base, identity):
                known = weights.deltas_for(fragment, base, identity)
                if known is not None:
                    return known
                return await self._work.in_turn(weights.update_for, fragment, base, identity)
            left = end - self._clock()
            if left <= 0:
                return None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)

    def update_file(self, name: str) -> Path | None:
        """The file of that name, which an update names, as long as it is kept."""
        path = self._storage.updates / name
        return path if path.is_file() else None

    def reading(self, name: str) -> AbstractContextManager[Path]:
        """A file of an update, which stays as it is within the block.

        Raises:
            Gone, NotReady: there are no weights.
        """
        return self._ready().weights.reading(name)

    def why_open(self, fragment: int) -> str:
        """What the round of a fragment waits for, in words."""
        why, names = self._known().rounds.waiting(self._clock(), fragment)
        return f"{why}: {', '.join(names)}" if names else str(why or "")

    # ------------------------------------------------------------------ the first weights

    def initial(self, who: WorkerSession, fragment: int) -> Upload:
        """The upload that takes a fragment of the first weights.

        Raises:
            Gone, NotFound, NotReady: they are not wanted, and why.
        """
        return self._first.upload(who, fragment, self._known())

    async def finish_initial(self) -> dict[str, Any]:
        """Begin the run with the first weights, if their last fragment is here."""
        run = self._known()
        if run.weights_or_none is None and self._first.are_complete:
            rows = self._first.rows
            weights = await self._work.in_turn(lambda: self._run_factory.weights(run, rows()))
            if run.weights_or_none is None:  # the same weights may have come twice
                run.weights_or_none = weights
                self._first.drop()
                self._first_checkpoint()
        return {"done": run.weights_or_none is not None}

    def _first_checkpoint(self) -> None:
        """So that a journal has something to begin from."""
        if self.options.save_every:
            self._work.start(self._save_in_passing())

    # ------------------------------------------------------------------ time and orders

    def tick(self, longest_s: float) -> float:
        """Decide what the time has brought, and return the seconds until the next call is due, at
        most `longest_s`."""
        if self.run is None:
            return longest_s
        now = self._clock()
        with contextlib.suppress(OSError):  # whoever asks is told
            self._carry_out(self.run.rounds.tick(now))
        at = self.run.rounds.next_at(now)
        return longest_s if at is None else min(longest_s, at - now + _PAST_S)

    def kick(self, worker: str) -> bool:
        """Send a worker away; returns whether there was one."""
        events = self._known().rounds.leave(worker, None, Departure.KICKED)
        self._carry_out(events)
        return bool(events)

    def expect(self, workers: int, min_workers: int | None) -> None:
        """Expect another number of workers; `min_workers` None: the fewest stay the same.

        Raises:
            SettingsError: these numbers cannot be.
        """
        least = self._known().rounds.rules.min_workers if min_workers is None else min_workers
        self._carry_out([WorkersExpected.ordered(self.options.rules, workers, least)])

    def update_optimizer(self, lr: float | None, momentum: float | None) -> OuterOptions:
        """Change the outer optimizer for the rounds that close from now on; None: as it was.

        Raises:
            SettingsError: a value cannot be.
            Gone, NotReady: there is no run yet.
        """
        run = self._ready()
        outer = run.outer.changed(lr, momentum)
        self._carry_out([OptimizerChanged(outer.lr, outer.momentum)])
        return outer

    async def save(self) -> Path:
        """Write a checkpoint of all that is decided by now.

        Raises:
            Gone, NotReady: there is nothing to save yet.
            OSError: it cannot be written.
        """
        run = self._ready()
        with self._storage.checkpoint() as number:
            decided = run.decided()
            path = await self._work.in_turn(
                lambda: self._storage.checkpoints.save(number, run.saved(decided), run.model())
            )
        self.counts.checkpoints += 1
        self._note(f"saved {path.name}")
        return path

    # ------------------------------------------------------------------ how

    def _carry_out(self, events: Iterable[Event] = ()) -> None:
        """Write, apply and follow up each event, then each round that closes because of them.

        Raises OSError where the journal has no room for one: it has not happened then.
        """
        run, now = self._known(), self._clock()
        closes = iter(lambda: run.rounds.next_close(now), None)
        for event in itertools.chain(events, closes):
            self._storage.journal.write(event)
            run.apply(now, event)
            self._follow(run, event)

    def _follow(self, run: TrainingRun, event: Event) -> None:
        match event:
            case MemberLeft(worker, why):
                reason = why.name.lower()
                self.counts.departures[reason] = self.counts.departures.get(reason, 0) + 1
                self._uploads.drop_all_of(worker)
                self._note(f"worker {worker} is gone: {why}")
            case Submission():
                self._uploads.done(event.upload)
                self.counts.submissions += 1
            case RoundClosed():
                # At once: a checkpoint that is decided a moment later has to come after it.
                stepped = self._work.in_turn(run.carry_out, event, self._storage.upload)
                self._work.start(self._step(run, event, stepped))
            case OptimizerChanged(lr, momentum):
                # It comes after the steps that are decided already, and before all others.
                self._work.start(self._work.in_turn(run.carry_out, event, self._storage.upload))
                self._note(f"outer lr {lr:g}, momentum {momentum:g} from now on")

    async def _step(
        self, run: TrainingRun, close: RoundClosed, stepped: asyncio.Future[None]
    ) -> None:
        """The outer step of a round. An error here ends the server: its weights are half stepped,
        and the journal has all that is needed to do it again."""
        began = time.perf_counter()
        try:
            await stepped
        except (ChunkError, OSError) as error:
            what = f"version {close.version} of fragment {close.fragment} was not made"
            raise self._storage.ended(what, error) from error
        seconds = time.perf_counter() - began
        self.history.closed(self._clock(), close, seconds)
        self.counts.outer_step_s += seconds
        self.counts.rounds += 1
        self._published.set()
        self._published = asyncio.Event()
        self._storage.spend(close)
        due = self._storage.is_due(len(run.shape.fragments), run.shape.numel)
        if due and not self._saving:
            await self._save_in_passing()
        elif self.options.save_every:
            await self._recorder.record(run.weights, close, seconds)

    async def _save_in_passing(self) -> None:
        self._saving = True
        try:
            await self.save()
        except OSError as error:
            self._note(f"no checkpoint was written, the run goes on: {error}", logging.ERROR)
        finally:
            self._saving = False

    def _known(self) -> TrainingRun:
        if self.run is None:
            raise Gone("no worker has registered yet: register")
        return self.run

    def _ready(self) -> TrainingRun:
        """The run, once it has weights."""
        run = self._known()
        if run.weights_or_none is None:
            raise NotReady("the first worker's weights are still to come")
        return run

    def _note(self, what: str, level: int = logging.INFO) -> None:
        """In the log and on the page."""
        logger.log(level, "%s", what)
        self.history.note(self._clock(), what)
