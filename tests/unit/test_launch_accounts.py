"""A group's wall time, added up from what its workers and its launcher know."""

from __future__ import annotations

import pytest

from torchft.launch.accounts import TimeAccount, WorkerTrace, account
from torchft.launch.group import Life

QUIET = Life(pid=1, spawned=10.0, ended=30.0, code=0)
KILLED = Life(pid=1, spawned=10.0, killed=20.0, ended=20.1, code=-9)
AFTERWARDS = Life(pid=2, spawned=22.0, ended=32.0, code=0)


def worker(born: float, **seconds: float) -> WorkerTrace:
    return WorkerTrace(born=born, last_word=born + sum(seconds.values()), ledger=seconds)


def test_a_quiet_life_is_launch_work_and_exit() -> None:
    result = account([(QUIET, [worker(13.0, start=5.0, compute=10.0)])])
    assert result.wall_s == 20.0
    assert result.seconds == {"launch": 3.0, "start": 5.0, "compute": 10.0, "exit": 2.0}
    assert result.unexplained_s == 0.0
    assert result.adds_up


def test_a_kill_costs_the_step_it_fell_in_and_the_time_until_the_restart() -> None:
    lives = [(KILLED, [worker(13.0, compute=6.5)]), (AFTERWARDS, [worker(25.0, compute=6.0)])]
    result = account(lives)
    assert result.seconds == {
        "launch": 6.0,
        "compute": 12.5,
        "lost": 0.5,
        "down": 2.0,
        "exit": 1.0,
    }
    assert result.wall_s == 22.0
    assert result.adds_up


def test_a_worker_that_its_agent_restarts_was_down_in_between() -> None:
    result = account([(QUIET, [worker(13.0, compute=5.0), worker(20.0, compute=9.0)])])
    assert result.seconds["down"] == 2.0
    assert result.adds_up


def test_a_life_without_a_record_was_all_launch() -> None:
    result = account([(KILLED, []), (AFTERWARDS, [worker(25.0, compute=6.0)])])
    assert result.seconds["launch"] == 13.0
    assert result.adds_up


def test_time_that_a_ledger_does_not_cover_is_found() -> None:
    trace = WorkerTrace(born=13.0, last_word=28.0, ledger={"compute": 14.0})
    result = account([(QUIET, [trace])])
    assert result.unexplained_s == pytest.approx(1.0)
    assert not result.adds_up


def test_the_share_of_other_is_of_the_wall_time() -> None:
    assert TimeAccount(wall_s=50.0, seconds={"other": 1.0, "compute": 49.0}).other_share == 0.02


def test_a_life_that_goes_on_has_no_account() -> None:
    with pytest.raises(ValueError, match="ended"):
        account([(Life(pid=1, spawned=1.0), [])])
