"""When a round of the parameter server closes, told as situations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

from torchft.errors import SettingsError
from torchft.parameter_server.core.events import Event, MemberLeft, RoundClosed, WorkersExpected
from torchft.parameter_server.core.rounds import Rounds, Taken
from torchft.parameter_server.core.rules import Departure, Mode, Refusal, Rules, Waiting
from torchft.parameter_server.core.submission import Submission

BEAT = 1.0


class World:
    """Rounds, a clock, and workers that number their submissions."""

    def __init__(self, workers: int = 2, fragments: int = 1, **rules: Any) -> None:
        self.now = 0.0
        self.rounds = Rounds(Rules(workers, **rules), fragments)
        self.numbers: dict[tuple[str, str, int], int] = {}
        self.closed: list[RoundClosed] = []
        self.gone: list[MemberLeft] = []

    def _carry_out(self, events: Iterable[Event] = ()) -> None:
        closes = iter(lambda: self.rounds.next_close(self.now), None)
        for event in itertools.chain(events, closes):
            self.rounds.apply(self.now, event)
            if isinstance(event, RoundClosed):
                self.closed.append(event)
            if isinstance(event, MemberLeft):
                self.gone.append(event)

    def expect(self, workers: int, min_workers: int) -> None:
        rules = self.rounds.rules
        self._carry_out([WorkersExpected.ordered(rules, workers, min_workers)])

    def join(self, *workers: str, session: str = "1") -> Refusal | None:
        refusal = None
        for worker in workers:
            events = self.rounds.join(self.now, worker, session, BEAT)
            refusal = events if isinstance(events, Refusal) else None
            self._carry_out([] if isinstance(events, Refusal) else events)
        return refusal

    def submit(
        self, worker: str, base: int = 0, fragment: int = 0, *, tokens: int = 1, session: str = "1"
    ) -> Any:
        key = (worker, session, fragment)
        self.numbers[key] = self.numbers.get(key, 0) + 1
        return self.repeat(worker, base, fragment, tokens=tokens, session=session)

    def repeat(
        self, worker: str, base: int = 0, fragment: int = 0, *, tokens: int = 1, session: str = "1"
    ) -> Any:
        number = self.numbers[worker, session, fragment]
        upload = f"{worker}-{session}-{fragment}-{number}"
        one = Submission(worker, session, fragment, base, number, 10, tokens, upload)
        verdict = self.rounds.ask(one)
        if isinstance(verdict, Taken):
            self.rounds.members[worker].hear(self.now)
            self._carry_out([] if verdict.repeat else [one])
        return verdict

    def wait(self, seconds: float, *living: str) -> None:
        """Time passes in quarters of a second; those who live are heard."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.25
            for worker in living:
                self.rounds.beat(self.now, worker, "1")
                self._carry_out()
            self._carry_out(self.rounds.tick(self.now))

    def leave(self, worker: str, why: Departure = Departure.LEFT) -> None:
        self._carry_out(self.rounds.leave(worker, None, why))

    @property
    def versions(self) -> list[int]:
        return [one.version for one in self.rounds.rounds]

    def counted(self) -> list[str]:
        """Whose work the last round had."""
        return [share.submission.worker for share in self.closed[-1].shares]

    def waits(self, fragment: int = 0) -> tuple[Waiting | None, list[str]]:
        return self.rounds.waiting(self.now, fragment)


def test_a_synchronous_round_closes_with_the_last_member() -> None:
    world = World()
    world.join("a", "b")
    world.submit("b")
    assert world.waits() == (Waiting.MEMBERS, ["a"])
    world.submit("a")
    assert world.versions == [1]
    assert world.counted() == ["a", "b"]
    assert [share.weight for share in world.closed[0].shares] == [1.0, 1.0]


# An old failing that must not come back: the first submitter of round 0 went alone.
def test_the_run_begins_when_all_expected_have_registered() -> None:
    world = World(workers=3)
    world.join("a", "b")
    world.submit("a")
    world.submit("b")
    world.wait(60, "a", "b")
    assert world.waits() == (Waiting.NOT_ALL_HERE, [])
    world.join("c")
    world.submit("c")
    assert world.counted() == ["a", "b", "c"]


# An old failing that must not come back: --min-workers only changed the number on the page.
def test_below_the_minimum_nothing_closes() -> None:
    world = World(workers=2, min_workers=2)
    world.join("a", "b")
    world.leave("b")
    world.submit("a")
    world.wait(300, "a")
    assert world.waits()[0] is Waiting.BELOW_MINIMUM
    world.join("c")
    world.submit("c")
    assert world.versions == [1]


def test_the_minimum_can_be_lowered_while_a_round_waits() -> None:
    world = World(workers=2, min_workers=2)
    world.join("a", "b")
    world.leave("b")
    world.submit("a")
    world.expect(workers=1, min_workers=1)
    assert world.versions == [1]


# An old failing that must not come back: survivors of a kill waited 90 to 160 s.
def test_survivors_of_a_kill_wait_no_longer_than_the_grace_window() -> None:
    world = World(workers=8, grace_s=5.0)
    names = [f"w{i}" for i in range(8)]
    world.join(*names)
    for name in names[1:]:
        world.submit(name)
    world.wait(5.25, *names[1:])
    assert world.counted() == names[1:]
    assert "w0" in world.rounds.members, "silent is not gone"


def test_work_of_one_that_was_thought_dead_counts_in_the_next_round() -> None:
    world = World()
    world.join("a", "b")
    world.submit("a")
    world.wait(6, "a")
    assert world.counted() == ["a"]
    verdict = world.submit("b", base=0)
    assert verdict == Taken(staleness=1)
    world.submit("a", base=1)
    world.submit("b", base=1)
    assert world.counted() == ["a", "b", "b"]
    assert [round(share.weight, 4) for share in world.closed[-1].shares] == [1.0, 0.7071, 1.0]


def test_silence_beyond_the_heartbeat_timeout_ends_membership() -> None:
    world = World(heartbeat_timeout_s=20.0)
    world.join("a", "b")
    world.wait(21, "a")
    assert world.gone == [MemberLeft("b", Departure.SILENT)]
    assert world.submit("b") is Refusal.NOT_REGISTERED


# An old failing that must not come back: an evicted worker's heartbeat was answered with ok.
def test_the_heartbeat_of_one_that_is_gone_says_so() -> None:
    world = World()
    world.join("a")
    world.leave("a")
    assert world.rounds.beat(1.0, "a", "1") is Refusal.NOT_REGISTERED


def test_a_worker_that_leaves_is_not_waited_for_and_its_work_counts() -> None:
    world = World()
    world.join("a", "b")
    world.submit("b")
    world.leave("b")
    world.submit("a")
    assert world.counted() == ["a", "b"]


def test_one_that_is_sent_away_takes_its_work_with_it() -> None:
    world = World(workers=3)
    world.join("a", "b", "c")
    world.submit("b")
    world.leave("b", Departure.KICKED)
    world.submit("a")
    world.submit("c")
    assert world.counted() == ["a", "c"]


def test_a_repeat_is_harmless_before_and_after_the_close() -> None:
    world = World()
    world.join("a", "b")
    world.submit("a")
    assert world.repeat("a") == Taken(0, repeat=True)
    world.submit("b")
    assert world.repeat("a") == Taken(0, repeat=True)
    assert len(world.closed) == 1
    assert len(world.closed[0].shares) == 2


def test_a_repeat_after_eviction_and_a_new_registration_is_harmless() -> None:
    world = World()
    world.join("a", "b")
    world.submit("a")
    world.wait(121, "b")
    world.join("a")
    assert world.repeat("a") == Taken(0, repeat=True)


# An old failing that must not come back: a twin under the same id replaced the worker.
def test_two_workers_under_one_id() -> None:
    world = World()
    world.join("a", "b")
    assert world.join("a", session="2") is Refusal.NAME_TAKEN
    world.wait(6, "b")
    assert world.join("a", session="2") is None, "the first one has died meanwhile"
    assert world.gone == [MemberLeft("a", Departure.REPLACED)]


def test_a_restarted_worker_does_not_repeat_its_predecessor() -> None:
    world = World()
    world.join("a", "b")
    world.submit("a")
    world.wait(6, "b")
    world.join("a", session="2")
    world.submit("a", session="2")
    world.submit("b")
    assert world.counted() == ["a", "a", "b"]


def test_a_joiner_does_not_hold_up_the_open_round() -> None:
    world = World()
    world.join("a", "b")
    world.submit("a")
    world.join("c")
    world.submit("b")
    assert world.versions == [1]
    world.submit("a", base=1)
    world.submit("b", base=1)
    assert world.waits() == (Waiting.MEMBERS, ["c"])


# An old failing that must not come back: a joiner in the middle of a cycle blocked everybody.
def test_workers_in_different_places_of_the_cycle_do_not_wait_for_each_other() -> None:
    world = World(workers=2, fragments=4)
    world.join("a", "b")
    for fragment in range(2):
        world.submit("a", fragment=fragment)
        world.submit("b", fragment=fragment)
    world.submit("a", fragment=3)
    world.submit("b", fragment=2)
    assert world.versions == [1, 1, 1, 0], "a has passed fragment 2 by"
    world.submit("b", fragment=3)
    assert world.versions == [1, 1, 1, 1]


def test_a_quorum_closes_after_its_grace_window() -> None:
    world = World(workers=4, min_workers=2, mode=Mode.DECOUPLED)
    world.join("a", "b", "c", "d")
    world.wait(1, "a", "b", "c", "d")
    world.submit("a")
    world.submit("b")
    world.wait(4.5, "a", "b", "c", "d")
    assert world.waits() == (Waiting.GRACE, ["c", "d"])
    world.wait(0.75, "a", "b", "c", "d")
    assert world.counted() == ["a", "b"]


# Else a round of one late delta is a whole outer step, and learning diverges (benchmarks).
def test_late_work_alone_opens_no_grace_window() -> None:
    world = World(workers=3, min_workers=1, mode=Mode.DECOUPLED)
    world.join("a", "b", "c")
    world.submit("a")
    world.submit("b")
    world.wait(6, "a", "b", "c")
    assert world.counted() == ["a", "b"]
    world.submit("c", base=0)
    world.wait(20, "a", "b", "c")
    assert world.versions == [1]
    assert world.waits() == (Waiting.ONLY_LATE, ["a", "b", "c"])
    world.submit("a", base=1)
    world.wait(6, "a", "b", "c")
    assert world.counted() == ["a", "c"]


def test_late_work_counts_when_nobody_is_left_to_wait_for() -> None:
    world = World(workers=2, mode=Mode.DECOUPLED)
    world.join("a", "b")
    world.submit("a")
    world.wait(6, "a", "b")
    world.submit("b", base=0)
    world.leave("a")
    world.leave("b")
    assert world.counted() == ["b"]


def test_the_grace_window_is_known_to_the_shell() -> None:
    world = World(mode=Mode.DECOUPLED)
    world.join("a", "b")
    world.submit("a")
    assert world.rounds.next_at(world.now) == 5.0
    assert World().rounds.next_at(0.0) is None


def test_nobody_waits_for_work_that_cannot_come_in_time() -> None:
    world = World(mode=Mode.DECOUPLED)
    world.join("fast", "slow")
    for turn in range(12):
        if turn % 4 == 3:
            world.submit("slow", base=max(0, turn - 3))
        world.submit("fast", base=world.versions[0])
        before = world.versions
        world.wait(10, "fast", "slow")
        assert world.versions >= before
    world.submit("slow", base=world.versions[0])
    world.submit("fast", base=world.versions[0])
    version = world.versions[0]
    world.wait(10, "fast", "slow")
    world.submit("fast", base=version)
    assert world.versions == [version + 1], "slow is due in 30 s: the round closes at once"


def test_decoupled_work_is_weighed_by_tokens() -> None:
    world = World(mode=Mode.DECOUPLED)
    world.join("a", "b")
    world.submit("a", tokens=300)
    world.submit("b", tokens=100)
    assert [share.weight for share in world.closed[0].shares] == [1.5, 0.5]
    assert len(world.closed[0].shares) == 2


def test_asynchronous_work_is_a_round_of_its_own() -> None:
    world = World(mode=Mode.ASYNCHRONOUS)
    world.join("a", "b")
    for turn in range(2):
        world.submit("a", base=2 * turn)
        world.submit("b", base=2 * turn)
    assert world.versions == [4]
    assert {share.weight for close in world.closed for share in close.shares} == {1.0}


def test_asynchronous_staleness_is_counted_in_turns_of_all() -> None:
    world = World(mode=Mode.ASYNCHRONOUS)
    world.join("a", "b")
    for base in range(6):
        world.submit("a", base=base)
    world.submit("b", base=0)
    assert world.closed[-1].shares[0].staleness == 3
    assert world.closed[-1].shares[0].weight == 0.5


def test_work_beyond_the_bound_is_refused() -> None:
    world = World(mode=Mode.ASYNCHRONOUS, workers=1, max_staleness=2)
    world.join("a")
    for base in range(3):
        world.submit("a", base=base)
    assert world.submit("a", base=0) is Refusal.TOO_STALE
    assert world.submit("a", base=1) == Taken(2)


def test_a_fragment_that_is_not_there_is_refused() -> None:
    world = World()
    world.join("a")
    for fragment in (-1, 1):
        assert world.submit("a", fragment=fragment) is Refusal.NO_FRAGMENT


def test_a_base_ahead_of_a_server_that_went_back_is_fresh() -> None:
    world = World(workers=1)
    world.join("a")
    assert world.submit("a", base=12) == Taken(0)
    assert world.versions == [1]


def test_a_restarted_server_knows_members_numbers_and_open_work() -> None:
    world = World(fragments=2)
    world.join("a", "b")
    world.submit("a")
    world.submit("b")
    world.submit("a", base=1)
    again = World(fragments=2)
    again.numbers = world.numbers
    again.rounds.load_state_dict(world.rounds.state_dict(), now=0.0)
    assert again.versions == [1, 0]
    assert again.repeat("a", base=1) == Taken(0, repeat=True)
    again.submit("b", base=1)
    assert again.counted() == ["a", "b"]


def test_a_restarted_server_does_not_wait_for_those_who_never_come_back() -> None:
    world = World()
    world.join("a", "b")
    again = World()
    again.rounds.load_state_dict(world.rounds.state_dict(), now=0.0)
    again.submit("a")
    again.wait(6, "a")
    assert again.counted() == ["a"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"workers": 0}, "workers=0"),
        ({"workers": 2, "min_workers": 3}, "no round could close"),
        ({"workers": 1, "grace_s": 0.0}, "grace_s=0"),
        ({"workers": 1, "heartbeat_timeout_s": 1.0}, "shorter than grace_s"),
        ({"workers": 1, "max_staleness": -1}, "max_staleness=-1"),
    ],
)
def test_rules_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Rules(**wrong)
