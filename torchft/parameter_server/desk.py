"""The server without its network: rounds, shared weights, journal and checkpoints, put together.

Everything here runs on one event loop; what takes long (checking numbers, outer steps, files) runs
in two pools of threads. Outer steps and checkpoints share the pool of one thread, so they come in
the order in which they were decided, and a checkpoint has all that was decided before it.

An order that matters: an event is decided, written to the journal, then carried out.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.parameter_server.checkpoints import Checkpoints, load
from torchft.parameter_server.dylu import local_steps
from torchft.parameter_server.initial import InitialWeights
from torchft.parameter_server.intake import Intake, norm_limit
from torchft.parameter_server.journal import Journal, close_of, line_of
from torchft.parameter_server.model_files import read_model, rows_of_model
from torchft.parameter_server.options import Agreed, ServerOptions
from torchft.parameter_server.refused import Conflict, Gone, NotFound, NotReady, Unfit
from torchft.parameter_server.requests import Registration, Speaker, Ticket
from torchft.parameter_server.rounds import Close, Effect, Rounds
from torchft.parameter_server.rounds import Gone as Departed
from torchft.parameter_server.rules import Departure, Refusal
from torchft.parameter_server.shape import ModelShape
from torchft.parameter_server.shared import News, SharedState
from torchft.parameter_server.submission import Submission
from torchft.quantization import codec_of
from torchft.strategies.local import Fragment

__all__ = ["Counts", "Desk", "Run"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_JOURNAL_SIZES = 8
"""A checkpoint is due early when the uploads that are kept take so many times its size."""
_CHECKPOINT_BYTES = 16
"""Of a checkpoint, a parameter, about."""


@dataclass
class Counts:
    """What has happened since the start."""

    rounds: int = 0
    submissions: int = 0
    late: int = 0
    refused: int = 0
    departures: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0
    apply_s: float = 0.0
    checkpoints: int = 0


@dataclass
class Run:
    """What is known once the first worker has registered, or a checkpoint was loaded."""

    agreed: Agreed
    shape: ModelShape
    rounds: Rounds
    state: SharedState | None
    """None: the first weights are still to come."""
    extras: dict[str, Tensor]
    """Tensors of the starting model that nobody trains; they go into checkpoints as they are."""


class Desk:
    """One server's. Call `open` on the loop before all else, `close` at the end."""

    def __init__(self, options: ServerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options, self._clock = options, clock
        self.counts = Counts()
        self.run: Run | None = None
        self.hosts: dict[str, str] = {}
        self.failed: asyncio.Future[None] | None = None
        self._uploads = options.output_dir / "spool" / "uploads"
        self.news_folder = options.output_dir / "spool" / "news"
        self._checkpoints = Checkpoints(
            options.output_dir / "checkpoints", options.save_total_limit
        )
        self._journal = Journal(options.output_dir / "journal")
        self._number = 0
        self._intakes: dict[str, tuple[Ticket, Intake]] = {}
        self._initial: InitialWeights | None = None
        self._spent: list[Path] = []
        self._since_save = 0
        self._applier = ThreadPoolExecutor(1, "outer-step")
        self._checkers = ThreadPoolExecutor(2, "intake")
        self._news = asyncio.Event()
        self._jobs: set[asyncio.Future[Any]] = set()
        self._saving = False

    # ------------------------------------------------------------------ begin and end

    async def open(self) -> None:
        """Go on from the newest checkpoint and its journal, or begin afresh.

        Raises:
            SettingsError: what is there cannot be gone on from.
        """
        self.failed = asyncio.get_running_loop().create_future()
        await self._in(self._applier, self._restore)

    def _restore(self) -> None:
        self._warm_up()
        for folder in (self._uploads, self.news_folder):
            folder.mkdir(parents=True, exist_ok=True)
        for old in self.news_folder.iterdir():
            old.unlink()
        chosen = self.options.from_checkpoint
        saved = load(chosen) if chosen is not None else self._checkpoints.newest()
        if saved is None:
            return
        number, state = saved
        self.run = self._run_of(state)
        self._number = max([number, *(int(p.name.split("-")[1]) for p in self._checkpoints.all())])
        if chosen is None:
            self._redo(number)
            self._number = max(self._number, number)
        else:
            self._number += 1
            self._journal.forget(self._number)
            self._journal.begin(self._number)
        self._delete_orphans()
        logger.info("going on from checkpoint %d at versions %s", number, self._versions())

    def _warm_up(self) -> None:
        """Torch loads much for its first optimizer: no worker should wait for that."""
        outer = self.options.outer.build(self.options.rules)
        outer.bind([Fragment(0, range(1))], [_OneRow([torch.zeros(1, 1)])])

    def _run_of(self, saved: Mapping[str, Any]) -> Run:
        shape = ModelShape.from_json(saved["model"])
        agreed = Agreed(**saved["agreed"])
        rounds = Rounds(self.options.rules, len(shape.fragments))
        rounds.load_state_dict(saved["rounds"], self._clock())
        state = self._state(
            shape,
            agreed,
            [row["weights"] for row in saved["rows"]],
            [row["version"] for row in saved["rows"]],
        )
        try:
            state.load_outer({"rows": saved["rows"]})
        except (KeyError, ValueError) as error:
            raise SettingsError(
                f"the checkpoint is of another outer optimizer ({error}): start with the flags "
                "that it was made with"
            ) from None
        return Run(agreed, shape, rounds, state, saved["extras"])

    def _redo(self, number: int) -> None:
        """What happened after the checkpoint happens again."""
        assert self.run is not None and self.run.state is not None
        rounds, now = self.run.rounds, self._clock()
        self._journal.begin(number)
        for kind, event in self._journal.after(number):
            if kind == "join":
                rounds.redo_join(now, event["worker"], event["session"], event["beat_s"])
            elif kind == "take":
                rounds.redo_take(Submission(**event))
            else:
                close = close_of(event)
                rounds.redo_close(close)
                self.run.state.apply(close, self._upload)
                self._spent += [self._upload(share.submission.upload) for share in close.shares]
                self._since_save += 1

    def _delete_orphans(self) -> None:
        """Uploads that no event names."""
        assert self.run is not None
        pending = [s.upload for one in self.run.rounds.rounds for s in one.pending]
        needed = {*self._spent, *map(self._upload, pending)}
        for path in self._uploads.iterdir():
            if path not in needed:
                path.unlink()

    async def close(self, *, save: bool = True) -> None:
        """Finish what was decided, save it, and end the threads."""
        while self._jobs:
            await asyncio.wait(set(self._jobs))
        healthy = self.failed is not None and not self.failed.done()
        if save and healthy and self._since_save and self.options.save_every:
            await self.save()
        self._applier.shutdown()
        self._checkers.shutdown()

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
        refusal, effects = run.rounds.join(self._clock(), who.worker, who.session, request.beat_s)
        if refusal is not None:
            raise Conflict(f"{who.worker}: {refusal}; it may register when that one is silent")
        self._write("join", worker=who.worker, session=who.session, beat_s=request.beat_s)
        self.hosts[who.worker] = request.hostname
        self._carry_out(effects)
        return {
            "agreed": run.agreed.to_json(),
            "differences": run.agreed.differences(request.wished),
            "model": run.shape.to_json(),
            "beat_s": self.options.rules.beat_s,
            "mode": self.options.rules.mode,
            "sync_every": self._steps_for(who.worker),
            "send_weights": self._wants_weights_of(who),
        }

    async def _begin(self, request: Registration) -> Run:
        """The first worker fixes what the server's settings leave open."""
        agreed = self.options.agree(request.wished)
        shape = request.shape.cut(agreed.fragments)
        rounds = Rounds(self.options.rules, agreed.fragments)
        run = Run(agreed, shape, rounds, None, {})
        folder = self.options.model
        if folder is not None:
            tensors = await self._in(self._applier, read_model, folder)
            run.state = await self._in(
                self._applier,
                lambda: self._state(shape, agreed, rows_of_model(shape, tensors)),
            )
            trained = {parameter.name for parameter in shape.parameters}
            run.extras = {n: tensor for n, tensor in tensors.items() if n not in trained}
        if self.run is not None:  # another one was first, while the files were read
            return self.run
        self.run = run
        if run.state is not None:
            self._first_checkpoint()
        return run

    def beat(self, who: Speaker, steps_per_s: float) -> dict[str, Any]:
        """A sign of life. Raises Gone."""
        run = self._known()
        refusal, effects = run.rounds.beat(self._clock(), who.worker, who.session, steps_per_s)
        if refusal is not None:
            raise Gone(f"{who.worker}: {refusal}; register again")
        self._carry_out(effects)
        return {"sync_every": self._steps_for(who.worker), "versions": self._versions()}

    def leave(self, who: Speaker) -> None:
        """It goes."""
        if self.run is not None:
            self._carry_out(self.run.rounds.leave(self._clock(), who.worker, who.session))

    def ticket(self, ticket: Ticket) -> dict[str, Any]:
        """Whether the numbers are wanted, and from which chunk on.

        Raises:
            Gone, NotFound, Unfit, NotReady
        """
        run, state = self._ready()
        if ticket.fingerprint != run.shape.fingerprint:
            raise Unfit("the submission is of another model than the one that was registered")
        who = ticket.who
        verdict = run.rounds.ask(
            who.worker, who.session, ticket.fragment, ticket.base, ticket.number
        )
        if isinstance(verdict, Refusal):
            raise _refused(who, verdict)
        if verdict.repeat:
            return {"done": True}
        name = _upload_name(ticket)
        if name not in self._intakes:
            self._drop_older(ticket)
            n = run.shape.size(ticket.fragment)
            limit = norm_limit(state.norm(ticket.fragment), n, self.options.norm_bound)
            intake = Intake(self._upload(name), state.chunks(ticket.fragment), limit)
            self._intakes[name] = (ticket, intake)
        return {"done": False, "upload": name, "have": self._intakes[name][1].have}

    def intake(self, upload: str) -> Intake:
        """Raises NotFound."""
        if upload not in self._intakes:
            raise NotFound("there is no such upload: ask for a ticket again")
        return self._intakes[upload][1]

    async def take_chunk(self, intake: Intake, index: int, data: memoryview) -> None:
        """Check and keep one chunk. Raises Refused, Unfit."""
        self.counts.bytes_in += len(data)
        try:
            await self._in(self._checkers, intake.take, index, data)
        except Unfit:
            self.counts.refused += 1
            self._forget(intake)
            raise

    def finish(self, upload: str) -> dict[str, Any]:
        """All chunks are here: the submission counts from now on. Raises as `ticket`."""
        run, _ = self._ready()
        ticket, intake = self._intakes[upload]
        if not intake.is_whole:
            return {"done": False, "have": intake.have}
        who = ticket.who
        submission = Submission(
            *(who.worker, who.session, ticket.fragment, ticket.base, ticket.number),
            *(ticket.steps, ticket.tokens, upload),
        )
        verdict = run.rounds.ask(
            who.worker, who.session, ticket.fragment, ticket.base, ticket.number
        )
        if isinstance(verdict, Refusal):
            raise _refused(who, verdict)
        del self._intakes[upload]
        if not verdict.repeat:
            self._journal_take(submission)
            _, effects = run.rounds.submit(self._clock(), submission)
            self.counts.submissions += 1
            self.counts.late += verdict.staleness > 0
            self._carry_out(effects)
        return {"done": True}

    async def news(self, fragment: int, base: int, identity: str, wait_s: float) -> News | None:
        """What has changed since `base`; None: nothing within `wait_s`.

        Raises:
            NotReady, NotFound
        """
        run, state = self._ready()
        if not 0 <= fragment < len(run.shape.fragments):
            raise NotFound(f"there is no fragment {fragment}")
        end = self._clock() + wait_s
        while True:
            at, changed = state.published(fragment), self._news
            if (at.version, at.identity) != (base, identity):
                known = state.deltas_for(fragment, base, identity)
                return known or await self._in(
                    self._applier, state.news_for, fragment, base, identity
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

    def initial(self, who: Speaker, fragment: int) -> Intake:
        """Where the first weights of a fragment go. Raises NotReady, NotFound."""
        run = self._known()
        if run.state is not None:
            raise NotFound("the run has weights already")
        if self._initial is None or not self._wants_weights_of(who):
            raise NotReady("another worker sends the first weights")
        if not 0 <= fragment < len(run.shape.fragments):
            raise NotFound(f"there is no fragment {fragment}")
        return self._initial.intakes[fragment]

    async def finish_initial(self) -> dict[str, Any]:
        """When the last fragment is here the run has weights."""
        run, initial = self._known(), self._initial
        if run.state is None and initial is not None and initial.is_whole:
            state = await self._in(
                self._applier, lambda: self._state(run.shape, run.agreed, initial.rows())
            )
            if run.state is None:  # the same weights may have come twice
                run.state, self._initial = state, None
                initial.drop()
                self._first_checkpoint()
        return {"done": run.state is not None}

    def _wants_weights_of(self, who: Speaker) -> bool:
        run = self._known()
        if run.state is not None:
            return False
        if self._initial is not None and self._initial.who != who:
            holder = run.rounds.members.get(self._initial.who.worker)
            alive = holder is not None and holder.session == self._initial.who.session
            if alive and holder and not holder.is_silent(self._clock(), self.options.rules):
                return False
            self._initial = None
        if self._initial is None:
            self._initial = InitialWeights(who, run.shape, self._uploads)
        return True

    def _first_checkpoint(self) -> None:
        """So that a journal has something to begin from."""
        if self.options.save_every:
            self._start(self._save_in_passing())

    # ------------------------------------------------------------------ time and orders

    def tick(self) -> None:
        """Time has passed."""
        if self.run is not None:
            self._carry_out(self.run.rounds.tick(self._clock()))

    def kick(self, worker: str) -> bool:
        """Send a worker away; whether there was one."""
        run = self._known()
        there = worker in run.rounds.members
        self._carry_out(run.rounds.leave(self._clock(), worker, None, Departure.KICKED))
        return there

    def expect(self, workers: int, min_workers: int) -> None:
        """Another number of workers. Raises SettingsError."""
        self._carry_out(self._known().rounds.expect(self._clock(), workers, min_workers))

    async def save(self) -> Path:
        """Write a checkpoint of all that is decided by now. Raises OSError."""
        run, state = self._ready()
        number = self._number = self._number + 1
        rounds, spent = run.rounds.state_dict(), self._spent
        self._spent, self._since_save = [], 0
        self._journal.begin(number)

        def write() -> Path:
            saved = {
                "model": run.shape.to_json(),
                "agreed": run.agreed.to_json(),
                "rounds": rounds,
                "extras": run.extras,
                **state.state_dict(),
            }
            return self._checkpoints.save(number, saved, {**run.extras, **_typed(run, state)})

        try:
            path = await self._in(self._applier, write)
        except OSError:
            self._spent = spent + self._spent
            raise
        self._journal.forget(number)
        for upload in spent:
            upload.unlink(missing_ok=True)
        self.counts.checkpoints += 1
        logger.info("saved %s", path)
        return path

    # ------------------------------------------------------------------ how

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Departed):
                why = effect.why.name.lower()
                self.counts.departures[why] = self.counts.departures.get(why, 0) + 1
                logger.info("worker %s is gone: %s", effect.worker, effect.why)
            else:
                if self.options.save_every:
                    self._journal.write("close", line_of(effect))
                self._start(self._step(effect))

    def _start(self, job: Any) -> None:
        task = asyncio.ensure_future(job)
        self._jobs.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Future[Any]) -> None:
        self._jobs.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and self.failed is not None and not self.failed.done():
            self.failed.set_exception(error)

    async def _step(self, close: Close) -> None:
        """The outer step of a round. An error here ends the server: its weights are half stepped,
        and the journal has all that is needed to do it again."""
        _, state = self._ready()
        began = time.perf_counter()
        await self._in(self._applier, state.apply, close, self._upload)
        self.counts.apply_s += time.perf_counter() - began
        self.counts.rounds += 1
        self._since_save += 1
        self._announce()
        done = [self._upload(share.submission.upload) for share in close.shares]
        if not self.options.save_every:
            for path in done:
                path.unlink(missing_ok=True)
            return
        self._spent += done
        if self._save_is_due() and not self._saving:
            await self._save_in_passing()

    async def _save_in_passing(self) -> None:
        self._saving = True
        try:
            await self.save()
        except OSError as error:
            logger.error("no checkpoint was written, the run goes on: %s", error)
        finally:
            self._saving = False

    def _save_is_due(self) -> bool:
        run, state = self._ready()
        kept = sum(state.chunks(0).nbytes for _ in self._spent)
        much = kept > _JOURNAL_SIZES * _CHECKPOINT_BYTES * run.shape.numel
        return much or self._since_save >= self.options.save_every * len(run.shape.fragments)

    def _announce(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _state(
        self, shape: ModelShape, agreed: Agreed, rows: list[Tensor], at: list[int] | None = None
    ) -> SharedState:
        outer = self.options.outer.build(self.options.rules)
        return SharedState(shape, codec_of(agreed.codec), outer, rows, self.news_folder, at)

    def _write(self, kind: str, **event: Any) -> None:
        if self.options.save_every:
            self._journal.write(kind, event)

    def _journal_take(self, submission: Submission) -> None:
        self._write("take", **submission.state_dict())

    def _known(self) -> Run:
        if self.run is None:
            raise Gone("no worker has registered yet: register")
        return self.run

    def _ready(self) -> tuple[Run, SharedState]:
        run = self._known()
        if run.state is None:
            raise NotReady("the first worker's weights are still to come")
        return run, run.state

    def _versions(self) -> list[int]:
        return [] if self.run is None else [one.version for one in self.run.rounds.rounds]

    def _steps_for(self, worker: str) -> int:
        run = self._known()
        if not self.options.dylu:
            return run.agreed.sync_every
        base = self.options.dylu_base_sync_every or run.agreed.sync_every
        speeds = {name: member.steps_per_s for name, member in run.rounds.members.items()}
        return local_steps(base, speeds, worker)

    def _upload(self, name: str) -> Path:
        return self._uploads / f"{name}.row"

    def _drop_older(self, ticket: Ticket) -> None:
        """One upload a worker and fragment."""
        for name, (other, intake) in list(self._intakes.items()):
            same = other.who.worker == ticket.who.worker and other.fragment == ticket.fragment
            if same:
                intake.drop()
                del self._intakes[name]

    def _forget(self, intake: Intake) -> None:
        for name, (_, other) in list(self._intakes.items()):
            if other is intake:
                intake.drop()
                del self._intakes[name]

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *args)


@dataclass(frozen=True)
class _OneRow:
    flats: list[Tensor]


def _refused(who: Speaker, refusal: Refusal) -> Exception:
    kind = {Refusal.NOT_REGISTERED: Gone, Refusal.NO_FRAGMENT: NotFound}.get(refusal, Unfit)
    return kind(f"{who.worker}: {refusal}")


def _upload_name(ticket: Ticket) -> str:
    parts = (ticket.who.worker, ticket.who.session, ticket.fragment, ticket.number)
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:32]


def _typed(run: Run, state: SharedState) -> dict[str, Tensor]:
    """The weights in the model's own dtypes."""
    kinds = {p.name: getattr(torch, p.dtype) for p in run.shape.parameters}
    return {name: tensor.to(kinds[name]) for name, tensor in state.weights().items()}
