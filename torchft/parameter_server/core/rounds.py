"""When does a round close, and with whose work? Requests and the time go in, events come out.

There is no clock, socket, lock or tensor here. Each fragment has a version and one open round;
closing it takes the pending submissions and makes the next version. What is decided is an event,
and nothing changes before `apply` gets it, which is also what a journal is replayed through:

    for event in rounds.tick(now):          # or join, leave, a submission that `ask` accepts
        apply(event)
    while event := rounds.next_close(now):
        apply(event)

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
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torchft.parameter_server.core.events import (
    Event,
    MemberJoined,
    MemberLeft,
    RoundClosed,
    WorkersExpected,
)
from torchft.parameter_server.core.member import RoundMember
from torchft.parameter_server.core.rules import Departure, Mode, Refusal, Rules, Waiting
from torchft.parameter_server.core.submission import Submission, shares

__all__ = ["OpenRound", "Rounds", "Taken", "Verdict"]

_REMEMBERED = 4096
"""Former sessions whose last numbers are kept, so that a late repeat is not counted again."""


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
        """The workers whose submissions it holds, late work included."""
        return {submission.worker for submission in self.pending}

    @property
    def arrived(self) -> set[str]:
        """The workers that have submitted work of this round and need not be waited for."""
        return {s.worker for s in self.pending if s.base >= self.version}


class Rounds:
    """The state machine of all rounds. `now` is in seconds of any clock that does not go back."""

    def __init__(self, rules: Rules, fragments: int) -> None:
        self.rules = rules
        self.members: dict[str, RoundMember] = {}
        self.rounds = [OpenRound() for _ in range(fragments)]
        self.started = False
        """As many workers as the run begins with were members once."""
        self._former: dict[tuple[str, str], dict[int, int]] = {}

    # ------------------------------------------------------------------ requests

    def join(self, now: float, worker: str, session: str, beat_s: float) -> list[Event] | Refusal:
        """Decide on a process that registers. The same process may do so again."""
        known = self.members.get(worker)
        if known is None and len(self.members) >= self.rules.max_members:
            return Refusal.FULL
        events: list[Event] = []
        if known is not None and known.session != session:
            if not known.is_silent(now, self.rules):
                return Refusal.NAME_TAKEN
            events.append(MemberLeft(worker, Departure.REPLACED))
        return [*events, MemberJoined(worker, session, beat_s)]

    def beat(
        self, now: float, worker: str, session: str, steps_per_s: float = 0.0
    ) -> Refusal | None:
        """Note a member's sign of life and its speed; refused where it is no member."""
        member = self.member(worker, session)
        if member is None:
            return Refusal.NOT_REGISTERED
        member.hear(now)
        member.steps_per_s = steps_per_s
        return None

    def leave(
        self, worker: str, session: str | None = None, why: Departure = Departure.LEFT
    ) -> list[Event]:
        """Decide that a worker is a member no more, with `session` None whichever process it is.

        What it submitted still counts, unless it was sent away.
        """
        member = self.members.get(worker)
        there = member is not None and session in (None, member.session)
        return [MemberLeft(worker, why)] if there else []

    def ask(self, submission: Submission) -> Verdict:
        """Decide whether a submission is wanted, before its numbers are sent and again after."""
        if not 0 <= submission.fragment < len(self.rounds):
            return Refusal.NO_FRAGMENT
        member = self.member(submission.worker, submission.session)
        if member is None:
            return Refusal.NOT_REGISTERED
        if submission.number <= member.taken.get(submission.fragment, 0):
            return Taken(0, repeat=True)
        staleness = self._staleness(submission)
        bound = self.rules.max_staleness
        if bound is not None and staleness > bound:
            return Refusal.TOO_STALE
        return Taken(staleness)

    def tick(self, now: float) -> list[Event]:
        """Decide which members have been silent for so long that they are members no more."""
        limit = self.rules.heartbeat_timeout_s
        return [
            MemberLeft(worker, Departure.SILENT)
            for worker, member in self.members.items()
            if limit and member.beat_s and now - member.heard_at > max(limit, 3 * member.beat_s)
        ]

    def next_close(self, now: float) -> RoundClosed | None:
        """Decide which round closes next; None where every open round has to wait."""
        for fragment, one in enumerate(self.rounds):
            if len(one.arrived) < self.rules.min_workers:
                one.quorum_at = None
            elif one.quorum_at is None:
                one.quorum_at = now
            if self.waiting(now, fragment)[0] is None:
                stale = [self._staleness(s) for s in one.pending]
                terms = shares(self.rules.mode, one.pending, stale)
                return RoundClosed(fragment, one.version + 1, terms)
        return None

    # ------------------------------------------------------------------ the one transition

    def apply(self, now: float, event: Event) -> None:
        """Change the state as `event` says, when it happens and when a journal is replayed."""
        match event:
            case MemberJoined(worker, session, beat_s):
                self._join(now, worker, session, beat_s)
            case MemberLeft(worker, why):
                self._leave(worker, why)
            case Submission():
                self._take(now, event)
            case RoundClosed(fragment, version, terms):
                counted = {share.submission for share in terms}
                left = [s for s in self.rounds[fragment].pending if s not in counted]
                self.rounds[fragment] = OpenRound(version, set(self.members), left)
            case WorkersExpected():
                workers, min_workers = event.order
                self.rules = replace(self.rules, workers=workers, min_workers=min_workers)
                self._start()

    def _join(self, now: float, worker: str, session: str, beat_s: float) -> None:
        if worker in self.members and self.members[worker].session != session:
            self._leave(worker, Departure.REPLACED)
        if worker not in self.members:
            taken = self._former.pop((worker, session), {})
            self.members[worker] = RoundMember(session, now, taken=taken)
        self.members[worker].beat_s = beat_s
        self.members[worker].hear(now)
        self._start()

    def _start(self) -> None:
        if not self.started and len(self.members) >= self.rules.workers:
            self.started = True
            for one in self.rounds:
                one.expected = set(self.members)

    def _leave(self, worker: str, why: Departure) -> None:
        member = self.members.pop(worker, None)
        if member is None:
            return
        if why is Departure.KICKED:
            self._drop_pending(worker, member)
        self._former[worker, member.session] = member.taken
        while len(self._former) > _REMEMBERED:
            del self._former[next(iter(self._former))]

    def _drop_pending(self, worker: str, member: RoundMember) -> None:
        for fragment, one in enumerate(self.rounds):
            dropped = {s.number for s in one.pending if s.worker == worker}
            one.pending = [s for s in one.pending if s.worker != worker]
            if dropped:
                member.taken[fragment] = min(dropped) - 1

    def _take(self, now: float, submission: Submission) -> None:
        member = self.member(submission.worker, submission.session)
        if member is not None:
            member.take(now, submission.fragment, submission.number)
            self.rounds[submission.fragment].pending.append(submission)

    # ------------------------------------------------------------------ what is going on

    def member(self, worker: str, session: str) -> RoundMember | None:
        """The member that this process of a worker is; None where it is none."""
        member = self.members.get(worker)
        return member if member is not None and member.session == session else None

    def waiting(self, now: float, fragment: int) -> tuple[Waiting | None, list[str]]:
        """Why the round of a fragment is open and for whom it waits; None where it can close."""
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
        """When time alone can next decide something, as far as is known; None where it cannot."""
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
        """Members, numbers and open rounds as JSON values, for a checkpoint."""
        former = [[*key, {str(f): n for f, n in t.items()}] for key, t in self._former.items()]
        return {
            "started": self.started,
            "members": {worker: member.state_dict() for worker, member in self.members.items()},
            "former": former,
            "versions": [one.version for one in self.rounds],
            "pending": [[asdict(s) for s in one.pending] for one in self.rounds],
        }

    def load_state_dict(self, state: Mapping[str, Any], now: float) -> None:
        """Take over what `state_dict` gave. Members have the grace window to be heard again."""
        self.started = state["started"]
        self.members = {w: RoundMember.from_state(m, now) for w, m in state["members"].items()}
        self._former = {
            (worker, session): {int(f): n for f, n in taken.items()}
            for worker, session, taken in state["former"]
        }
        self.rounds = [
            OpenRound(version, set(self.members), [Submission(**s) for s in pending])
            for version, pending in zip(state["versions"], state["pending"], strict=True)
        ]

    def lose(self, submission: Submission) -> None:
        """Forget a pending submission whose numbers are lost: its worker may send them again."""
        self.rounds[submission.fragment].pending.remove(submission)
        member = self.member(submission.worker, submission.session)
        # Where later work of the same fragment counts, it cannot go back without counting twice.
        if member is not None and member.taken.get(submission.fragment) == submission.number:
            member.taken[submission.fragment] = submission.number - 1

    # ------------------------------------------------------------------ how

    def _staleness(self, submission: Submission) -> int:
        behind = max(0, self.rounds[submission.fragment].version - submission.base)
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
