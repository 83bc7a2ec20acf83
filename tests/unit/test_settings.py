"""What wins, argument or variable, for each variable; and what cannot be used is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.optim import SGD
from unit.test_local_sgd import alone

from torchft import settings
from torchft.errors import MissingVariableError, SettingsError
from torchft.local_sgd import DiLoCo
from torchft.manager import Manager, group
from torchft.parameter_server.worker.options import WorkerOptions


class Started(Exception):
    """Ends a manager's constructor where it starts its server; has what the server gets."""


def manager(**given: Any) -> dict[str, Any]:
    """What a manager makes of its arguments."""
    made = Manager.__new__(Manager)
    group_of_one = {"rank": 0, "world_size": 1, "store_addr": "host", "store_port": 1}
    with pytest.raises(Started) as started:
        made.__init__(None, None, None, 1, **group_of_one, **given)  # type: ignore[misc]
    server = started.value.args[0]
    return {**vars(made.options), **server, "port": server["bind"]}


def worker(**given: Any) -> dict[str, Any]:
    """What a worker of the parameter server makes of its arguments."""
    options = WorkerOptions.resolve(**given)
    token = options.token("far", 1)
    return {**vars(options), "auth_token": token, "auth_token_file": token}


def diloco(**given: Any) -> dict[str, Any]:
    """Whether DiLoCo sends in buckets: where it does not, it warns of their size."""
    one = alone()
    with warnings.catch_warnings(record=True) as caught:
        outer = SGD(one.trained, lr=0.7)
        DiLoCo(one.manager, [one.model], one.inner, outer, 4, bucket_cap_mb=4, **given)
    return {"use_bucketization": not caught}


Use = Callable[..., dict[str, Any]]

ARGUMENT_WINS: list[tuple[str, str, Use, str, Any]] = [
    (settings.LIGHTHOUSE, "http://a:1", manager, "lighthouse_addr", "http://b:1"),
    (settings.MANAGER_PORT, "7", manager, "port", 5),
    (settings.DILOCO_SERVER, "a:1", worker, "server", "b:1"),
    (settings.DILOCO_WORKER_ID, "a", worker, "worker_id", "b"),
    (settings.DILOCO_SYNC_EVERY, "7", worker, "sync_every", 5),
    (settings.DILOCO_NUM_FRAGMENTS, "7", worker, "num_fragments", 5),
    (settings.DILOCO_CODEC, "fp8", worker, "codec", "int8"),
    (settings.DILOCO_BF16_COMM, "0", worker, "codec", "int8"),
    (settings.DILOCO_DYLU, "1", worker, "dylu", False),
    (settings.DILOCO_HEARTBEAT_INTERVAL, "7", worker, "heartbeat_interval_s", 5.0),
    (settings.DILOCO_AUTH_TOKEN, "a", worker, "auth_token", "b"),
    (settings.DILOCO_AUTH_TOKEN_FILE, "a", worker, "auth_token_file", Path("b")),
    (settings.DILOCO_TLS_CA, "a", worker, "tls_ca", Path("b")),
]
VARIABLE_WINS: list[tuple[str, str, Use, str, Any]] = [
    (settings.TIMEOUT_SEC, "7", manager, "timeout", timedelta(seconds=5)),
    (settings.QUORUM_TIMEOUT_SEC, "7", manager, "quorum_timeout", timedelta(seconds=5)),
    (settings.CONNECT_TIMEOUT_SEC, "7", manager, "connect_timeout", timedelta(seconds=5)),
    (settings.LIGHTHOUSE_TIMEOUT_SEC, "7", manager, "lighthouse_timeout", timedelta(seconds=5)),
    (settings.QUORUM_RETRIES, "7", manager, "quorum_retries", 5),
    (settings.USE_BUCKETIZATION, "True", diloco, "use_bucketization", False),
]
NO_ARGUMENT = [
    settings.CONGESTION,
    settings.GLOO_SOCKET_IFNAME,
    settings.JOB_ID,
    settings.STEP_RECORDS,
]
ROWS = [*ARGUMENT_WINS, *VARIABLE_WINS]


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable but a lighthouse, no socket, and two files with tokens."""

    def start(**given: Any) -> None:
        raise Started(given)

    for name, *_ in ROWS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(settings.LIGHTHOUSE, "http://default:1")
    monkeypatch.setattr(group, "ManagerServer", start)
    monkeypatch.setattr(group, "_store", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(name).write_text(f"the token of {name}")


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize(
    ("name", "value", "use", "argument", "given"), ROWS, ids=[row[0] for row in ROWS]
)
def test_argument_variable_default_win_in_this_order_but_for_the_variables_of_torchft(
    name: str, value: str, use: Use, argument: str, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    default, by_argument = use()[argument], use(**{argument: given})[argument]
    monkeypatch.setenv(name, value)
    by_variable, both = use()[argument], use(**{argument: given})[argument]
    assert by_variable not in (default, by_argument)
    assert both == (by_variable if name in settings.OVERRIDING else by_argument)


def test_every_variable_is_in_one_of_the_tables() -> None:
    names = [getattr(settings, name) for name in settings.__all__ if name.isupper()]
    assert sorted([*NO_ARGUMENT, *(row[0] for row in ROWS)]) == sorted(
        name for name in names if name != settings.OVERRIDING
    )
    assert sorted(settings.OVERRIDING) == sorted(row[0] for row in VARIABLE_WINS)


@pytest.mark.parametrize("value", ["soon", "1.5", "0", "-1"])
def test_an_unusable_timeout_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TORCHFT_TIMEOUT_SEC", value)
    with pytest.raises(SettingsError, match="TORCHFT_TIMEOUT_SEC"):
        settings.timeout("TORCHFT_TIMEOUT_SEC", timedelta(seconds=3))


def test_a_missing_variable_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(
        MissingVariableError, match="RANK is not set: start with torchrun"
    ) as raised:
        settings.required("RANK", "start with torchrun")
    assert isinstance(raised.value, KeyError)
