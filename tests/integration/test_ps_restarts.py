"""The server goes away and comes back: nothing that was counted is lost, and workers train on."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.ps import Fleet, options, plain_outer, train, until
from integration.test_ps_faults import TOKENS, Voice

from torchft.parameter_server import checkpoints
from torchft.parameter_server.options import ServerOptions
from torchft.parameter_server.server import Address, DiLoCoServer


def server_at(opts: ServerOptions, port: int = 0) -> DiLoCoServer:
    return DiLoCoServer(opts, Address(port=port, tokens=TOKENS))


def weights_at(voice: Voice) -> str:
    return str(voice.news()["identity"])


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
    opts = options(tmp_path, workers=1, save_every=100, outer=plain_outer)
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
    opts = options(tmp_path, workers=1, save_every=1, outer=plain_outer)
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
        until(lambda: not worker._link.down.is_set() or worker._flights[0].over.is_set(), "back")
    # One worker, lr 1 and no momentum: the server's weights are the worker's.
    assert torch.allclose(fleet.weights("a"), trained, atol=1e-6)
    assert worker.sync_count >= 3
    server.stop()


def test_a_server_that_forgot_everything_gets_the_weights_again(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, save_every=0, outer=plain_outer)
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
        until(lambda: worker._link.reconnections, "it registers again")
    assert torch.allclose(fleet.weights("a"), trained, atol=1e-6)
    server.stop()
