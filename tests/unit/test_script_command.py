"""What a training script in a shell says, and how it ends."""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchft.errors import CollectiveError, SettingsError, TorchftError, UnreachableError
from torchft.script import command as shell
from torchft.script.command import (
    joining,
    require_torchrun,
    run_script,
    shared_flags,
    show_events,
    which_group,
)

LOGGERS = ("torchft.manager", "torchft_quorums", "torchft_commits", "torchft_errors")


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TORCHELASTIC_") or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def own_sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def loggers() -> Iterator[None]:
    """As in a process that has not imported the manager yet; as they were, afterwards."""
    found = [logging.getLogger(name) for name in LOGGERS]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in found]
    for logger in found:
        logger.propagate, logger.handlers = True, []
    yield
    for logger, (level, propagate, handlers) in zip(found, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers = propagate, handlers


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes that were asked to end; this one is a worker that may be restarted twice."""
    ended: list[int] = []
    monkeypatch.setattr(shell.os, "kill", lambda pid, number: ended.append(pid))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    return ended


def failing(error: Exception) -> int:
    def main() -> None:
        raise error

    return run_script(main, "train.py")


# ---------------------------------------------------------------- which group


@pytest.mark.parametrize(
    ("group", "groups", "said"),
    [
        ("x", "2", "REPLICA_GROUP_ID='x': it must be an integer"),
        ("0", "0", "NUM_REPLICA_GROUPS=0: it must be an integer, at least 1"),
        ("2", "2", "REPLICA_GROUP_ID=2: with NUM_REPLICA_GROUPS=2 it must be from 0 to 1"),
        ("-1", "2", "REPLICA_GROUP_ID=-1: with NUM_REPLICA_GROUPS=2 it must be from 0 to 1"),
    ],
)
def test_a_wrong_group_is_named_with_what_would_fit(
    monkeypatch: pytest.MonkeyPatch, group: str, groups: str, said: str
) -> None:
    monkeypatch.setenv("REPLICA_GROUP_ID", group)
    monkeypatch.setenv("NUM_REPLICA_GROUPS", groups)
    with pytest.raises(SettingsError, match=said):
        which_group()


def test_the_last_group_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPLICA_GROUP_ID", "2")
    monkeypatch.setenv("NUM_REPLICA_GROUPS", "3")
    assert which_group() == (2, 3)


# ---------------------------------------------------------------- the start


def test_without_torchrun_the_line_to_type_names_this_script(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["examples/train.py", "--steps=3"])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(SystemExit) as ended:
        require_torchrun()
    said = str(ended.value)
    assert said.startswith("RANK, WORLD_SIZE, MASTER_PORT not set: start this script by torchrun")
    assert said.endswith("--nproc_per_node=1 examples/train.py")


def test_the_shared_flags_have_the_scripts_own_default(capsys: pytest.CaptureFixture[str]) -> None:
    parser = shared_flags("Trains.\n\nMore of it.", finish_together_s=7)
    assert parser.parse_args([]).finish_together_s == 7
    assert parser.parse_args(["--corpus=a", "--corpus=b"]).corpus == [Path("a"), Path("b")]
    assert parser.description == "Trains."
    with pytest.raises(SystemExit):
        parser.parse_args(["--finish-together-s=-1"])
    assert "-1: it must be an integer, at least 0" in capsys.readouterr().err


# ---------------------------------------------------------------- the end


def test_sigterm_lets_finally_run() -> None:
    freed = []

    def main() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            freed.append("the port")

    with pytest.raises(SystemExit) as ended:
        run_script(main, "train.py")
    assert (freed, ended.value.code) == (["the port"], 128 + signal.SIGTERM)


def test_an_error_is_one_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(TorchftError("the peer is gone")) == 1
    assert capsys.readouterr().err == "train.py: the peer is gone\n"


def test_a_wrong_setting_has_an_exit_code_of_its_own() -> None:
    assert failing(SettingsError("A=1 is wrong")) == 2
    assert run_script(lambda: None, "train.py") == 0


@pytest.mark.parametrize("error", [SettingsError("wrong"), UnreachableError("away")])
def test_what_a_restart_would_meet_again_ends_the_agent(error: Exception, asked: list[int]) -> None:
    failing(error)
    assert asked == [os.getppid()]


@pytest.mark.parametrize("error", [CollectiveError("lost"), TimeoutError("no quorum")])
def test_what_may_go_away_is_left_to_the_agent(error: Exception, asked: list[int]) -> None:
    failing(error)
    assert asked == []


def test_after_the_last_restart_nobody_has_to_be_asked(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    failing(SettingsError("wrong"))
    assert asked == []


def test_without_torchrun_no_parent_is_signalled(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    failing(SettingsError("wrong"))
    assert asked == []


def test_who_cannot_be_reached_at_the_start_is_away() -> None:
    with pytest.raises(UnreachableError, match="no lighthouse"), joining():
        raise TimeoutError("no lighthouse")


# ---------------------------------------------------------------- what is seen


@pytest.mark.usefixtures("loggers")
def test_an_error_is_said_once_and_quorums_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    show_events()
    logging.getLogger("torchft.manager").info("quorum 1: group_0")
    logging.getLogger("torchft.manager").warning("the peer is gone")
    assert caplog.messages == ["quorum 1: group_0", "the peer is gone"]


def test_what_is_said_for_programs_is_not_shown_to_people() -> None:
    importlib.import_module("torchft.manager.telemetry")
    for name in ("torchft_quorums", "torchft_commits", "torchft_errors"):
        assert not logging.getLogger(name).propagate


@pytest.mark.usefixtures("loggers")
def test_other_ranks_tell_only_what_is_wrong(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    show_events()
    logging.getLogger("torchft.manager").info("quorum 1: group_0")
    logging.getLogger("torchft.manager").warning("the peer is gone")
    assert caplog.messages == ["the peer is gone"]
