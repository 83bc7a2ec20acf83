"""PyTorch's own torchft, both generations of its wheels, against ours: their groups under our
lighthouse, ours under theirs, and what happens where the two meet in one job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.coordination import lighthouse
from helpers.upstream import OURS, WHEELS, TrainingGroup, their_lighthouse

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OLD, NIGHTLY = WHEELS
STEPS = 8

Start = Callable[..., TrainingGroup]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    groups: list[TrainingGroup] = []

    def start(what: str, address: str, name: str, **options: int) -> TrainingGroup:
        stop = tmp_path / f"stop-{len(groups)}"
        groups.append(TrainingGroup(what, address, name, stop=stop, **options))
        return groups[-1]

    yield start
    for group in groups:
        group.dies()


@pytest.fixture
def our_lighthouse() -> Iterator[str]:
    with lighthouse(2, join_timeout_ms=5000, heartbeat_timeout_ms=2500) as server:
        yield server.address()


def two_train(start: Start, what: str, address: str) -> None:
    groups = [start(what, address, f"group_{i}", steps=STEPS) for i in range(2)]
    ends = [group.ends() for group in groups]
    assert [end["ended"] for end in ends] == ["done", "done"], ends
    assert [end["discarded"] for end in ends] == [0, 0]
    assert ends[0]["digest"] == ends[1]["digest"]


@pytest.mark.parametrize("wheel", WHEELS)
def test_their_groups_commit_every_step_under_our_lighthouse(
    start: Start, our_lighthouse: str, wheel: str
) -> None:
    two_train(start, wheel, our_lighthouse)


@pytest.mark.parametrize("wheel", WHEELS)
def test_our_groups_commit_every_step_under_their_lighthouse(start: Start, wheel: str) -> None:
    with their_lighthouse(wheel) as address:
        two_train(start, OURS, address)


@pytest.mark.parametrize(
    ("of", "killed"),
    [(OLD, "under ours"), (NIGHTLY, "under ours"), (OURS, OLD), (OURS, NIGHTLY)],
)
def test_a_killed_group_comes_back_across_the_wire(
    start: Start, our_lighthouse: str, of: str, killed: str
) -> None:
    if killed == "under ours":
        a_group_comes_back(start, of, our_lighthouse)
        return
    with their_lighthouse(killed) as address:
        a_group_comes_back(start, of, address)


def a_group_comes_back(start: Start, of: str, address: str) -> None:
    groups = [start(of, address, f"group_{i}") for i in range(3)]
    for group in groups:
        group.commits(3, together=3)
    groups[2].dies()
    groups[2] = start(of, address, "group_2")
    groups[2].commits(1, together=3)
    at = max(group.step for group in groups)
    for group in groups:
        group.commits(at + 3, together=3)


@pytest.mark.parametrize("pair", [(OLD, OURS), (NIGHTLY, OURS), (OURS, OLD), (OLD, NIGHTLY)])
def test_a_group_of_another_generation_is_held_back_and_costs_no_step(
    start: Start, our_lighthouse: str, pair: tuple[str, str]
) -> None:
    job, other = pair
    groups = [start(job, our_lighthouse, f"group_{i}") for i in range(2)]
    for group in groups:
        group.commits(2, together=2)
    stranger = start(other, our_lighthouse, "stranger")
    stranger.started()
    for group in groups:
        group.goes_on(20, together=2)
    assert [group.discarded for group in groups] == [0, 0]
    assert stranger.step == 0


@pytest.mark.parametrize("way", [(OLD, OURS), (OURS, OLD), (NIGHTLY, OURS), (OURS, NIGHTLY)])
def test_four_groups_are_upgraded_one_by_one_without_a_failed_commit(
    start: Start, our_lighthouse: str, way: tuple[str, str]
) -> None:
    before, after = way
    old = [start(before, our_lighthouse, f"group_{i}") for i in range(4)]
    for group in old:
        group.commits(2, together=4)
    new: list[TrainingGroup] = []
    for i in range(4):
        if i == 3:
            old[3].dies()  # alone below min_replicas: it waits, and no step is open
        else:
            old[i].stops()
        new.append(start(after, our_lighthouse, f"group_{i}"))
        new[i].started()
        for group in old[i + 1 :] if i < 2 else []:
            group.goes_on(2, together=3 - i)
    for group in new:
        group.commits(3, together=4)
    assert [group.discarded for group in (*old, *new)] == [0] * 8
