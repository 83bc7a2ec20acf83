"""Random schedules of workers that die, return, repeat and lie, against what must always hold."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchft.parameter_server.core.events import Event, RoundClosed
from torchft.parameter_server.core.rounds import Rounds
from torchft.parameter_server.core.rules import Departure, Mode, Refusal, Rules
from torchft.parameter_server.core.submission import Submission

NAMES = ["a", "b", "c", "d"]
SCHEDULES = 400


class Worker:
    """What a worker remembers. It submits the least (base, fragment), as ours does, or, `odd`,
    the fragments in turn from a place of its own, as somebody else's might."""

    def __init__(self, name: str, fragments: int, *, odd: bool) -> None:
        self.name, self.starts, self.alive = name, 0, False
        self.fragments, self.odd = fragments, odd
        self.turn = NAMES.index(name)
        self.restart([0] * fragments)

    def restart(self, versions: list[int]) -> None:
        self.starts += 1
        self.session = f"{self.name}{self.starts}"
        self.bases = list(versions)
        self.numbers = [0] * self.fragments
        self.flying: dict[int, Submission] = {}
        self.last: Submission | None = None

    def adopt(self, versions: list[int]) -> None:
        for fragment, sent in list(self.flying.items()):
            if versions[fragment] > sent.base:
                self.bases[fragment] = versions[fragment]
                del self.flying[fragment]

    def next(self) -> Submission | None:
        idle = [(self.bases[f], f) for f in range(self.fragments) if f not in self.flying]
        if not idle or self.flying:
            return None  # one in flight at a time: the hardest case for deadlocks
        base, fragment = min(idle)
        if self.odd:
            fragment = self.turn % self.fragments
            base = self.bases[fragment]
            self.turn += 1
        self.numbers[fragment] += 1
        upload = f"{self.session}-{fragment}-{self.numbers[fragment]}"
        number = self.numbers[fragment]
        return Submission(self.name, self.session, fragment, base, number, 5, 7, upload)


class World:
    def __init__(self, mode: Mode, fragments: int, min_workers: int, *, odd: bool) -> None:
        self.rules = Rules(3, mode, min_workers, max_staleness=None, heartbeat_timeout_s=30.0)
        self.machine = Rounds(self.rules, fragments)
        self.workers = {name: Worker(name, fragments, odd=odd) for name in NAMES}
        self.now = 0.0
        self.counted: set[str] = set()
        self.taken: set[str] = set()
        self.dropped: set[str] = set()
        self.journal: list[Event] = []

    @property
    def versions(self) -> list[int]:
        return [one.version for one in self.machine.rounds]

    def see(self, events: Iterable[Event] = ()) -> None:
        closes = iter(lambda: self.machine.next_close(self.now), None)
        for event in itertools.chain(events, closes):
            self.machine.apply(self.now, event)
            self.journal.append(event)
            if isinstance(event, RoundClosed):
                self._check_close(event)
        for worker in self.workers.values():
            worker.adopt(self.versions)

    def _check_close(self, close: RoundClosed) -> None:
        uploads = [share.submission.upload for share in close.shares]
        assert len(set(uploads)) == len(uploads)
        assert not self.counted & set(uploads), "counted twice"
        assert set(uploads) <= self.taken, "counted without being taken"
        self.counted |= set(uploads)
        assert all(0 < share.weight <= 1 for share in close.shares)
        distinct = {share.submission.worker for share in close.shares}
        if self.rules.mode is Mode.ASYNCHRONOUS:
            assert len(close.shares) == 1
        else:
            assert len(distinct) >= self.rules.min_workers

    def do(self, event: int, who: int) -> None:
        before = self.versions
        worker = self.workers[NAMES[who]]
        getattr(self, EVENTS[event])(worker)
        assert all(new >= old for new, old in zip(self.versions, before, strict=True))
        for fragment in range(len(before)):
            why, _ = self.machine.waiting(self.now, fragment)
            assert why is not None, "a round that could close is open"
        pending = {s.upload for one in self.machine.rounds for s in one.pending}
        assert self.taken == self.counted | pending | self.dropped, "work was lost"

    def join(self, worker: Worker) -> None:
        if not worker.alive:
            worker.restart(self.versions)
        events = self.machine.join(self.now, worker.name, worker.session, 1.0)
        worker.alive = not isinstance(events, Refusal)
        self.see([] if isinstance(events, Refusal) else events)

    def submit(self, worker: Worker) -> None:
        one = worker.next() if worker.alive else None
        if one is not None:
            worker.flying[one.fragment] = worker.last = one
            self._send(worker, one)

    def repeat(self, worker: Worker) -> None:
        if worker.last is not None:
            self._send(worker, worker.last)

    def _send(self, worker: Worker, one: Submission) -> None:
        verdict = self.machine.ask(one)
        if verdict is Refusal.NOT_REGISTERED:
            return
        assert not isinstance(verdict, Refusal)
        self.machine.members[worker.name].hear(self.now)
        if not verdict.repeat:
            assert one.upload not in self.taken, "taken twice"
            self.taken.add(one.upload)
        self.see([] if verdict.repeat else [one])

    def die(self, worker: Worker) -> None:
        worker.alive = False

    def leave(self, worker: Worker) -> None:
        worker.alive = False
        self.see(self.machine.leave(worker.name, worker.session))

    def kick(self, worker: Worker) -> None:
        mine = {
            s.upload for one in self.machine.rounds for s in one.pending if s.worker == worker.name
        }
        events = self.machine.leave(worker.name, None, Departure.KICKED)
        if events:
            self.dropped |= mine
            worker.alive = False
        self.see(events)

    def pass_time(self, worker: Worker) -> None:
        self.now += 1.0
        for one in self.workers.values():
            if one.alive:
                refusal = self.machine.beat(self.now, one.name, one.session)
                self.see()
                if refusal is not None:
                    self.join(one)
        self.see(self.machine.tick(self.now))

    def pass_long(self, worker: Worker) -> None:
        for _ in range(7):
            self.pass_time(worker)

    def restart_server(self, worker: Worker) -> None:
        again = Rounds(self.rules, len(self.versions))
        again.load_state_dict(self.machine.state_dict(), self.now)
        self.machine = again
        self.see(again.tick(self.now))

    def check_replay(self) -> None:
        """What a journal says again makes the same state."""
        again = Rounds(self.rules, len(self.versions))
        for event in self.journal:
            again.apply(self.now, event)
        assert again.state_dict() == self.machine.state_dict()

    def settle(self) -> None:
        """All live and behave from here on: everybody gets through whole cycles."""
        for _ in range(8):
            for worker in self.workers.values():
                if not worker.alive:
                    self.join(worker)
            self.pass_time(worker)
        goal = [version + 2 for version in self.versions]
        for _ in range(14 * len(goal)):
            for worker in self.workers.values():
                self.repeat(worker)
                self.submit(worker)
            self.pass_time(worker)
        short = [w.name for w in self.workers.values() if w.bases < goal]
        assert not short, f"stuck: {short} at {[w.bases for w in self.workers.values()]}"


EVENTS = [
    *("join", "join", "submit", "submit", "submit", "submit", "repeat"),
    *("die", "leave", "kick", "pass_time", "pass_time", "pass_long", "restart_server"),
]


@pytest.mark.parametrize("mode", Mode)
@settings(max_examples=SCHEDULES, deadline=None)
@given(
    fragments=st.integers(1, 3),
    min_workers=st.integers(1, 2),
    odd=st.booleans(),
    events=st.lists(
        st.tuples(st.integers(0, len(EVENTS) - 1), st.integers(0, len(NAMES) - 1)), max_size=60
    ),
)
def test_whatever_happens(
    mode: Mode, fragments: int, min_workers: int, odd: bool, events: list[tuple[int, int]]
) -> None:
    # Two that are out of step and need each other would wait for the others' silence.
    world = World(mode, fragments, min_workers, odd=odd and min_workers == 1)
    for event, who in events:
        world.do(event, who)
    world.settle()
    world.check_replay()
