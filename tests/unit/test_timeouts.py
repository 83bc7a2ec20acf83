"""The deadlines of a job follow from each other, by one rule."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from helpers.steps import a_context, parts

from torchft.manager.queue import Steps
from torchft.script import ranks
from torchft.timeouts import inside_group

T = timedelta(seconds=20)


def test_ranks_of_a_group_wait_longer_for_each_other_than_for_other_groups() -> None:
    assert T < inside_group(T) < 2 * T


def test_a_vote_waits_longer_than_a_collective() -> None:
    waited: list[timedelta] = []

    class Client:
        def should_commit(self, *_: Any, timeout: timedelta) -> bool:
            waited.append(timeout)
            return True

    steps = Steps(*parts(a_context(timeout=T), Client(), world_size=2))
    plan: Any = SimpleNamespace(
        participating=(0, 1),
        step=0,
        donor=None,
        anyone_heals=False,
        final_sync=False,
        bootstrap=False,
    )
    plan.participates = False
    average: Any = SimpleNamespace(wait=waited.append, report=lambda: None)
    for timeout in (None, timedelta(seconds=3)):
        step = steps._next()
        step.known_plan = plan
        step.averages.append(average)
        step.finish_forming()
        assert steps.close(step, timeout)
    steps.shutdown()
    assert waited[:2] == [T, inside_group(T)]
    assert waited[2:] == [timedelta(seconds=3)] * 2, "what the caller says is what is done"


def test_the_process_group_of_an_examples_ranks_waits_as_long_as_a_vote(monkeypatch: Any) -> None:
    made: list[timedelta] = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "nowhere")
    monkeypatch.setenv("MASTER_PORT", "1")
    fake = SimpleNamespace(
        TCPStore=lambda *_, timeout, **__: made.append(timeout),
        PrefixStore=lambda *_: None,
        init_process_group=lambda *_, timeout, **__: made.append(timeout),
    )
    monkeypatch.setattr(ranks, "distributed", fake)
    ranks.meet_inside(T)
    assert made == [inside_group(T)] * 2
