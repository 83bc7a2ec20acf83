"""The server goes away and comes back: nothing that was counted is lost, and workers train on."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.ps import Fleet, options, plain_outer, train
from helpers.voices import TOKENS, Voice
from helpers.waiting import until

from torchft.errors import SettingsError
from torchft.parameter_server.auth import Scope
from torchft.parameter_server.core import chunks
from torchft.parameter_server.core.events import Event
from torchft.parameter_server.core.options import ServerOptions
from torchft.parameter_server.core.outer_step import OuterStep
from torchft.parameter_server.server import checkpoints
from torchft.parameter_server.server.journal import Journal
from torchft.parameter_server.server.server import Address, DiLoCoServer
from torchft.parameter_server.server.storage import StorageError


def server_at(opts: ServerOptions, port: int = 0) -> DiLoCoServer:
    return DiLoCoServer(opts, Address(port=port, tokens=TOKENS))


def weights_at(voice: Voice) -> str:
    return str(voice.news()["identity"])


def killed_after(opts: ServerOptions, rounds: int, *, first: int = 0, save: bool = False) -> str:
    """A server whose one worker has submitted so many times; what its weights were in the end."""
    server = server_at(opts).start()
    voice = Voice(server.address)
    voice.begin()
    at = voice.version()
    for count in range(rounds):
        voice.submit(0.1 * (first + count + 1), at + count, first + count + 1)
        until(lambda count=count: voice.version() == at + count + 1, "a round")  # type: ignore[misc]
    until(lambda: voice.status()["rounds"] == rounds, "its step is taken")
    if opts.save_every == 1 or at == 0:
        until(lambda: voice.status()["checkpoints"], "the first checkpoint")
    before = weights_at(voice)
    server.stop(save=save)
    return before


# An old failing that must not come back: SIGTERM after 3 rounds went back to round 2.
def test_a_server_that_is_told_to_end_loses_nothing(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=2)
    server = server_at(opts).start()
    voice = Voice(server.address)
    voice.begin()
    for base in range(3):
        voice.submit(0.1, base, base + 1)
    until(lambda: voice.news()["version"] == 3, "three rounds")
    before = weights_at(voice)
    server.stop()
    with server_at(opts) as again:
        voice = Voice(again.address)
        assert voice.news()["version"] == 3
        assert weights_at(voice) == before
        assert list(voice.status()["workers"]) == ["v"], "the registry is there"
        assert voice.ticket(2, 3) == {"done": True}, "and what it has counted"


def test_a_killed_server_does_again_what_its_journal_says(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=2, save_every=100)
    server = server_at(opts).start()
    a, b = Voice(server.address, "a"), Voice(server.address, "b")
    a.begin()
    b.begin()
    for base in range(3):
        a.submit(0.1, base, base + 1)
        b.submit(0.3, base, base + 1)
        until(lambda base=base: a.news()["version"] == base + 1, "a round")  # type: ignore[misc]
    a.submit(0.2, 3, 4)
    before = weights_at(a)
    server.stop(save=False)
    with server_at(opts) as again:
        a, b = Voice(again.address, "a"), Voice(again.address, "b")
        assert a.news()["version"] == 3
        assert weights_at(a) == before, "the same bits, momentum included"
        assert a.ticket(3, 4) == {"done": True}, "the open round's work is there too"
        b.submit(0.2, 3, 4)
        until(lambda: a.news()["version"] == 4, "the open round closes")


def test_a_cut_line_at_the_end_of_the_journal_is_no_event(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=100, outer_optimizer=plain_outer)
    server = server_at(opts).start()
    voice = Voice(server.address)
    voice.begin()
    voice.submit(0.1)
    until(lambda: voice.news()["version"] == 1, "a round")
    server.stop(save=False)
    (newest,) = (tmp_path / "journal").glob("*.jsonl")
    newest.write_text(newest.read_text() + '["close", {"frag')
    with server_at(opts) as again:
        assert Voice(again.address).news()["version"] == 1


# An error of ours that must not come back: events were added to the cut line, and lost with it.
def test_what_follows_a_cut_line_outlives_the_next_kill(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=100, outer_optimizer=plain_outer)
    killed_after(opts, 1)
    (newest,) = (tmp_path / "journal").glob("*.jsonl")
    newest.write_text(newest.read_text() + '["close", {"frag')
    before = killed_after(opts, 2, first=1)
    with server_at(opts) as again:
        assert Voice(again.address).news()["version"] == 3
        assert weights_at(Voice(again.address)) == before


def absent(path: Path) -> None:
    path.unlink()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def uploads_in(folder: Path) -> list[Path]:
    """Oldest first."""
    found = (folder / "spool" / "uploads").glob("*.row")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


# An error of ours that must not come back: the server could not be started any more.
@pytest.mark.parametrize("damage", [absent, zeros])
def test_an_upload_that_is_lost_with_the_record_costs_what_came_after_it(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    opts = options(tmp_path, workers=1, save_every=100, outer_optimizer=plain_outer)
    before = killed_after(opts, 2)
    killed_after(opts, 1, first=2)
    for path in [uploads_in(tmp_path)[-1], *(tmp_path / "spool" / "state").iterdir()]:
        damage(path)
    for _ in range(2):
        with server_at(opts) as again:
            voice = Voice(again.address)
            assert voice.news()["version"] == 2
            assert weights_at(voice) == before
    after = killed_after(opts, 1, first=2)
    with server_at(opts) as again:
        assert weights_at(Voice(again.address)) == after


def test_a_lost_upload_of_an_open_round_is_sent_again(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=2, save_every=100, outer_optimizer=plain_outer)
    server = server_at(opts).start()
    a, b = Voice(server.address, "a"), Voice(server.address, "b")
    a.begin()
    b.begin()
    a.submit()
    Voice(server.address, "x", Scope.ADMIN).client.post("/v1/control/save_state", {})
    server.stop(save=False)
    for path in (tmp_path / "spool" / "uploads").glob("*.row"):
        absent(path)
    with server_at(opts) as again:
        a, b = Voice(again.address, "a"), Voice(again.address, "b")
        assert a.submit() == {"done": True}
        b.submit()
        until(lambda: a.news()["version"] == 1, "the round closes")


# An error of ours that must not come back: the journal of a checkpoint was done again over the one
# before it, so that the rounds between the two were left out and their version said otherwise.
def test_a_journal_is_not_done_again_over_an_older_checkpoint(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=100, outer_optimizer=plain_outer)
    before = killed_after(opts, 2, save=True)
    killed_after(opts, 2, first=2, save=True)
    killed_after(opts, 1, first=4)
    found = checkpoints.Checkpoints(tmp_path / "checkpoints", 0).all()
    assert checkpoints.load(found[-2])[1]["rounds"]["versions"] == [2]
    (found[-1] / checkpoints.STATE).write_bytes(b"half")
    with server_at(opts) as again:
        assert Voice(again.address).news()["version"] == 2
        assert weights_at(Voice(again.address)) == before
    after = killed_after(opts, 1, first=5)
    with server_at(opts) as again:
        assert Voice(again.address).news()["version"] == 3
        assert weights_at(Voice(again.address)) == after


# An error of ours that must not come back: the next start went on from the newest one.
def test_what_follows_a_named_checkpoint_outlives_a_kill(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=100, save_total_limit=0)
    killed_after(opts, 2, save=True)
    chosen = checkpoints.Checkpoints(tmp_path / "checkpoints", 0).all()[-1]
    killed_after(opts, 2, first=2, save=True)
    more = options(tmp_path, workers=1, save_every=100, from_checkpoint=chosen)
    before = killed_after(more, 1, first=4)
    with server_at(opts) as again:
        assert Voice(again.address).news()["version"] == 3
        assert weights_at(Voice(again.address)) == before


# An error of ours that must not come back: the second deleted what the first was receiving, and
# only then found that its port was taken.
def test_a_second_server_in_the_same_folder_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=1, outer_optimizer=plain_outer)
    with server_at(opts) as server:
        voice = Voice(server.address)
        voice.begin()
        upload = voice.ticket()["upload"]
        for port in (server.port, 0):
            with pytest.raises(SettingsError, match="end that one first, or give another -o"):
                server_at(opts, port).start()
        voice.put(f"/v1/uploads/{upload}", torch.full((1, voice.shape.size(0)), 0.1))
        until(lambda: voice.news()["version"] == 1, "the round closes")
    with server_at(opts) as again:
        assert Voice(again.address).news()["version"] == 1


# An error of ours that must not come back: who had left was a member again, and was waited for.
@pytest.mark.parametrize("kicked", [False, True], ids=["left", "kicked"])
def test_who_is_gone_stays_gone_when_the_server_is_killed(tmp_path: Path, kicked: bool) -> None:
    opts = options(tmp_path, workers=2, save_every=100, outer_optimizer=plain_outer)
    server = server_at(opts).start()
    a, b = Voice(server.address, "a"), Voice(server.address, "b")
    a.begin()
    b.begin()
    b.submit(0.5)
    if kicked:
        order = {"worker": "b"}
        Voice(server.address, "x", Scope.ADMIN).client.post("/v1/control/kick_worker", order)
    else:
        b.client.post("/v1/deregister", b.who)
    server.stop(save=False)
    with server_at(opts) as again:
        a = Voice(again.address, "a")
        assert list(a.status()["workers"]) == ["a"]
        assert a.status()["fragments"][0]["pending"] == ([] if kicked else ["b"])
        a.submit()
        until(lambda: a.news()["version"] == 1, "nobody else is waited for")


def test_going_on_from_a_named_checkpoint(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=1, save_total_limit=0)
    with server_at(opts) as server:
        voice = Voice(server.address)
        voice.begin()
        for base in range(4):
            voice.submit(0.1, base, base + 1)
            until(lambda base=base: voice.news()["version"] == base + 1, "a round")  # type: ignore[misc]
    found = checkpoints.Checkpoints(tmp_path / "checkpoints", 0).all()
    chosen = next(p for p in found if checkpoints.load(p)[1]["rounds"]["versions"] == [2])
    with server_at(options(tmp_path, workers=1, from_checkpoint=chosen)) as again:
        voice = Voice(again.address)
        assert voice.news()["version"] == 2
        voice.register()
        voice.submit(0.1, 4, 5)
        until(lambda: voice.news()["version"] == 3, "a base ahead of the server counts as fresh")


# An old failing that must not come back: a retry wiped the worker's local steps.
def test_workers_train_on_while_the_server_is_away(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=1, outer_optimizer=plain_outer)
    server = server_at(opts).start()
    fleet = Fleet(server.address, auth_token=Voice(server.address).token)
    worker = fleet.worker("a")
    model = fleet.models["a"]
    with worker:
        train(model, worker.optimizer, 1, 5)  # type: ignore[attr-defined]
        port = server.port
        server.stop(save=False)
        before = fleet.weights("a").clone()
        train(model, worker.optimizer, 2, 15)  # type: ignore[attr-defined]
        assert worker.local_step == 20
        assert not torch.equal(before, fleet.weights("a")), "nothing was taken back"
        trained = fleet.weights("a").clone()
        server = server_at(opts, port).start()
        until(
            lambda: (
                not worker._connection.down.is_set() or worker._submissions.pending[0].over.is_set()
            ),
            "back",
        )
    # One worker, lr 1 and no momentum: the server's weights are the worker's.
    assert torch.allclose(fleet.weights("a"), trained, atol=1e-6)
    assert worker.sync_count >= 3
    server.stop()


# An error of ours that must not come back: the training of all workers ended with the 500.
@pytest.mark.parametrize("what", ["take", "close"])
def test_workers_train_on_while_the_servers_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    opts = options(tmp_path, workers=1, save_every=100, outer_optimizer=plain_outer)
    full, said = threading.Event(), threading.Event()
    write = Journal.write

    def write_where_room_is(self: Journal, event: Event) -> None:
        if full.is_set() and event.kind == what:
            said.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, event)

    monkeypatch.setattr(Journal, "write", write_where_room_is)
    with server_at(opts) as server:
        voice = Voice(server.address)
        fleet = Fleet(server.address, auth_token=voice.token)
        worker = fleet.worker("a")
        optimizer = worker.optimizer  # type: ignore[attr-defined]
        with worker:
            full.set()
            train(fleet.models["a"], optimizer, 1, 15)
            assert said.is_set()
            full.clear()
            until(lambda: voice.version() >= 1, "the work is taken when there is room")
            train(fleet.models["a"], optimizer, 2, 5)
            trained = fleet.weights("a").clone()
        assert torch.allclose(fleet.weights("a"), trained, atol=1e-6), "nothing is lost"
        before = weights_at(voice)
        server.stop(save=False)
    with server_at(opts) as again:
        assert weights_at(Voice(again.address)) == before


def full_for_news(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, the disk fills up after the first chunk of a version."""
    full, publish = threading.Event(), OuterStep._publish

    def publish_where_room_is(self: OuterStep, index: int, memory: memoryview) -> None:
        if full.is_set() and index:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        publish(self, index, memory)

    monkeypatch.setattr(OuterStep, "_publish", publish_where_room_is)
    monkeypatch.setattr(chunks, "CHUNK", 64)
    return full


# An error of ours that must not come back: a traceback was all that the server said at its end.
def test_a_disk_that_fills_up_in_an_outer_step_ends_the_server_and_the_next_one_takes_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = full_for_news(monkeypatch)
    undisturbed = options(tmp_path / "undisturbed", workers=1, save_every=100)
    expected = killed_after(undisturbed, 2)
    opts = options(tmp_path / "out", workers=1, save_every=100)
    killed_after(opts, 1)
    server = server_at(opts).start()
    full.set()
    Voice(server.address).submit(0.2, 1, 2)
    with pytest.raises(StorageError, match=r"version 2 .*No space left .*free some room"):
        until(lambda: not server._thread.is_alive(), "it ends by itself")
        server.stop()
    with pytest.raises(StorageError, match="could not start: No space left"):
        server_at(opts).start()
    full.clear()
    with server_at(opts) as again:
        assert Voice(again.address).news()["version"] == 2
        assert weights_at(Voice(again.address)) == expected, "the same bits"


def test_a_disk_that_is_full_when_the_server_ends_costs_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opts = options(tmp_path, workers=1, save_every=100)

    def no_room(*_: object) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    server = server_at(opts).start()
    voice = Voice(server.address)
    voice.begin()
    until(lambda: voice.status()["checkpoints"], "the first checkpoint")
    voice.submit()
    until(lambda: voice.news()["version"] == 1, "a round")
    before = weights_at(voice)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", no_room)
        with pytest.raises(StorageError, match="last checkpoint was not written: No space left"):
            server.stop()
    with server_at(opts) as again:
        assert weights_at(Voice(again.address)) == before


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="could not start: Not a directory"):
        server_at(options(tmp_path / "file" / "out")).start()


# An error of ours that must not come back: the end gave up at once, and said that it had waited.
def test_the_last_steps_wait_for_a_server_that_is_being_restarted(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=1, outer_optimizer=plain_outer)
    server = server_at(opts).start()
    port, away = server.port, threading.Event()
    fleet = Fleet(server.address, auth_token=Voice(server.address).token)
    worker = fleet.worker("a")
    again: list[DiLoCoServer] = []

    def come_back() -> None:
        assert away.wait(30)
        again.append(server_at(opts, port).start())

    thread = threading.Thread(target=come_back)
    thread.start()
    with worker:
        train(fleet.models["a"], worker.optimizer, 1, 5)  # type: ignore[attr-defined]
        server.stop(save=False)
        train(fleet.models["a"], worker.optimizer, 2, 7)  # type: ignore[attr-defined]
        trained = fleet.weights("a").clone()
        until(worker._connection.down.is_set, "it knows that nobody is there")
        away.set()
    thread.join()
    assert torch.allclose(fleet.weights("a"), trained, atol=1e-6)
    voice = Voice(again[0].address)
    assert voice.version() == worker.version >= 2
    assert voice.news()["identity"] == worker._weights.identity(0), "the server has them too"
    again[0].stop()


def test_a_server_that_forgot_everything_gets_the_weights_again(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=0, outer_optimizer=plain_outer)
    server = server_at(opts).start()
    fleet = Fleet(server.address, auth_token=Voice(server.address).token)
    worker = fleet.worker("a")
    with worker:
        train(fleet.models["a"], worker.optimizer, 1, 5)  # type: ignore[attr-defined]
        port = server.port
        server.stop(save=False)
        train(fleet.models["a"], worker.optimizer, 2, 7)  # type: ignore[attr-defined]
        trained = fleet.weights("a").clone()
        server = server_at(opts, port).start()
        until(lambda: worker._connection.reconnections, "it registers again")
    assert torch.allclose(fleet.weights("a"), trained, atol=1e-6)
    server.stop()
