"""Tokens: who may do what, and who may read the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchft.errors import SettingsError
from torchft.parameter_server.auth import Scope, Tokens, find_token, read_token


def test_each_token_has_its_scope_and_no_other() -> None:
    tokens = Tokens.of_secret("0123456789abcdef")
    assert [tokens.scope_of(tokens.by_scope[scope]) for scope in Scope] == list(Scope)
    assert tokens.scope_of("") is None
    assert tokens.scope_of("ünknown") is None


def test_the_file_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokens.json"
    made, new = Tokens.at(path)
    again, newer = Tokens.at(path)
    assert (new, newer) == (True, False)
    assert made == again
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_token(path, Scope.WORKER) == made.by_scope[Scope.WORKER]
    other, _ = Tokens.at(path, renew=True)
    assert other != made


def test_who_waits_for_the_file_never_reads_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looks_meanwhile(*content: Any, **style: Any) -> None:
        seen.append(path.exists())
        dump(*content, **style)

    path, seen, dump = tmp_path / "tokens.json", list[bool](), json.dump
    monkeypatch.setattr(json, "dump", looks_meanwhile)
    made, _ = Tokens.at(path)
    assert seen == [False]
    assert read_token(path, Scope.ADMIN) == made.by_scope[Scope.ADMIN]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_with_a_token_alone(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("  just-a-token\n")
    assert read_token(tmp_path / "token", Scope.WORKER) == "just-a-token"


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="16 characters"):
        Tokens.of_secret("short")
    with pytest.raises(SettingsError, match="--auth-token-file"):
        read_token(tmp_path / "absent", Scope.READ)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SettingsError, match="is empty"):
        read_token(tmp_path / "empty", Scope.WORKER)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SettingsError, match="no token for read"):
        read_token(tmp_path / "other.json", Scope.READ)


@pytest.mark.parametrize("damage", ["{", '{"admin": ', '["admin"]', '{"admin": "short"}', "\x00"])
def test_a_damaged_file_starts_no_server_and_is_left_alone(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tokens.json"
    Tokens.at(path)
    path.write_text(damage)
    with pytest.raises(SettingsError):
        Tokens.at(path)
    assert path.read_text() == damage
    _, new = Tokens.at(path, renew=True)
    assert new and path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_others_could_read_is_not_written_into(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text("x" * 40)
    path.chmod(0o644)
    with path.open() as reader:
        Tokens.at(path, renew=True)
        assert reader.read() == "x" * 40, "whoever has it open reads the old one"
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_argument_wins_over_a_variable_and_a_variable_over_the_servers_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, file = tmp_path / "own", tmp_path / "file"
    own.write_text("of the own file")
    file.write_text("of a file")
    monkeypatch.delenv("DILOCO_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("DILOCO_AUTH_TOKEN_FILE", raising=False)
    assert find_token(Scope.WORKER, None, None, tmp_path / "absent") is None
    assert find_token(Scope.WORKER, None, None, own) == "of the own file"
    monkeypatch.setenv("DILOCO_AUTH_TOKEN", "of the variable")
    assert find_token(Scope.WORKER, None, None, own) == "of the variable"
    assert find_token(Scope.WORKER, None, file, own) == "of a file"
    assert find_token(Scope.WORKER, "of the argument", file, own) == "of the argument"
