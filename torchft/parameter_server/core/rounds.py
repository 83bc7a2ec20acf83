"""When does a round close, and with whose work? Events and the time go in, decisions come out.

There is no clock, socket, lock or tensor here. Each fragment has a version and one open round;
closing it takes the pending submissions and makes the next version.

    synchronous    every member that is heard and has not passed this round by has submitted
    decoupled      the same, or a quorum has and its grace window is over
    asynchronous   one submission

What holds whatever happens, and is tested by random schedules:

- A submission is counted at most once, however often it is sent.
- Work that comes after its round has closed counts in the next one. Whoever sent it need not wait.
  It opens no grace window: a round of late work alone would be a whole outer step for few samples.
- A round that could close is closed by the event that made it so, or by the first `tick` after it.
- Rounds are ordered by (version, fragment). A member that has submitted to a later round has passed
  the earlier ones by and is not waited for there, so no two workers wait for each other.
- Nobody is waited for who was not a member when the round opened, or who is silent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torchft.parameter_server.core.member import Member
from torchft.parameter_server.core.rules import Departure, Mode, Refusal, Rules, Waiting
from torchft.parameter_server.core.submission import Share, Submission, shares

__all__ = ["MemberLeft", "OpenRound", "RoundClosed", "RoundEvent", "Rounds", "Taken", "Verdict"]

_REMEMBERED = 4096
"""Former sessions whose last numbers are kept, so that a late repeat is not counted again."""


@dataclass(frozen=True)
class RoundClosed:
    """Take the step that makes `version` of `fragment`: Σ weight · delta / divisor."""

    fragment: int
    version: int
    shares: tuple[Share, ...]

    @property
    def divisor(self) -> int:
        """How many submissions there are."""
        return len(self.shares)


@dataclass(frozen=True)
class MemberLeft:
    """`worker` is a member no more."""

    worker: str
    why: Departure


RoundEvent = RoundClosed | MemberLeft


@dataclass(frozen=True)
class Taken:
    """A submission counts; `repeat`: it did already."""

    staleness: int
    repeat: bool = False


Verdict = Taken | Refusal


@dataclass
class OpenRound:
    """The round that will make version + 1 of one fragment."""

    version: int = 0
    expected: set[str] = field(default_factory=set)
    """Who was a member when it opened."""
    pending: list[Submission] = field(default_factory=list)
    quorum_at: float | None = None

    @property
    def submitters(self) -> set[str]:
        """Whose work it has, late work included."""
        return {submission.worker for submission in self.pending}

    @property
    def arrived(self) -> set[str]:
        """Who need not be waited for."""
        return {s.worker for s in self.pending if s.base >= self.version}


class Rounds:
    """The machine. `now` is in seconds of any clock that does not go back."""

    def __init__(self, rules: Rules, fragments: int) -> None:
        self.rules = rules
        self.members: dict[str, Member] = {}
        self.rounds = [OpenRound() for _ in range(fragments)]
        self.started = False
        """As many workers as the run begins with were members once."""
        self._former: dict[tuple[str, str], dict[int, int]] = {}

    # ------------------------------------------------------------------ events

    def join(
        self, now: float, worker: str, session: str, beat_s: float = 0.0
    ) -> tuple[Refusal | None, list[RoundEvent]]:
        """A process registers. The same process may do so again."""
        events: list[RoundEvent] = []
        known = self.members.get(worker)
        if known is not None and known.session != session:
            if not known.is_silent(now, self.rules):
                return Refusal.NAME_TAKEN, []
            events.append(self._remove(worker, Departure.REPLACED))
            known = None
        if known is None:
            if len(self.members) >= self.rules.max_members:
                return Refusal.FULL, events
            taken = self._former.pop((worker, session), {})
            known = self.members[worker] = Member(session, now, taken=taken)
        known.beat_s = beat_s
        known.hear(now)
        self._start()
        return None, events + self._closes(now)

    def beat(
        self, now: float, worker: str, session: str, steps_per_s: float = 0.0
    ) -> tuple[Refusal | None, list[RoundEvent]]:
        """A sign of life."""
        member = self._member(worker, session)
        if member is None:
            return Refusal.NOT_REGISTERED, []
        member.hear(now)
        member.steps_per_s = steps_per_s
        return None, self._closes(now)

    def leave(
        self, now: float, worker: str, session: str | None = None, why: Departure = Departure.LEFT
    ) -> list[RoundEvent]:
        """It goes, by itself or not (then without a session). What it submitted still counts,
        unless it was sent away."""
        member = self.members.get(worker)
        if member is None or session not in (None, member.session):
            return []
        if why is Departure.KICKED:
            self._drop_pending(worker, member)
        events: list[RoundEvent] = [self._remove(worker, why)]
        return events + self._closes(now)

    def ask(self, worker: str, session: str, fragment: int, base: int, number: int) -> Verdict:
        """What `submit` would say: whether it is worth to send the numbers."""
        if not 0 <= fragment < len(self.rounds):
            return Refusal.NO_FRAGMENT
        member = self._member(worker, session)
        if member is None:
            return Refusal.NOT_REGISTERED
        if number <= member.taken.get(fragment, 0):
            return Taken(0, repeat=True)
        staleness = self._staleness(fragment, base)
        bound = self.rules.max_staleness
        if bound is not None and staleness > bound:
            return Refusal.TOO_STALE
        return Taken(staleness)

    def submit(self, now: float, submission: Submission) -> tuple[Verdict, list[RoundEvent]]:
        """A whole, checked delta is here."""
        s = submission
        verdict = self.ask(s.worker, s.session, s.fragment, s.base, s.number)
        if isinstance(verdict, Refusal):
            return verdict, []
        member = self.members[s.worker]
        member.hear(now)
        if verdict.repeat:
            return verdict, []
        self._take(member, s)
        member.arrive(s.fragment, now)
        return verdict, self._closes(now)

    def tick(self, now: float) -> list[RoundEvent]:
        """Time has passed."""
        limit = self.rules.heartbeat_timeout_s
        events: list[RoundEvent] = [
            self._remove(worker, Departure.SILENT)
            for worker, member in list(self.members.items())
            if limit and member.beat_s and now - member.heard_at > max(limit, 3 * member.beat_s)
        ]
        return events + self._closes(now)

    def expect(self, now: float, workers: int, min_workers: int) -> list[RoundEvent]:
        """The run is to have so many workers from now on."""
        self.redo_expect(workers, min_workers)
        return self._closes(now)

    # ------------------------------------------------------------------ what is going on

    def waiting(self, now: float, fragment: int) -> tuple[Waiting | None, list[str]]:
        """Why the round is open and for whom it waits; None: it can close."""
        one, rules = self.rounds[fragment], self.rules
        if not one.pending:
            return Waiting.NOTHING, []
        if rules.mode is Mode.ASYNCHRONOUS:
            return None, []
        if rules.mode is Mode.SYNCHRONOUS and not self.started:
            return Waiting.NOT_ALL_HERE, []
        missing = sorted(self._missing(now, fragment))
        if len(one.submitters) < rules.min_workers:
            return Waiting.BELOW_MINIMUM, missing
        if not missing:
            return None, []
        if rules.mode is Mode.SYNCHRONOUS:
            return Waiting.MEMBERS, missing
        if len(one.arrived) < rules.min_workers:
            return Waiting.ONLY_LATE, missing
        if now >= self._grace_ends(now, fragment, missing):
            return None, []
        return Waiting.GRACE, missing

    def next_at(self, now: float) -> float | None:
        """When the next `tick` can change something, as far as is known; None: never by itself."""
        rules = self.rules
        times = [m.heard_at + m.patience_s(rules) for m in self.members.values() if m.beat_s]
        times += [m.heard_at + rules.heartbeat_timeout_s for m in self.members.values() if m.beat_s]
        for fragment in range(len(self.rounds)):
            why, missing = self.waiting(now, fragment)
            if why is Waiting.GRACE:
                times.append(self._grace_ends(now, fragment, missing))
        return min((t for t in times if t > now), default=None)

    # ------------------------------------------------------------------ what outlives a restart

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        former = [[*key, {str(f): n for f, n in t.items()}] for key, t in self._former.items()]
        return {
            "started": self.started,
            "members": {worker: member.state_dict() for worker, member in self.members.items()},
            "former": former,
            "versions": [one.version for one in self.rounds],
            "pending": [[s.state_dict() for s in one.pending] for one in self.rounds],
        }

    def load_state_dict(self, state: Mapping[str, Any], now: float) -> None:
        """The inverse. Members have the grace window to be heard again."""
        self.started = state["started"]
        self.members = {w: Member.from_state(m, now) for w, m in state["members"].items()}
        self._former = {
            (worker, session): {int(f): n for f, n in taken.items()}
            for worker, session, taken in state["former"]
        }
        self.rounds = [
            OpenRound(version, set(self.members), [Submission(**s) for s in pending])
            for version, pending in zip(state["versions"], state["pending"], strict=True)
        ]

    def redo_join(self, now: float, worker: str, session: str, beat_s: float) -> None:
        """A registration after the checkpoint, from the journal."""
        if worker in self.members and self.members[worker].session != session:
            self._remove(worker, Departure.REPLACED)
        taken = self._former.pop((worker, session), {})
        self.members.setdefault(worker, Member(session, now, beat_s, taken=taken))
        self._start()

    def redo_leave(self, worker: str, why: Departure) -> None:
        """A departure after the checkpoint, from the journal."""
        member = self.members.get(worker)
        if member is not None:
            if why is Departure.KICKED:
                self._drop_pending(worker, member)
            self._remove(worker, why)

    def redo_expect(self, workers: int, min_workers: int) -> None:
        """Another number of workers, of a checkpoint or the journal."""
        self.rules = replace(self.rules, workers=workers, min_workers=min_workers)
        self._start()

    def lose(self, submission: Submission) -> None:
        """The numbers of a pending one are not there any more: its worker may send them again."""
        self.rounds[submission.fragment].pending.remove(submission)
        member = self._member(submission.worker, submission.session)
        # Where later work of the same fragment counts, it cannot go back without counting twice.
        if member is not None and member.taken.get(submission.fragment) == submission.number:
            member.taken[submission.fragment] = submission.number - 1

    def redo_take(self, submission: Submission) -> None:
        """A submission after the checkpoint, from the journal."""
        member = self._member(submission.worker, submission.session)
        if member is not None:
            self._take(member, submission)

    def redo_close(self, close: RoundClosed) -> None:
        """A close after the checkpoint, from the journal."""
        gone = {share.submission for share in close.shares}
        one = self.rounds[close.fragment]
        left = [s for s in one.pending if s not in gone]
        self.rounds[close.fragment] = OpenRound(close.version, set(self.members), left)

    # ------------------------------------------------------------------ how

    def _member(self, worker: str, session: str) -> Member | None:
        member = self.members.get(worker)
        return member if member is not None and member.session == session else None

    def _take(self, member: Member, submission: Submission) -> None:
        member.taken[submission.fragment] = submission.number
        self.rounds[submission.fragment].pending.append(submission)

    def _drop_pending(self, worker: str, member: Member) -> None:
        for fragment, one in enumerate(self.rounds):
            dropped = {s.number for s in one.pending if s.worker == worker}
            one.pending = [s for s in one.pending if s.worker != worker]
            if dropped:
                member.taken[fragment] = min(dropped) - 1

    def _remove(self, worker: str, why: Departure) -> MemberLeft:
        member = self.members.pop(worker)
        self._former[worker, member.session] = member.taken
        while len(self._former) > _REMEMBERED:
            del self._former[next(iter(self._former))]
        return MemberLeft(worker, why)

    def _start(self) -> None:
        if not self.started and len(self.members) >= self.rules.workers:
            self.started = True
            for one in self.rounds:
                one.expected = set(self.members)

    def _staleness(self, fragment: int, base: int) -> int:
        behind = max(0, self.rounds[fragment].version - base)
        if self.rules.mode is Mode.ASYNCHRONOUS:
            return behind // max(1, len(self.members))
        return behind

    def _missing(self, now: float, fragment: int) -> Iterator[str]:
        one = self.rounds[fragment]
        for worker in one.expected - one.arrived:
            member = self.members.get(worker)
            if member is None or member.is_silent(now, self.rules):
                continue
            if not self._has_passed(worker, fragment):
                yield worker

    def _has_passed(self, worker: str, fragment: int) -> bool:
        here = (self.rounds[fragment].version, fragment)
        return any(
            (one.version, index) > here and worker in one.arrived
            for index, one in enumerate(self.rounds)
        )

    def _grace_ends(self, now: float, fragment: int, missing: list[str]) -> float:
        """As long as work can still come within the longest window, and no longer."""
        noted = self.rounds[fragment].quorum_at
        since = now if noted is None else noted
        return since + max(self._worth_waiting(worker, fragment, since) for worker in missing)

    def _worth_waiting(self, worker: str, fragment: int, since: float) -> float:
        longest = self.rules.grace_s
        due = self.members[worker].due_at(fragment)
        if due is None or due < since - longest:
            return longest  # unknown, or its pace has changed
        if due > since + longest:
            return 0.0
        return min(longest, max(0.0, due - since) + longest / 4)

    def _closes(self, now: float) -> list[RoundEvent]:
        events: list[RoundEvent] = []
        for fragment, one in enumerate(self.rounds):
            self._note_quorum(now, one)
            why, _ = self.waiting(now, fragment)
            if why is None:
                events.append(self._close(fragment))
        return events

    def _note_quorum(self, now: float, one: OpenRound) -> None:
        there = len(one.arrived) >= self.rules.min_workers
        if not there:
            one.quorum_at = None
        elif one.quorum_at is None:
            one.quorum_at = now

    def _close(self, fragment: int) -> RoundClosed:
        one = self.rounds[fragment]
        stale = [self._staleness(fragment, s.base) for s in one.pending]
        close = RoundClosed(fragment, one.version + 1, shares(self.rules.mode, one.pending, stale))
        self.rounds[fragment] = OpenRound(close.version, set(self.members))
        return close
