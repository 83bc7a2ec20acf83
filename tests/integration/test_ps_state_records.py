"""An upload of a closed round is lost or damaged on disk: later rounds are not lost with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ps import Fleet, options, train
from helpers.voices import Voice
from integration.test_ps_restarts import (
    absent,
    killed_after,
    server_at,
    uploads_in,
    weights_at,
    zeros,
)

from torchft.parameter_server.auth import Scope
from torchft.parameter_server.core import chunks
from torchft.parameter_server.core.events import RoundClosed
from torchft.parameter_server.core.rules import Mode
from torchft.parameter_server.server import state_records


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# An old failing that must not come back: the run went back to before the round, though all that
# came later was whole.
@pytest.mark.parametrize("damage", [absent, zeros, cut_short, flipped])
def test_an_upload_of_a_closed_round_that_is_lost_costs_nothing(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    opts = options(tmp_path, workers=1, save_every=100)
    before = killed_after(opts, 4)
    damage(uploads_in(tmp_path)[1])
    for _ in range(2):
        with server_at(opts) as again:
            voice = Voice(again.address)
            assert voice.news()["version"] == 4
            assert weights_at(voice) == before
            assert voice.ticket(3, 4) == {"done": True}, "nothing counts twice"
    expected = killed_after(options(tmp_path / "undisturbed", workers=1, save_every=100), 5)
    assert killed_after(opts, 1, first=4) == expected, "momentum is what it was"


def test_all_uploads_may_be_lost_once_their_state_is_recorded(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=100)
    before = killed_after(opts, 3)
    for path in uploads_in(tmp_path):
        absent(path)
    with server_at(opts) as again:
        assert weights_at(Voice(again.address)) == before


def test_rounds_after_the_record_are_done_again_from_their_uploads(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=100)
    killed_after(opts, 3)
    state = tmp_path / "spool" / "state"
    older = {path.name: path.read_bytes() for path in state.iterdir()}
    before = killed_after(opts, 2, first=3)
    for path in state.iterdir():
        path.unlink()
    for name, data in older.items():
        (state / name).write_bytes(data)
    zeros(uploads_in(tmp_path)[0])
    with server_at(opts) as again:
        assert Voice(again.address).news()["version"] == 5
        assert weights_at(Voice(again.address)) == before


@pytest.mark.parametrize("mode", [Mode.SYNCHRONOUS, Mode.ASYNCHRONOUS])
def test_fragments_with_orders_between_go_on_from_their_records(
    tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        chunks, "CHUNK", 64
    )  # records of several pieces, and news of what int8 lost
    own: dict[str, Any] = {"fragments": 2, "codec": "int8", "sync_every": 4}
    opts = options(tmp_path, workers=1, mode=mode, save_every=100, **own)
    server = server_at(opts).start()
    fleet = Fleet(server.address, auth_token=Voice(server.address).token)
    admin = Voice(server.address, "x", Scope.ADMIN).client

    def told(at: str) -> list[str]:
        question = {"base": 0, "identity": "none", "wait_s": 5.0}
        ask = Voice(at).client.post
        return [str(ask("/v1/news", {**question, "fragment": f})["identity"]) for f in range(2)]

    with fleet.worker("a") as worker:
        for turn in range(3):
            train(fleet.models["a"], worker.optimizer, turn, 4)  # type: ignore[attr-defined]
            admin.post("/v1/control/update_optimizer", {"lr": 0.5 - 0.1 * turn})
    before = told(server.address)
    server.stop(save=False)
    for path in uploads_in(tmp_path)[:3]:
        zeros(path)
    with server_at(opts) as again:
        assert told(again.address) == before
        assert Voice(again.address).status()["outer_lr"] == pytest.approx(0.3)


def test_records_that_the_disk_has_no_room_for_are_said_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_records, "write_state", no_room)
    opts = options(tmp_path, workers=1, save_every=100)
    before = killed_after(opts, 3)
    assert sum("was not recorded" in line for line in caplog.messages) == 1
    assert not list((tmp_path / "spool" / "state").iterdir())
    with server_at(opts) as again:
        assert weights_at(Voice(again.address)) == before


def test_a_record_gives_way_to_a_step_and_leaves_the_one_before_it_whole(tmp_path: Path) -> None:
    records = state_records.StateRecords(tmp_path)
    first, second = (RoundClosed(0, version, ()) for version in (1, 2))
    pieces = [{"weights": torch.ones(1, 4)}] * 3
    assert records.write(first, pieces, lambda: False)
    for _ in range(2):  # the second time over what the first one left
        asked = iter([False, False, True])
        assert not records.write(second, pieces, asked.__next__)
        assert list(records.find([first, second], 3)) == [1]
    assert records.write(second, pieces, lambda: False)
    assert set(records.find([first, second], 3)) == {1, 2}


def test_what_a_journal_can_be_done_again_from() -> None:
    replay_of, Replay, path = state_records.replay_of, state_records.Replay, Path("f0")
    assert replay_of(set(), {6: path}) == Replay(), "uploads first"
    assert replay_of({4}, {5: path}) == Replay(5, path)
    assert replay_of({5}, {5: path, 4: Path("f0.before")}) == Replay(5, path)
    assert replay_of({4, 6}, {5: path}) == Replay(5, path, stop=6)
    assert replay_of({6}, {5: path}) == Replay(stop=6)
    assert replay_of({4, 5}, {}) == Replay(stop=4)
