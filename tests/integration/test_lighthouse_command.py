"""`torchft_lighthouse` from start to end: what it prints, serves, and with which code it exits."""

from __future__ import annotations

import json
import re
import signal
import socket
import urllib.error
import urllib.request

import pytest
from helpers.coordination import Child, free_port, seconds
from helpers.waiting import until

from torchft.coordination import LighthouseClient

COMMAND = "import sys; from torchft.cli.lighthouse import main; sys.exit(main())"


def command(*args: str, **env: str) -> Child:
    return Child(COMMAND, *args, **env)


def listening(child: Child, port: int) -> LighthouseClient:
    return LighthouseClient(f"http://127.0.0.1:{port}", connect_timeout=seconds(20))


def get(port: int, path: str) -> tuple[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
        return reply.read().decode(), reply.headers["content-type"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_code_0_and_frees_the_port(number: signal.Signals) -> None:
    port = free_port()
    with command("--bind", f"127.0.0.1:{port}", "--min_replicas", "1") as child:
        listening(child, port).heartbeat("a:1")
        child.send(number)
        assert child.end() == 0, child.stderr
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", port))


def test_a_signal_ends_it_although_somebody_waits_for_a_quorum() -> None:
    port = free_port()
    ask = (
        "import sys; from datetime import timedelta as T\n"
        "from torchft.coordination import LighthouseClient\n"
        "LighthouseClient(sys.argv[1], T(seconds=20)).quorum('a:1', T(seconds=60))"
    )
    with command("--bind", f"127.0.0.1:{port}", "--min_replicas", "2") as child:
        listening(child, port)
        with Child(ask, f"http://127.0.0.1:{port}") as caller:
            until(lambda: '"asks_at_step":0' in get(port, "/status.json")[0], "the caller asks")
            child.send(signal.SIGTERM)
            assert child.end() == 0, child.stderr
            assert caller.end() == 1
            assert "the lighthouse is shutting down" in caller.stderr


def test_a_taken_port_is_a_clear_error_and_code_1() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with command("--bind", f"127.0.0.1:{port}", "--min_replicas", "1") as child:
            assert child.end() == 1
            assert f"cannot listen on 127.0.0.1:{port}: the port is taken" in child.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--min_replicas", "0"], "--min_replicas"),
        ([], "--min_replicas"),
        (["--min_replicas", "1", "--heartbeat_timeout_ms", "0"], "--heartbeat_timeout_ms"),
        (["--min_replicas", "1", "--join_timeout_ms", "soon"], "--join_timeout_ms"),
        (["--min_replicas", "1", "--minreplicas", "1"], "--minreplicas"),
    ],
)
def test_a_wrong_flag_is_named_and_code_2(args: list[str], words: str) -> None:
    with command(*args) as child:
        assert child.end() == 2
        assert words in child.stderr


def test_help_shows_every_flag_with_its_default() -> None:
    with command("--help") as child:
        assert child.end() == 0
        text = ""
        while "--heartbeat_timeout_ms" not in text or "[default: 5000]" not in text:
            text += child.line()
    for words in ["[::]:29510", "--min_replicas", "[default: 60000]", "[default: 100]"]:
        assert words in text


def test_the_documented_flags_are_accepted_and_told_in_the_log() -> None:
    port = free_port()
    ticks = ["--quorum_tick_ms", "100", "--join_timeout_ms", "10000"]
    beats = ["--heartbeat_timeout_ms", "700"]
    with command("--bind", f"[::]:{port}", "--min_replicas", "3", *ticks, *beats) as child:
        listening(child, port)
        child.send(signal.SIGTERM)
        assert child.end() == 0
        assert "min_replicas=3 join_timeout=10s heartbeat_timeout=700ms" in child.stderr


def test_health_status_and_page_are_served_beside_the_rpcs() -> None:
    port = free_port()
    with command("--bind", f"127.0.0.1:{port}", "--min_replicas", "1") as child:
        client = listening(child, port)
        quorum = client.quorum("a:1", timeout=seconds(10), step=4, world_size=8)
        assert get(port, "/healthz")[0] == "ok\n"
        text, kind = get(port, "/status.json")
        status = json.loads(text)
        assert kind == "application/json"
        assert status["quorum"]["quorum_id"] == quorum.quorum_id
        assert [m["replica_id"] for m in status["quorum"]["members"]] == ["a:1"]
        assert status["replicas"][0]["healthy"] is True
        page, kind = get(port, "/")
        assert kind.startswith("text/html")
        assert not re.search(r"(src|href)\s*=|https?://|@import", page), (
            "the page is self-contained"
        )


def test_no_route_changes_anything() -> None:
    port = free_port()
    with command("--bind", f"127.0.0.1:{port}", "--min_replicas", "1") as child:
        listening(child, port).quorum("a:1", timeout=seconds(10))
        for path in ["/replica/a:1/kill", "/status.json", "/"]:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", data=b"{}", method="POST"
            )
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request, timeout=10)
            assert error.value.code in (404, 405)


def test_it_never_imports_torch() -> None:
    code = (
        "import sys\nfrom torchft.cli.lighthouse import main\n"
        "sys.argv = ['torchft_lighthouse', '--help']\n"
        "assert main() == 0\nprint()\nprint('torch' in sys.modules)"
    )
    with Child(code) as child:
        assert child.end() == 0, child.stderr
        lines: list[str] = []
        while not lines or lines[-1] not in ("True", "False"):
            lines.append(child.line())
        assert lines[-1] == "False"
