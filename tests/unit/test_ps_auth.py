"""Tokens: who may do what, and who may read the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchft.errors import SettingsError
from torchft.parameter_server.auth import Scope, Tokens, read_token


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


def test_a_file_with_a_token_alone(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("  just-a-token\n")
    assert read_token(tmp_path / "token", Scope.WORKER) == "just-a-token"


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="16 characters"):
        Tokens.of_secret("short")
    with pytest.raises(SettingsError, match="--auth-token-file"):
        read_token(tmp_path / "absent", Scope.READ)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SettingsError, match="no token for read"):
        read_token(tmp_path / "other.json", Scope.READ)
