"""The names, signatures and fields that existing callers of `torchft.coordination` rely on."""

from __future__ import annotations

import ast
import inspect
import socket
from pathlib import Path

import pytest

import torchft
from torchft import coordination
from torchft.coordination import LighthouseServer, QuorumResult

CLASSES = [
    "LighthouseClient",
    "LighthouseServer",
    "ManagerClient",
    "ManagerServer",
    "Quorum",
    "QuorumMember",
    "QuorumResult",
    "Timestamp",
]

SIGNATURES = {
    "LighthouseServer": "(bind, min_replicas, join_timeout_ms=100, quorum_tick_ms=100, "
    "heartbeat_timeout_ms=5000)",
    "LighthouseClient": "(addr, connect_timeout)",
    "LighthouseClient.quorum": "(self, /, replica_id, timeout, address=..., store_address=..., "
    "step=0, world_size=0, shrink_only=False, data=None)",
    "LighthouseClient.heartbeat": "(self, /, replica_id, timeout=...)",
    "ManagerServer": "(replica_id, lighthouse_addr, hostname, bind, store_addr, world_size, "
    "heartbeat_interval, connect_timeout, quorum_retries)",
    "ManagerClient": "(addr, connect_timeout)",
    "ManagerClient._quorum": "(self, /, group_rank, step, checkpoint_metadata, shrink_only, "
    "init_sync, commit_failures, timeout, reconfigure_handle=..., settling=False)",
    "ManagerClient._checkpoint_metadata": "(self, /, rank, timeout)",
    "ManagerClient.should_commit": "(self, /, group_rank, step, should_commit, timeout)",
    "ManagerClient._end_group": "(self, /, group_rank, why, timeout)",
}


def named(path: str) -> object:
    found: object = coordination
    for name in path.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("path", SIGNATURES)
def test_signatures_are_those_that_existing_callers_know(path: str) -> None:
    found = named(path)
    text = getattr(found, "__text_signature__", None)
    assert text is not None
    assert text.replace("$self", "self, /").replace("/, /", "/") == SIGNATURES[path]


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_documents_its_arguments(name: str) -> None:
    assert "Args:" in (inspect.getdoc(getattr(coordination, name)) or "")


def test_a_quorum_result_starts_as_a_quorum_of_one() -> None:
    result = QuorumResult()
    assert {name: getattr(result, name) for name in fields_of("QuorumResult")} == {
        "quorum_id": 0,
        "replica_rank": 0,
        "replica_world_size": 1,
        "recover_src_manager_address": "",
        "recover_src_replica_rank": None,
        "recover_dst_replica_ranks": [],
        "store_address": "",
        "max_step": 0,
        "max_replica_rank": None,
        "max_world_size": 1,
        "heal": False,
        "commit_failures": 0,
        "replica_ids": [],
        "reconfigure_handles": [],
        "recovering_replica_ranks": [],
        "fresh_replica_ranks": [],
        "settling_replica_ranks": [],
        "world_sizes": [],
    }


def test_every_field_of_a_quorum_result_can_be_set() -> None:
    result = QuorumResult()
    result.quorum_id = 7
    result.recover_src_replica_rank = 1
    result.recover_dst_replica_ranks = [2, 3]
    result.heal = True
    result.replica_ids = ["a", "b"]
    assert (result.quorum_id, result.recover_src_replica_rank) == (7, 1)
    assert result.recover_dst_replica_ranks == [2, 3]
    assert result.heal and result.replica_ids == ["a", "b"]


def test_the_stub_names_what_the_extension_has() -> None:
    for name in CLASSES:
        wanted = {m for m in members_of(name) if not m.startswith("__")}
        has = {m for m in dir(getattr(coordination, name)) if not m.startswith("__")}
        assert wanted == has, name


def test_coordination_re_exports_all_public_names_of_the_extension() -> None:
    from torchft import _torchft

    public = {name for name in dir(_torchft) if not name.startswith("_")}
    assert public == set(coordination.__all__) == set(CLASSES) | {"lighthouse_main", "watch_parent"}


def test_the_address_is_the_host_that_was_bound() -> None:
    server = LighthouseServer("127.0.0.1:0", 1)
    assert server.address().startswith("http://127.0.0.1:")
    server.shutdown()


def test_a_wildcard_is_advertised_by_this_machines_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    server = LighthouseServer("[::]:0", 1)
    assert server.address().startswith("http://localhost:")
    server.shutdown()


def test_a_name_that_does_not_resolve_is_not_advertised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no such name")
    server = LighthouseServer("[::]:0", 1)
    assert server.address().startswith("http://127.0.0.1:")
    server.shutdown()


def stub(name: str) -> ast.ClassDef:
    source = (Path(torchft.__file__).parent / "_torchft.pyi").read_text()
    classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name]
    return classes[0]


def fields_of(name: str) -> list[str]:
    body = stub(name).body
    fields = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in fields if isinstance(target, ast.Name)]


def members_of(name: str) -> list[str]:
    methods = [node.name for node in stub(name).body if isinstance(node, ast.FunctionDef)]
    return fields_of(name) + methods
