"""Bad input and passed deadlines: each error names the value, or who was waited for, and why."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import pytest
from helpers.coordination import ask, at_once, free_port, group, lighthouse, seconds

from torchft.coordination import LighthouseClient, LighthouseServer, ManagerClient, ManagerServer
from torchft.errors import MismatchError, SettingsError, TorchftError, UnreachableError


def manager(**changed: object) -> ManagerServer:
    options: dict[str, object] = {
        "replica_id": "a:1",
        "lighthouse_addr": "http://127.0.0.1:1",
        "hostname": "127.0.0.1",
        "bind": "127.0.0.1:0",
        "store_addr": "",
        "world_size": 1,
        "heartbeat_interval": seconds(0.1),
        "connect_timeout": seconds(0.2),
        "quorum_retries": 0,
    }
    return ManagerServer(**{**options, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["localhost:29510", "https://a:1", "http://a", "http://a:1/x"])
@pytest.mark.parametrize("client", [LighthouseClient, ManagerClient])
def test_an_address_of_another_form_names_the_value_and_the_form(
    client: type[LighthouseClient], address: str
) -> None:
    with pytest.raises(SettingsError, match=r"http://host:port") as error:
        client(address, connect_timeout=seconds(1))
    assert repr(address)[1:-1] in str(error.value)


def test_a_manager_names_the_wrong_lighthouse_address() -> None:
    with pytest.raises(SettingsError, match=r'lighthouse address "localhost:1".*http://host:port'):
        manager(lighthouse_addr="localhost:1")


def test_an_absent_lighthouse_is_named_with_its_address_and_the_deadline() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=rf"lighthouse {address} within 300ms.*refused"):
        manager(lighthouse_addr=address, connect_timeout=seconds(0.3))
    assert time.monotonic() - began < 1


def test_an_unreachable_server_is_a_timeout_and_a_runtime_error() -> None:
    with pytest.raises(TimeoutError) as error:
        LighthouseClient(f"http://127.0.0.1:{free_port()}", connect_timeout=seconds(0.1))
    assert isinstance(error.value, RuntimeError)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_replicas": 0}, "min_replicas is 0, but must be from 1"),
        ({"min_replicas": -3}, "min_replicas is -3"),
        ({"min_replicas": 1, "join_timeout_ms": -1}, "join_timeout_ms is -1"),
        ({"min_replicas": 1, "quorum_tick_ms": 0}, "quorum_tick_ms is 0"),
        ({"min_replicas": 1, "heartbeat_timeout_ms": 0}, "heartbeat_timeout_ms is 0"),
    ],
)
def test_a_lighthouse_option_out_of_range_is_named(options: dict[str, int], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        LighthouseServer("127.0.0.1:0", **options)


@pytest.mark.parametrize("bind", ["29510", ":29510", "http://127.0.0.1:1", "127.0.0.1:99999"])
def test_a_bind_address_of_another_form_names_the_form(bind: str) -> None:
    with pytest.raises(SettingsError, match="host:port"):
        LighthouseServer(bind, 1)


def test_a_taken_port_says_so() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"127.0.0.1:{port}: the port is taken"):
            LighthouseServer(f"127.0.0.1:{port}", 1)
        with pytest.raises(SettingsError, match="the port is taken"):
            manager(bind=f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"replica_id": ""}, "replica_id is empty"),
        ({"world_size": 0}, "world_size is 0"),
        ({"heartbeat_interval": seconds(0)}, "heartbeat_interval is 0"),
        ({"quorum_retries": -1}, "quorum_retries is -1"),
    ],
)
def test_a_manager_option_that_makes_no_sense_is_named(
    changed: dict[str, object], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        manager(**changed)


def test_a_deadline_at_the_lighthouse_keeps_the_known_words_and_says_why() -> None:
    with lighthouse(2) as server:
        client = LighthouseClient(server.address(), connect_timeout=seconds(5))
        began = time.monotonic()
        with pytest.raises(TimeoutError, match=r"status: Cancelled, message.*Timeout expired") as e:
            client.quorum("a:1", timeout=seconds(1))
        assert "1 of at least 2 replicas ask (min_replicas)" in str(e.value)
        assert time.monotonic() - began < 2


def test_a_deadline_in_the_manager_hands_the_lighthouses_reason_on() -> None:
    with lighthouse(2) as server, group(server.address()) as manager:
        client = ManagerClient(manager.address(), connect_timeout=seconds(5))
        with pytest.raises(TimeoutError, match="1 of at least 2 replicas ask"):
            ask(client, timeout=1)


def test_a_deadline_names_the_rank_that_did_not_ask() -> None:
    with lighthouse() as server, group(server.address(), world_size=2) as manager:
        client = ManagerClient(manager.address(), connect_timeout=seconds(5))
        with pytest.raises(TimeoutError, match=r"ranks \[1\]"):
            ask(client, 0, timeout=0.5)


def test_a_deadline_names_the_rank_that_did_not_vote() -> None:
    with lighthouse() as server, group(server.address(), world_size=2) as manager:
        client = ManagerClient(manager.address(), connect_timeout=seconds(5))
        with pytest.raises(TimeoutError, match=r"ranks \[1\]"):
            client.should_commit(0, 5, True, timeout=seconds(0.5))


def test_a_very_short_deadline_is_a_timeout_too() -> None:
    with lighthouse(2) as server:
        client = LighthouseClient(server.address(), connect_timeout=seconds(5))
        with pytest.raises(TimeoutError, match="Timeout expired"):
            client.quorum("a:1", timeout=seconds(0.005))


def test_a_server_that_never_answers_is_named() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"http://127.0.0.1:{mute.getsockname()[1]}"
        client = LighthouseClient(address, connect_timeout=seconds(5))
        with pytest.raises(
            TimeoutError, match=f"no answer to a heartbeat from lighthouse {address}"
        ):
            client.heartbeat("a:1", timeout=seconds(0.2))


def test_an_unknown_rank_is_named() -> None:
    with lighthouse() as server, group(server.address(), world_size=2) as manager:
        client = ManagerClient(manager.address(), connect_timeout=seconds(5))
        with pytest.raises(TorchftError, match="group rank 2"):
            ask(client, 2)
        with pytest.raises(TorchftError, match="group rank 2"):
            client.should_commit(2, 0, True, timeout=seconds(5))


def test_checkpoint_metadata_of_a_rank_that_has_not_asked_is_an_error() -> None:
    with lighthouse() as server, group(server.address()) as manager:
        client = ManagerClient(manager.address(), connect_timeout=seconds(5))
        with pytest.raises(RuntimeError, match="rank 0 has not said"):
            client._checkpoint_metadata(0, timeout=seconds(5))


def test_votes_on_different_steps_name_both() -> None:
    with lighthouse() as server, group(server.address(), world_size=2) as manager:
        client = ManagerClient(manager.address(), connect_timeout=seconds(5))
        votes: list[Callable[[], bool]] = [
            lambda: client.should_commit(0, 10, True, timeout=seconds(5)),
            lambda: client.should_commit(1, 11, True, timeout=seconds(5)),
        ]
        for error in at_once(*votes):
            assert isinstance(error, MismatchError)
            assert "10" in str(error) and "11" in str(error)


def test_a_negative_timeout_is_refused() -> None:
    with lighthouse() as server:
        client = LighthouseClient(server.address(), connect_timeout=seconds(5))
        with pytest.raises(ValueError, match="negative"):
            client.heartbeat("a:1", timeout=seconds(-1))


def test_data_that_json_cannot_hold_is_refused() -> None:
    with lighthouse() as server:
        client = LighthouseClient(server.address(), connect_timeout=seconds(5))
        with pytest.raises(TypeError, match="JSON"):
            client.quorum("a:1", timeout=seconds(5), data={"x": object()})
