"""The server without its network: rounds, shared weights, journal and checkpoints, put together.

Everything here runs on one event loop; what takes long (checking numbers, outer steps, files) runs
in threads. Outer steps and checkpoints are taken in the order in which they were decided, so a
checkpoint has all that was decided before it.

An order that matters: an event is decided, written to the journal, then carried out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torchft.parameter_server.core.chunks import ChunkError
from torchft.parameter_server.core.options import OuterOptions, ServerOptions
from torchft.parameter_server.core.refused import Conflict, Gone, NotFound, NotReady, Unfit
from torchft.parameter_server.core.requests import Registration, SubmissionOffer, WorkerSession
from torchft.parameter_server.core.rounds import MemberLeft, RoundClosed, RoundEvent
from torchft.parameter_server.core.rules import Departure, Refusal
from torchft.parameter_server.core.submission import Submission
from torchft.parameter_server.server.directory_lock import DirectoryLock
from torchft.parameter_server.server.first_weights import FirstWeights
from torchft.parameter_server.server.history import Counts, History
from torchft.parameter_server.server.recorder import StateRecorder
from torchft.parameter_server.server.run import RunFactory, TrainingRun
from torchft.parameter_server.server.storage import Storage
from torchft.parameter_server.server.upload import Upload, norm_limit
from torchft.parameter_server.server.upload_table import UploadTable
from torchft.parameter_server.server.weights import Published, ServerWeights, WeightUpdate
from torchft.parameter_server.server.work_queue import WorkQueue

__all__ = ["Counts", "ServerState"]

logger = logging.getLogger(__name__)

_PAST_S = 1e-3
"""A window has ended when its last moment is over."""


class ServerState:
    """One server's. Call `open` on the loop before all else, `close` at the end."""

    def __init__(self, options: ServerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self._clock = options, clock
        self.counts, self.history = Counts(), History()
        self.run: TrainingRun | None = None
        self.hosts: dict[str, str] = {}
        self._storage = Storage(options)
        self._run_factory = RunFactory(options, self._storage, clock)
        self._upload_table = UploadTable()
        self._first = FirstWeights(self._storage.uploads, clock)
        self._work = WorkQueue()
        self._recorder = StateRecorder(self._storage.records, self._work, self._note)
        self._published = asyncio.Event()
        self._saving = False
        self._lock: DirectoryLock | None = None
        self._effects: list[RoundEvent] = []
        """Decided, and not in the journal yet."""

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
        """What the server ends with."""
        return self._work.failure

    @property
    def updates_folder(self) -> Path:
        """Where files of news lie."""
        return self._storage.updates

    def reading(self, name: str) -> AbstractContextManager[Path]:
        """A file of news, which stays as it is within the block. Raises Gone, NotReady."""
        return self._ready()[1].reading(name)

    async def close(self, *, save: bool = True) -> None:
        """Finish what was decided, save it, and end the threads.

        Raises:
            StorageError: it could not be saved.
        """
        self._recorder.end()
        await self._work.finish()
        try:
            if (
                save
                and self.failure is None
                and self._storage.has_unsaved
                and self.options.save_every
            ):
                await self.save()
        except OSError as error:
            raise self._storage.ended("the last checkpoint was not written", error) from error
        finally:
            self._work.end()
            if self._lock is not None:
                self._lock.release()

    # ------------------------------------------------------------------ what workers ask

    async def register(self, request: Registration) -> dict[str, Any]:
        """Take a process in, and say what holds for it.

        Raises:
            MismatchError, SettingsError: its model or its wishes cannot be.
            Conflict: another process has its id.
        """
        run = self.run or await self._begin(request)
        run.shape.check_same(request.shape)
        who = request.who
        known = run.rounds.members.get(who.worker)
        beat_s = min(request.beat_s, self.options.rules.beat_s)  # as it is told below
        refusal, events = run.rounds.join(self._clock(), who.worker, who.session, beat_s)
        if refusal is not None:
            raise Conflict(f"{who.worker}: {refusal}; it may register when that one is silent")
        event = {"worker": who.worker, "session": who.session}
        self._storage.record("join", {**event, "beat_s": beat_s})
        self.hosts[who.worker] = request.hostname
        if known is None or known.session != who.session:
            self._note(f"worker {who.worker} on {request.hostname} has registered")
        self._carry_out(events)
        return {
            "agreed": run.agreed.to_json(),
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
        if run.weights is not None:
            self._first_checkpoint()
        return run

    def beat(self, who: WorkerSession, steps_per_s: float) -> dict[str, Any]:
        """A sign of life. Raises Gone."""
        run = self._known()
        refusal, events = run.rounds.beat(self._clock(), who.worker, who.session, steps_per_s)
        if refusal is not None:
            raise Gone(f"{who.worker}: {refusal}; register again")
        self._carry_out(events)
        return {"sync_every": run.steps_for(who.worker, self.options), "versions": run.versions}

    def leave(self, who: WorkerSession) -> None:
        """It goes."""
        if self.run is not None:
            self._carry_out(self.run.rounds.leave(self._clock(), who.worker, who.session))

    def offer(self, offer: SubmissionOffer) -> dict[str, Any]:
        """Whether the numbers are wanted, and from which chunk on.

        Raises:
            Gone, NotFound, Unfit, NotReady
        """
        run, weights = self._ready()
        if offer.fingerprint != run.shape.fingerprint:
            raise Unfit("the submission is of another model than the one that was registered")
        who = offer.who
        verdict = run.rounds.ask(who.worker, who.session, offer.fragment, offer.base, offer.number)
        if isinstance(verdict, Refusal):
            raise _refused(who, verdict)
        if verdict.repeat:
            return {"done": True}
        upload = self._upload_table.of(offer, lambda: self._new_upload(offer, weights))
        return {"done": False, "upload": offer.upload, "have": upload.have}

    def _new_upload(self, offer: SubmissionOffer, weights: ServerWeights) -> Upload:
        chunks = weights.chunks(offer.fragment)
        limit = norm_limit(weights.norm(offer.fragment), chunks.n, self.options.norm_bound)
        return Upload(self._storage.create_upload(offer.upload), chunks, limit)

    def upload(self, name: str) -> Upload:
        """Raises NotFound."""
        return self._upload_table.named(name)[1]

    async def take_chunk(self, upload: Upload, index: int, data: memoryview) -> None:
        """Check and keep one chunk. Raises Refused, Unfit."""
        self.counts.bytes_in += len(data)
        try:
            await self._work.beside(upload.take, index, data)
        except Unfit:
            self.counts.refused += 1
            self._upload_table.drop(upload)
            raise

    def finish(self, name: str) -> dict[str, Any]:
        """All chunks are here: the submission counts from now on. Raises as `offer`."""
        run, _ = self._ready()
        offer, upload = self._upload_table.named(name)
        if not upload.is_whole:
            return {"done": False, "have": upload.have}
        who = offer.who
        submission = Submission(
            *(who.worker, who.session, offer.fragment, offer.base, offer.number),
            *(offer.steps, offer.tokens, name),
        )
        verdict = run.rounds.ask(who.worker, who.session, offer.fragment, offer.base, offer.number)
        if isinstance(verdict, Refusal):
            raise _refused(who, verdict)
        if not verdict.repeat:
            self._storage.record("take", submission.state_dict())
        self._upload_table.done(name)
        if not verdict.repeat:
            _, events = run.rounds.submit(self._clock(), submission)
            self.counts.submissions += 1
            self.counts.late += verdict.staleness > 0
            self._carry_out(events)
        return {"done": True}

    async def update(
        self, fragment: int, base: int, identity: str, wait_s: float
    ) -> WeightUpdate | None:
        """What has changed since `base`; None: nothing within `wait_s`.

        Raises:
            NotReady, NotFound
        """
        run, weights = self._ready()
        if not 0 <= fragment < len(run.shape.fragments):
            raise NotFound(f"there is no fragment {fragment}")
        end = self._clock() + wait_s
        while True:
            at, changed = weights.published(fragment), self._published
            if (at.version, at.identity) != (base, identity):
                known = weights.deltas_for(fragment, base, identity)
                return known or await self._work.in_turn(
                    weights.update_for, fragment, base, identity
                )
            left = end - self._clock()
            if left <= 0:
                return None
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                return None

    def why_open(self, fragment: int) -> str:
        """What the round of a fragment waits for, in words."""
        why, names = self._known().rounds.waiting(self._clock(), fragment)
        return f"{why}: {', '.join(names)}" if names else str(why or "")

    # ------------------------------------------------------------------ the first weights

    def initial(self, who: WorkerSession, fragment: int) -> Upload:
        """Where the first weights of a fragment go. Raises NotReady, NotFound."""
        return self._first.upload(who, fragment, self._known())

    async def finish_initial(self) -> dict[str, Any]:
        """When the last fragment is here the run has weights."""
        run, initial = self._known(), self._first.sent
        if run.weights is None and initial is not None and initial.is_whole:
            weights = await self._work.in_turn(
                lambda: self._run_factory.weights(run.shape, run.agreed, initial.rows())
            )
            if run.weights is None:  # the same weights may have come twice
                run.weights = weights
                self._first.drop()
                self._first_checkpoint()
        return {"done": run.weights is not None}

    def _first_checkpoint(self) -> None:
        """So that a journal has something to begin from."""
        if self.options.save_every:
            self._work.start(self._save_in_passing())

    # ------------------------------------------------------------------ time and orders

    def tick(self, longest_s: float) -> float:
        """Time has passed. Returns when to say so again: seconds from now, at most `longest_s`."""
        if self.run is None:
            return longest_s
        now = self._clock()
        with contextlib.suppress(OSError):  # whoever asks is told
            self._carry_out(self.run.rounds.tick(now))
        at = self.run.rounds.next_at(now)
        return longest_s if at is None else min(longest_s, at - now + _PAST_S)

    def kick(self, worker: str) -> bool:
        """Send a worker away; whether there was one."""
        run = self._known()
        there = worker in run.rounds.members
        self._carry_out(run.rounds.leave(self._clock(), worker, None, Departure.KICKED))
        return there

    def expect(self, workers: int, min_workers: int | None) -> None:
        """Another number of workers. Raises SettingsError."""
        run = self._known()
        least = run.rounds.rules.min_workers if min_workers is None else min_workers
        order = self.options.rules.order(workers, least)
        self._storage.record("expect", order)
        run.expected = order
        self._carry_out(run.rounds.expect(self._clock(), workers, least))

    def update_optimizer(self, lr: float | None, momentum: float | None) -> OuterOptions:
        """Others for the rounds that close from now on. Raises SettingsError, NotReady."""
        run, weights = self._ready()
        run.outer = run.outer.changed(lr, momentum)
        self._storage.record("optimizer", run.decided_outer)
        # It comes after the steps that are decided already, and before all others.
        settings = run.outer.settings
        self._work.start(self._work.in_turn(lambda: weights.outer.change(**settings)))
        self._note(f"outer lr {run.outer.lr:g}, momentum {run.outer.momentum:g} from now on")
        return run.outer

    async def save(self) -> Path:
        """Write a checkpoint of all that is decided by now. Raises OSError."""
        run, _ = self._ready()
        self._carry_out([])
        number, spent = self._storage.begin()
        decided = run.decided()

        def write() -> Path:
            return self._storage.write(number, run.saved(decided), run.model())

        try:
            path = await self._work.in_turn(write)
        except OSError:
            self._storage.give_up(spent)
            raise
        self._storage.end(number, spent)
        self.counts.checkpoints += 1
        self._note(f"saved {path.name}")
        return path

    # ------------------------------------------------------------------ how

    def _carry_out(self, events: list[RoundEvent]) -> None:
        """With those that the journal had no room for before. Raises OSError: it has none now."""
        self._effects += events
        while self._effects:
            self._storage.record_effect(self._effects[0])
            self._carry_out_one(self._effects.pop(0))

    def _carry_out_one(self, event: RoundEvent) -> None:
        if isinstance(event, MemberLeft):
            why = event.why.name.lower()
            self.counts.departures[why] = self.counts.departures.get(why, 0) + 1
            self._upload_table.drop_all_of(event.worker)
            self._note(f"worker {event.worker} is gone: {event.why}")
        else:
            # At once: a checkpoint that is decided a moment later has to come after it.
            apply = self._ready()[1].apply
            stepped = self._work.in_turn(apply, event, self._storage.upload)
            self._work.start(self._step(event, stepped))

    async def _step(self, close: RoundClosed, applied: asyncio.Future[Published]) -> None:
        """The outer step of a round. An error here ends the server: its weights are half stepped,
        and the journal has all that is needed to do it again."""
        run, _ = self._ready()
        began = time.perf_counter()
        try:
            await applied
        except (ChunkError, OSError) as error:
            what = f"version {close.version} of fragment {close.fragment} was not made"
            raise self._storage.ended(what, error) from error
        self.history.closed(self._clock(), close, time.perf_counter() - began)
        self.counts.apply_s += time.perf_counter() - began
        self.counts.rounds += 1
        self._announce()
        self._storage.spend(close)
        due = self._storage.is_due(len(run.shape.fragments), run.shape.numel)
        if due and not self._saving:
            await self._save_in_passing()
        elif self.options.save_every:
            await self._recorder.record(self._ready()[1], close, time.perf_counter() - began)

    async def _save_in_passing(self) -> None:
        self._saving = True
        try:
            await self.save()
        except OSError as error:
            self._note(f"no checkpoint was written, the run goes on: {error}", logging.ERROR)
        finally:
            self._saving = False

    def _announce(self) -> None:
        self._published.set()
        self._published = asyncio.Event()

    def _known(self) -> TrainingRun:
        if self.run is None:
            raise Gone("no worker has registered yet: register")
        return self.run

    def _ready(self) -> tuple[TrainingRun, ServerWeights]:
        run = self._known()
        if run.weights is None:
            raise NotReady("the first worker's weights are still to come")
        return run, run.weights

    def _note(self, what: str, level: int = logging.INFO) -> None:
        """In the log and on the page."""
        logger.log(level, "%s", what)
        self.history.note(self._clock(), what)


def _refused(who: WorkerSession, refusal: Refusal) -> Exception:
    kind = {Refusal.NOT_REGISTERED: Gone, Refusal.NO_FRAGMENT: NotFound}.get(refusal, Unfit)
    return kind(f"{who.worker}: {refusal}")
