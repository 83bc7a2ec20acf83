"""What broke older servers, done to ours: the sender hears why, and nobody else notices.

An old failing that must not come back: every one in this file.
"""

from __future__ import annotations

import http.client
import os
import pickle
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ps import Fleet, options, plain_outer, train
from helpers.voices import TOKENS, Voice, raw
from helpers.waiting import until

from torchft.errors import SettingsError, UnreachableError
from torchft.parameter_server.auth import Scope
from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.refused import (
    Conflict,
    Forbidden,
    Gone,
    NotFound,
    Refused,
    TooLarge,
    Unauthorized,
    Unfit,
)
from torchft.parameter_server.server import checkpoints
from torchft.parameter_server.server.server import Address, DiLoCoServer
from torchft.parameter_server.worker.client import DiLoCoClient
from torchft.quantization import Identity


@pytest.fixture
def server(tmp_path: Path) -> Iterator[DiLoCoServer]:
    address = Address(port=0, tokens=TOKENS, read_timeout_s=1.0)
    with DiLoCoServer(options(tmp_path, outer_optimizer=plain_outer, grace_s=1.0), address) as one:
        yield one


def lives(server: DiLoCoServer) -> bool:
    """A whole round of two honest workers."""
    a, b = Voice(server.address, "a"), Voice(server.address, "b")
    a.begin()
    b.begin()
    before = a.version()
    a.submit(base=before, number=before + 1)
    b.submit(base=before, number=before + 1)
    until(lambda: a.version() == before + 1, "the honest round closes")
    return True


def post(server: DiLoCoServer, path: str, body: bytes, kind: str = "application/json") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    token = TOKENS.by_scope[Scope.ADMIN]
    connection.request(
        "POST", path, body, {"Content-Type": kind, "Authorization": f"Bearer {token}"}
    )
    return connection.getresponse().status


class Payload:
    """What code would be run by a server that unpickles."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/parameter-server-was-fooled",))


@pytest.mark.parametrize(
    "body",
    [b"", b"\x00\xff" * 500, b"[1, 2]", b"{" * 100_000, pickle.dumps(Payload()), b'{"worker": 3}'],
)
@pytest.mark.parametrize("path", ["register", "heartbeat", "tickets", "news"])
def test_garbage_is_a_4xx(server: DiLoCoServer, path: str, body: bytes) -> None:
    assert 400 <= post(server, f"/v1/{path}", body) < 500
    assert Voice(server.address).status()["workers"] == {}


def test_garbage_as_an_upload_is_a_4xx_and_the_round_goes_on(server: DiLoCoServer) -> None:
    voice = Voice(server.address)
    voice.begin()
    where = f"/v1/uploads/{voice.ticket()['upload']}"
    size = Chunks(voice.shape.size(0), Identity()).nbytes
    with pytest.raises(Refused, match="checksum"):
        voice.client.put(where, iter([b"x" * size]), size)
    with pytest.raises(TooLarge):
        voice.client.put(where, iter([b"x"]), 4 << 30)
    voice.client.post("/v1/deregister", voice.who)
    assert lives(server)


def test_a_body_that_never_comes_ends_after_the_read_deadline(server: DiLoCoServer) -> None:
    voice = Voice(server.address)
    voice.begin()
    upload = voice.ticket()["upload"]
    size = Chunks(voice.shape.size(0), Identity()).nbytes
    head = (
        f"PUT /v1/uploads/{upload}?from=0 HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n"
        f"Authorization: Bearer {voice.token}\r\n\r\n"
    )
    assert b" 408 " in raw(server, head.encode())


def test_gigantic_json_is_not_read(server: DiLoCoServer) -> None:
    token = TOKENS.by_scope[Scope.WORKER]
    head = (
        "POST /v1/register HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {token}\r\nContent-Length: 4294967296\r\n\r\n"
    )
    answer = raw(server, head.encode() + b"{" * 100)
    assert b" 408 " in answer or b" 413 " in answer


# An error of ours that must not come back: these were a 500.
@pytest.mark.parametrize("codec", [["int8"], {"int8": 1}, 8])
def test_a_wish_that_is_no_name_of_a_codec_is_a_4xx(server: DiLoCoServer, codec: object) -> None:
    with pytest.raises(Refused, match="codec"):
        Voice(server.address).register(wished={"codec": codec})
    assert lives(server)


# An error of ours that must not come back: all workers were told to train 10³⁰ steps by themselves.
@pytest.mark.parametrize("name", ["sync_every", "fragments"])
@pytest.mark.parametrize("number", [10**30, 1_000_001, 0, -1, 1.5, True, "5", [5]])
def test_a_wish_that_is_no_sane_number_is_a_4xx(
    server: DiLoCoServer, name: str, number: object
) -> None:
    with pytest.raises(Refused, match=f"{name}=.*an integer, at least 1 and at most 1000000"):
        Voice(server.address).register(wished={name: number})
    assert lives(server)


@pytest.mark.parametrize("least", ["x", None, 1.5, True, 0])
def test_a_minimum_that_is_no_number_of_workers_is_a_4xx(
    server: DiLoCoServer, least: object
) -> None:
    assert lives(server)
    admin = Voice(server.address, "a", Scope.ADMIN)
    with pytest.raises(Refused, match=r"min_workers=.*an integer"):
        order = {"num_workers": 2, "min_workers": least}
        admin.client.post("/v1/control/update_num_workers", order)


def test_a_token_of_any_bytes_is_no_valid_one(server: DiLoCoServer) -> None:
    head = b"GET /v1/status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n"
    assert b" 401 " in raw(server, head)


def test_another_model_is_refused_by_name_and_nobody_waits(server: DiLoCoServer) -> None:
    first = Voice(server.address, "first")
    first.begin()
    other = Voice(server.address, "other")
    wrong = other.shape.to_json()
    wrong["parameters"][0][1] = [3, 12]
    with pytest.raises(Unfit, match=r"h\.0\.weight is \[3, 12\] float32 there"):
        other.register(model=wrong)
    with pytest.raises(Unfit, match="another model"):
        first.ticket(fingerprint="0" * 64)
    first.client.post("/v1/deregister", first.who)
    assert lives(server)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_numbers_that_would_spoil_the_weights(server: DiLoCoServer, bad: float) -> None:
    assert lives(server)
    voice = Voice(server.address, "a")
    version = voice.version()
    with pytest.raises(Unfit, match="diverged"):
        voice.submit(bad, base=version, number=version + 1)
    assert voice.version() == version
    assert voice.submit(base=version, number=version + 1) == {"done": True}


def test_one_that_is_not_registered_counts_nothing(server: DiLoCoServer) -> None:
    assert lives(server)
    with pytest.raises(Gone, match="not registered"):
        Voice(server.address, "stranger").ticket()
    with pytest.raises(Gone, match="register again"):
        stranger = Voice(server.address, "stranger")
        stranger.client.post("/v1/heartbeat", stranger.who)


def test_strangers_and_small_tokens(server: DiLoCoServer) -> None:
    with pytest.raises(Unauthorized, match="no valid token"):
        Voice(server.address, scope=None).register()
    with pytest.raises(Forbidden, match="worker, not read"):
        Voice(server.address, scope=Scope.READ).register()
    assert Voice(server.address, scope=Scope.READ).status()["rounds"] == 0
    for order in ("shutdown", "save_state", "kick_worker"):
        with pytest.raises(Forbidden, match="admin, not worker"):
            Voice(server.address).client.post(f"/v1/control/{order}", {})


def test_a_form_of_another_site_is_refused(server: DiLoCoServer) -> None:
    assert post(server, "/v1/control/shutdown", b"{}", "text/plain") == 400
    assert lives(server)


def test_two_workers_under_one_id(server: DiLoCoServer) -> None:
    Voice(server.address).register(beat_s=0.3)
    twin = Voice(server.address)
    twin.who["session"] = "another"
    with pytest.raises(Conflict, match="another process with this id"):
        twin.register()


def test_an_impostor_does_not_close_the_round(server: DiLoCoServer) -> None:
    assert lives(server)
    a, c = Voice(server.address, "a"), Voice(server.address, "c")
    c.begin()
    version = a.version()
    a.submit(base=version, number=version + 1)
    c.submit(base=version, number=1)
    assert a.news(base=version, wait_s=0.0)["version"] == version, "b is still waited for"
    assert "b" in a.status()["fragments"][0]["waiting"]


def test_orders_of_the_admin(server: DiLoCoServer) -> None:
    assert lives(server)
    admin = Voice(server.address, "a", Scope.ADMIN)
    version = admin.version()
    admin.submit(base=version, number=version + 1)
    admin.client.post("/v1/control/kick_worker", {"worker": "b"})
    until(lambda: admin.version() == version + 1, "b is not waited for")
    with pytest.raises(NotFound):
        admin.client.post("/v1/control/kick_worker", {"worker": "b"})
    with pytest.raises(Refused, match="no round could close"):
        admin.client.post("/v1/control/update_num_workers", {"num_workers": 1, "min_workers": 5})
    admin.client.post("/v1/control/update_num_workers", {"num_workers": 5, "min_workers": 3})
    admin.client.post("/v1/control/update_num_workers", {"num_workers": 4})
    assert [admin.status()[name] for name in ("num_workers", "min_workers")] == [4, 3]
    assert "checkpoint" in admin.client.post("/v1/control/save_state", {})


def test_a_slow_reader_holds_up_nobody(server: DiLoCoServer) -> None:
    assert lives(server)
    voice = Voice(server.address, "a")
    name = voice.news()["files"][0]
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        head = f"GET /v1/files/{name} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {voice.token}"
        slow.sendall(f"{head}\r\n\r\n".encode())
        assert lives(server)
    with pytest.raises(NotFound), voice.client.reading("../../journal/00000000.jsonl", 1):
        pytest.fail("the journal can be read")


def test_nobody_is_waited_for_longer_because_it_wished_to_be_heard_seldom(
    server: DiLoCoServer,
) -> None:
    voice, dead = Voice(server.address, "a"), Voice(server.address, "dead")
    voice.begin()
    dead.register(beat_s=30.0)
    voice.submit()
    began = time.monotonic()
    until(lambda: voice.version() == 1, "the dead one is taken for silent")
    assert time.monotonic() - began < 30


def test_silent_connections_hold_up_nobody(server: DiLoCoServer) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    assert lives(server)
    for connection in silent:
        connection.close()


def test_a_broken_upload_goes_on_where_it_broke(server: DiLoCoServer) -> None:
    assert lives(server)
    voice = Voice(server.address, "a")
    version = voice.version()
    upload = voice.ticket(version, version + 1)["upload"]
    size = Chunks(voice.shape.size(0), Identity()).nbytes
    with pytest.raises(UnreachableError):
        voice.client.put(f"/v1/uploads/{upload}", _cut(), size)
    assert voice.ticket(version, version + 1)["have"] == 0
    assert voice.submit(base=version, number=version + 1) == {"done": True}
    assert voice.ticket(version, version + 1) == {"done": True}


def _cut() -> Iterator[bytes]:
    yield b"x" * 100
    raise OSError("the test pulls the plug")


def test_the_servers_settings_hold_and_the_worker_is_told(tmp_path: Path) -> None:
    with DiLoCoServer(options(tmp_path, sync_every=7, codec="int8")) as server:
        voice = Voice(server.address, scope=None)
        voice.who["session"] = "s"
        reply = voice.register()
        assert reply["agreed"] == {"sync_every": 7, "codec": "int8", "fragments": 1}
        assert reply["differences"] == [
            "sync_every 7, not 5",
            "codec int8, not fp32",
        ]


def test_a_worker_whose_numbers_are_refused_goes_back_to_the_common_weights(
    tmp_path: Path,
) -> None:
    with DiLoCoServer(options(tmp_path, workers=1)) as server:
        fleet = Fleet(server.address)
        worker = fleet.worker("a")
        with worker, torch.no_grad():
            fleet.models["a"].h[1].weight[0, 0] = float("nan")  # type: ignore[index,union-attr]
            for _ in range(5):
                worker.optimizer.step()  # type: ignore[attr-defined]
        assert worker.refused == 1
    assert bool(fleet.weights("a").isfinite().all())


def test_a_worker_with_nan_in_its_moments_is_refused_once(tmp_path: Path) -> None:
    """Only the weights went back, and the next step spoilt them again."""
    with DiLoCoServer(options(tmp_path, workers=1)) as server:
        fleet = Fleet(server.address)
        worker = fleet.worker("a")
        worker.optimizer.param_groups[0]["momentum"] = 0.9  # type: ignore[attr-defined]
        with worker:
            for step in range(20):
                for p in fleet.models["a"].parameters():
                    p.grad = torch.full_like(p, float("nan") if step == 3 else 1.0)
                worker.optimizer.step()  # type: ignore[attr-defined]
        assert worker.refused == 1
        assert worker.sync_count >= 2
    assert bool(fleet.weights("a").isfinite().all())


def test_an_answer_that_is_cut_is_no_end_of_training() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = DiLoCoClient(f"127.0.0.1:{listener.getsockname()[1]}", timeout_s=5.0)
        import threading

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{}}")
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UnreachableError, match="IncompleteRead"):
            client.get("/v1/status")
        thread.join()


def test_a_silent_server_is_no_end_of_training() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = DiLoCoClient(f"127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.2)
        with pytest.raises(UnreachableError, match="TimeoutError"):
            client.get("/v1/status")


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    with DiLoCoServer(options(tmp_path, workers=1, save_every=1, save_total_limit=0)) as server:
        fleet = Fleet(server.address)
        fleet.run("a", 15)
        fleet.join()
    folder = tmp_path / "checkpoints"
    found = checkpoints.Checkpoints(folder, 0).all()
    assert len(found) >= 3
    (found[-1] / checkpoints.STATE).write_bytes(b"half")
    (found[-2] / checkpoints.MANIFEST).unlink()
    number, _ = checkpoints.Checkpoints(folder, 0).newest() or (None, None)
    assert number == len(found) - 2
    for path in found:
        (path / checkpoints.MODEL).write_bytes(b"")
    with pytest.raises(SettingsError, match="none of the"):
        checkpoints.Checkpoints(folder, 0).newest()


def test_fragments_are_saved_too(tmp_path: Path) -> None:
    with DiLoCoServer(options(tmp_path, workers=1, save_every=1)) as server:
        fleet = Fleet(server.address, num_fragments=3)
        fleet.run("a", 20)
        fleet.join()
    saved = checkpoints.Checkpoints(tmp_path / "checkpoints", 3).newest()
    assert saved is not None
    assert saved[1]["rounds"]["versions"] == [5, 5, 4], "12 slots, and the last steps of two"


def test_a_joiner_in_the_middle_of_a_cycle_stalls_nobody(tmp_path: Path) -> None:
    with DiLoCoServer(options(tmp_path, workers=1)) as server:
        fleet = Fleet(server.address, num_fragments=4, sync_every=8)
        first = fleet.worker("a")
        model = fleet.models["a"]
        with first:
            train(model, first.optimizer, 1, 5)  # type: ignore[attr-defined]
            fleet.run("b", 40, seed=2)
            until(
                lambda: Voice(server.address, scope=None).status()["workers"].get("b"), "b is there"
            )
            train(model, first.optimizer, 3, 40)  # type: ignore[attr-defined]
        fleet.join()
        deaths = Voice(server.address, scope=None).status()["total_worker_deaths"]
    assert deaths == 0
    assert fleet.workers["b"].sync_count >= 12
