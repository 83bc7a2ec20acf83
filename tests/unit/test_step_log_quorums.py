"""What people are told of a manager's steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from torchft.ledger import Ledger
from torchft.manager.telemetry import StepLog, changes, same_names


def log(rank: int = 0) -> StepLog:
    group: Any = SimpleNamespace(name="g0", replica_id="g0:aa", rank=rank)
    return StepLog(group, Ledger())


def plan(quorum_id: int, *members: str) -> Any:
    return SimpleNamespace(quorum_id=quorum_id, members=members)


def test_who_came_and_who_left_is_told_by_name() -> None:
    before = ("g0:aa", "g1:bb")
    assert changes((), before) == "g0, g1"
    assert changes(before, ("g0:aa", "g2:cc")) == "g0, g2; new: g2; gone: g1"
    assert changes(before, ("g0:aa", "g1:dd")) == "g0, g1; new: g1; gone: g1"


def test_two_processes_under_one_group_name_are_told_with_each_change(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = log()
    for quorum_id in (1, 1, 2):
        told.quorum(plan(quorum_id, "g0:aa", "g0:bb", "g1:cc"), 4)
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "[g0/0 - step 4] several processes train under the name of one group" in warnings[0]
    assert "(g0:aa, g0:bb)" in warnings[0] and "g1" not in warnings[0]


def test_a_group_that_starts_afresh_alone_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """As one does that comes back after all others have ended their run."""
    log().quorum(plan(1, "g0:aa"), 0)
    assert any("starts at step 0, alone" in message for message in caplog.messages)
    caplog.clear()
    log().quorum(plan(1, "g0:aa"), 7)
    log().quorum(plan(1, "g0:aa", "g1:bb"), 0)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_names_that_are_no_groups_are_not_compared() -> None:
    assert same_names(["a", "a", "b:1", "c:x:1", "c:y:1"]) == []
    assert same_names(["c:x:1", "c:x:2"]) == [["c:x:1", "c:x:2"]]


@contextmanager
def logging_not_set_up() -> Iterator[logging.Logger]:
    """The manager's logger in a program that has not set up logging, whatever ran before.

    Levels are set by `setLevel` alone, since a logger remembers what it answered about a level;
    and within the test, since pytest adds handlers to a logger that does not propagate.
    """
    root, logger = logging.getLogger(), logging.getLogger("torchft.manager")
    before = root.level, logger.level, logger.propagate, list(logger.handlers)
    root.setLevel(logging.WARNING)
    logger.setLevel(logging.NOTSET)
    logger.propagate, logger.handlers = False, []
    try:
        yield logger
    finally:
        logger.propagate, logger.handlers = before[2], before[3]
        logger.setLevel(before[1])
        root.setLevel(before[0])


def shown(capsys: pytest.CaptureFixture[str], rank: int) -> str:
    told = log(rank)
    told.quorum(plan(1, "g0:aa", "g1:bb"), 4)
    told.say(logging.DEBUG, 4, "for nobody")
    return capsys.readouterr().err


def test_joins_are_shown_where_a_program_has_not_set_up_logging(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with logging_not_set_up():
        assert shown(capsys, rank=0) == "[g0/0 - step 4] quorum 1: g0, g1\n"
        assert shown(capsys, rank=1) == ""


def test_a_program_that_has_set_up_logging_decides_what_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with logging_not_set_up() as logger:
        logger.setLevel(logging.WARNING)
        assert shown(capsys, rank=0) == ""


def test_what_is_said_for_programs_names_group_and_step() -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("torchft_commits")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        log().closed(Any, plan(1), number=7, committed=True, why=None, sent=0, received=0)  # type: ignore[arg-type]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert said == ["[g0/0 - step 7] committed"]
