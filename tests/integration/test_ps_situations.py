"""Situations that workers and a server get into, over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ps import Fleet, Net, options, plain_outer, train
from helpers.waiting import until
from integration.test_ps_faults import TOKENS, Voice
from safetensors.torch import load_file, save_file

from torchft.errors import MismatchError, SettingsError, UnreachableError
from torchft.parameter_server.core import chunks
from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.refused import Conflict
from torchft.parameter_server.core.rules import Mode
from torchft.parameter_server.core.shape import ModelShape, Parameter
from torchft.parameter_server.server.server import Address, DiLoCoServer
from torchft.parameter_server.worker.client import DiLoCoClient
from torchft.parameter_server.worker.weights import WorkerWeights
from torchft.parameter_server.worker.worker import DiLoCoWorker
from torchft.quantization import Identity
from torchft.strategies.local import Fragment


def step(fleet: Fleet, name: str, seed: int, steps: int) -> None:
    worker: Any = fleet.workers[name]
    train(fleet.models[name], worker.optimizer, seed, steps)


# ---------------------------------------------------------------------- where a run begins


def saved_model(folder: Path, **changes: torch.Tensor) -> Path:
    """As save_pretrained leaves it: a tied weight once."""
    folder.mkdir()
    tensors = {n: t.clone() for n, t in Net(seed=9).state_dict().items() if n != "head.weight"}
    save_file({**tensors, **changes}, folder / "model.safetensors")
    return folder


# An error of ours that must not come back: the model was ignored without a word.
def test_a_model_for_a_folder_that_has_a_run_is_not_read_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DiLoCoServer(options(tmp_path / "out", workers=1)) as server:
        fleet = Fleet(server.address)
        with fleet.worker("a", seed=1):
            step(fleet, "a", 1, 5)
    folder = saved_model(tmp_path / "model")
    with DiLoCoServer(options(tmp_path / "out", workers=1, model=folder)) as server:
        more = Fleet(server.address)
        with more.worker("a", seed=2):
            assert torch.equal(more.weights("a"), fleet.weights("a")), "the run's own"
    assert f"the model in {folder} is not read" in caplog.text


def test_a_run_begins_with_the_model_in_a_folder(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", **{"norm.running_mean": torch.full((6,), 3.0)})
    with DiLoCoServer(options(tmp_path / "out", workers=1, model=folder)) as server:
        fleet = Fleet(server.address)
        with fleet.worker("a", seed=1):
            began = fleet.weights("a").clone()
            step(fleet, "a", 1, 5)
    trained = [p.detach().reshape(-1) for p in Net(seed=9).parameters() if p.requires_grad]
    assert torch.equal(began, torch.cat(trained)), "not the worker's own"
    newest = max((tmp_path / "out" / "checkpoints").iterdir(), key=lambda p: p.stat().st_mtime)
    saved = load_file(newest / "model.safetensors")
    assert torch.equal(saved["norm.running_mean"], torch.full((6,), 3.0)), (
        "what nobody trains stays"
    )
    assert not torch.equal(saved["h.1.weight"], Net(seed=9).h[1].weight)


def test_a_model_of_another_shape_or_none_is_refused_in_words(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", **{"h.1.weight": torch.ones(2, 3)})
    words = r"h\.1\.weight is \[6, 6\] .* and \[2, 3\]"
    opts = options(tmp_path / "out", workers=1, model=folder)
    with DiLoCoServer(opts) as server, pytest.raises(MismatchError, match=words):
        Fleet(server.address).worker("a").start()
    (tmp_path / "empty").mkdir()
    opts = options(tmp_path / "other", workers=1, model=tmp_path / "empty")
    with pytest.raises(SettingsError, match=r"has no \.safetensors file"):
        DiLoCoServer(opts).start()


# ---------------------------------------------------------------------- speeds and schedules


def test_a_slow_worker_gets_fewer_steps(tmp_path: Path) -> None:
    opts = options(tmp_path, mode=Mode.ASYNCHRONOUS, grace_s=0.4, dylu=True, sync_every=40)
    with DiLoCoServer(opts) as server:
        fleet, end = Fleet(server.address, dylu=True, sync_every=40), threading.Event()
        threads = []
        for name, pause_s in (("fast", 0.002), ("slow", 0.03)):
            worker = fleet.worker(name)

            def run(
                worker: DiLoCoWorker = worker, name: str = name, pause_s: float = pause_s
            ) -> None:
                with worker:
                    while not end.wait(pause_s):
                        step(fleet, name, 1, 1)

            threads.append(threading.Thread(target=run, daemon=True))
            threads[-1].start()
        slow, fast = fleet.workers["slow"], fleet.workers["fast"]
        try:
            until(lambda: slow.sync_count >= 3 and slow.sync_every <= 20, "it gets half or less")
            assert fast.sync_every > slow.sync_every
        finally:
            end.set()
            for thread in threads:
                thread.join(30)
        assert not any(thread.is_alive() for thread in threads)


@contextlib.contextmanager
def ending_together(*workers: DiLoCoWorker) -> Iterator[None]:
    """Each waits for the other's last work."""
    for worker in workers:
        worker.start()
    yield
    threads = [threading.Thread(target=worker.stop, daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_several_fragments_are_in_flight_at_once(tmp_path: Path) -> None:
    with DiLoCoServer(options(tmp_path, workers=2)) as server:
        fleet = Fleet(server.address, num_fragments=4, sync_every=8, codec="int8", in_flight=3)
        a, b = fleet.worker("a"), fleet.worker("b", seed=1)
        with ending_together(a, b):
            step(fleet, "a", 1, 7)
            assert a.metrics()["diloco/in_flight"] == 3, "nobody has answered, and nobody waits"
            assert a.sync_count == 0
            step(fleet, "b", 2, 7)
            until(lambda: a._submissions.are_over(), "b has submitted too")
            step(fleet, "a", 3, 1)
            assert a.sync_count == 3, "all three land at the next slot"
            step(fleet, "b", 4, 1)
    assert torch.equal(fleet.weights("a"), fleet.weights("b"))


# ---------------------------------------------------------------------- networks that break


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Numbers in a chunk: whole blocks of every codec, and several chunks to a small model."""
    monkeypatch.setattr(chunks, "CHUNK", 64)
    return 64


def plug_is_pulled(pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield next(pieces)
    yield next(pieces)
    raise OSError("the test pulls the plug")


def third_is_damaged(pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield next(pieces)
    yield next(pieces)
    damaged = bytearray(next(pieces))
    damaged[5] ^= 1
    yield bytes(damaged)


def network_stalls(pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield next(pieces)
    yield next(pieces)
    time.sleep(1.0)  # twice as long as the server waits for the next byte
    yield next(pieces)


@pytest.mark.parametrize("trouble", [plug_is_pulled, third_is_damaged, network_stalls])
def test_an_upload_that_broke_in_its_third_chunk_goes_on_there(
    tmp_path: Path, small_chunks: int, monkeypatch: pytest.MonkeyPatch, trouble: Any
) -> None:
    put, begun = DiLoCoClient.put, []

    def breaks_once(self: DiLoCoClient, path: str, pieces: Any, nbytes: int, **query: Any) -> Any:
        if not path.startswith("/v1/uploads"):
            return put(self, path, pieces, nbytes, **query)
        begun.append(query["from"])
        return put(self, path, trouble(pieces) if len(begun) == 1 else pieces, nbytes, **query)

    monkeypatch.setattr(DiLoCoClient, "put", breaks_once)
    address = Address(port=0, read_timeout_s=0.5)
    with DiLoCoServer(options(tmp_path, workers=1, outer_optimizer=plain_outer), address) as server:
        fleet = Fleet(server.address)
        with fleet.worker("a") as worker:
            assert Chunks(worker._weights.shape.size(0), Identity()).count == 3
            step(fleet, "a", 1, 5)
            if not worker.sync_count:  # the plug was pulled: training did not wait
                until(
                    lambda: worker._submissions.pending[0].over.is_set(), "it arrives all the same"
                )
                step(fleet, "a", 2, 5)
        assert worker.sync_count >= 1 and worker.refused == 0
        assert begun[0] == 0
        # The server may not have looked at the second one yet when it is asked what it has.
        assert begun[1] in (1, 2) if trouble is plug_is_pulled else begun[1] == 2


class Wide(Voice):
    """Its model has so many numbers that no socket takes all of them."""

    SIZE = 6 << 20

    def __init__(self, server: str, worker: str) -> None:
        super().__init__(server, worker)
        self.shape = ModelShape((Parameter("w", (self.SIZE,), "float32"),), (Fragment(0, (0,)),))


# An error of ours that must not come back: it waited ten minutes without a word.
def test_a_worker_says_what_it_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet("127.0.0.1:1", timeout_s=0.5)
    began = time.monotonic()
    with caplog.at_level("WARNING"), pytest.raises(UnreachableError):
        fleet.worker("a").start()
    assert time.monotonic() - began < 10
    assert "no answer from the parameter server at 127.0.0.1:1" in caplog.text
    assert caplog.text.count("asking again for up to 0.5 s") == 1


# An error of ours that must not come back: the 502 of a proxy ended the training.
@pytest.mark.parametrize("status", [500, 502, 504, 507])
def test_a_server_or_proxy_in_trouble_is_one_that_is_away(status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(
                    f"HTTP/1.1 {status} No\r\nContent-Length: 4\r\n\r\nwhy!".encode()
                )

        thread = threading.Thread(target=serve)
        thread.start()
        client = DiLoCoClient(f"127.0.0.1:{listener.getsockname()[1]}", timeout_s=5.0)
        with pytest.raises(UnreachableError, match=f"{status}, why!"):
            client.post("/v1/heartbeat", {})
        client.close()
        thread.join()


def test_a_slow_reader_of_many_bytes_holds_up_nobody(tmp_path: Path) -> None:
    opts = options(tmp_path, workers=1, outer_optimizer=plain_outer)
    with DiLoCoServer(opts, Address(port=0, tokens=TOKENS)) as server:
        slow, other = Wide(server.address, "slow"), Wide(server.address, "other")
        slow.begin()
        name = slow.news()["files"][0]
        reader = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        reader.request(
            "GET", f"/v1/files/{name}", headers={"Authorization": f"Bearer {slow.token}"}
        )
        reply = reader.getresponse()
        received = reply.read(1)
        slow.client.post("/v1/deregister", slow.who)
        other.begin()
        for base in range(3):
            other.submit(0.01, base, base + 1)
            until(lambda base=base: other.news()["version"] == base + 1, "a round")  # type: ignore[misc]
        received += reply.read()
        reader.close()
        whole = Chunks(Wide.SIZE, Identity())
        assert len(received) == whole.nbytes
        for index in range(whole.count):
            at = whole.offset(index)
            whole.check(index, memoryview(received[at : at + whole.nbytes_of(index)]))


# ---------------------------------------------------------------------- bases and names


def test_a_damaged_base_leads_to_all_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    apply, damaged = WorkerWeights.apply, []

    def damages(self: WorkerWeights, fragment: int, *rest: Any) -> str:
        if not damaged:
            damaged.append(fragment)
            self._bases[fragment][0, 3] += 1.0
        return apply(self, fragment, *rest)

    monkeypatch.setattr(WorkerWeights, "apply", damages)
    with DiLoCoServer(options(tmp_path, workers=1)) as server:
        fleet = Fleet(server.address, codec="int8")
        with fleet.worker("a") as worker:
            with caplog.at_level("WARNING"):
                step(fleet, "a", 1, 5)
            assert "the base of fragment 0 was damaged: fetching all of it" in caplog.text
            news = Voice(server.address, scope=None).news()
            assert worker.bases[0].shape[1] == worker._weights.shape.size(0)
            assert worker._weights.identity(0) == news["identity"]
            assert worker.sync_count == 1
            whole = Chunks(worker._weights.shape.size(0), Identity())
            assert worker.last_receive_bytes == whole.nbytes
            step(fleet, "a", 2, 5)
            assert worker.sync_count == 2


def test_a_base_that_was_damaged_before_gets_all_weights_from_the_server(tmp_path: Path) -> None:
    with DiLoCoServer(options(tmp_path, workers=1)) as server:
        fleet = Fleet(server.address, codec="int8")
        with fleet.worker("a") as worker:
            n = worker._weights.shape.size(0)
            step(fleet, "a", 1, 5)
            assert worker.last_receive_bytes < Chunks(n, Identity()).nbytes / 2, "a difference"
            step(fleet, "a", 2, 4)
            worker.bases[0][0, 3] += 1e-3
            step(fleet, "a", 3, 1)
            assert worker.last_receive_bytes == Chunks(n, Identity()).nbytes
            identity = Voice(server.address, scope=None).news()["identity"]
            assert worker._weights.identity(0) == identity


def test_a_second_process_under_the_same_id_is_refused_and_the_first_trains_on(
    tmp_path: Path,
) -> None:
    with DiLoCoServer(options(tmp_path, workers=1, grace_s=1.0)) as server:
        fleet, twins = Fleet(server.address), Fleet(server.address)
        with fleet.worker("a") as first:
            twin = twins.worker("a", seed=1, timeout_s=0.5)
            with pytest.raises(Conflict, match="another process with this id was heard"):
                twin.start()
            step(fleet, "a", 1, 10)
            assert first.sync_count == 2


def test_a_worker_that_falls_silent_is_not_waited_for_beyond_the_grace_window(
    tmp_path: Path,
) -> None:
    with DiLoCoServer(options(tmp_path, workers=2, grace_s=1.0)) as server:
        fleet = Fleet(server.address)
        silent, other = fleet.worker("silent").start(), fleet.worker("other", seed=1).start()
        silent._connection._left.set()  # its host has vanished
        began = time.monotonic()
        step(fleet, "other", 1, 5)
        assert other.sync_count == 1
        assert time.monotonic() - began < 20, "not by the 30 s that it would have beaten in"
        other.stop()
        silent.stop(submit=False)


def test_a_process_that_was_killed_leaves_its_id_to_the_next(tmp_path: Path) -> None:
    with DiLoCoServer(options(tmp_path, workers=1, grace_s=1.0)) as server:
        fleet, successors = Fleet(server.address), Fleet(server.address)
        first = fleet.worker("a").start()
        step(fleet, "a", 1, 5)
        first._connection._left.set()  # it says nothing any more, not even that it leaves
        with successors.worker("a", seed=1) as second:
            assert torch.equal(successors.weights("a"), fleet.weights("a"))
            step(successors, "a", 2, 5)
            assert second.sync_count == 1
            status = Voice(server.address, "x", None).status()
            assert status["departures"] == {"replaced": 1}
        first.stop(submit=False)
