"""Who may do what: three scopes, each with a token made from one secret.

    admin  ⊃  worker  ⊃  read

The file has all three, mode 0600; a machine that only trains is given the worker's. Tokens are
compared in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from torchft import settings
from torchft.atomic import replacing
from torchft.errors import SettingsError

__all__ = ["Scope", "Tokens", "default_token_file", "find_token", "read_token"]


class Scope(IntEnum):
    """What a request needs; a higher one includes the lower."""

    READ = 1
    WORKER = 2
    ADMIN = 3


@dataclass(frozen=True)
class Tokens:
    """The tokens of one server, one for each scope."""

    by_scope: Mapping[Scope, str]

    @classmethod
    def of_secret(cls, secret: str) -> Tokens:
        """The tokens that follow from a secret, which is the admin's and follows from none of them.

        Raises:
            SettingsError: the secret has fewer than 16 characters.
        """
        if len(secret) < 16:
            raise SettingsError(
                "an auth token has at least 16 characters: leave it out to make one"
            )
        made = {
            scope: hmac.new(secret.encode(), scope.name.encode(), hashlib.sha256).hexdigest()
            for scope in (Scope.READ, Scope.WORKER)
        }
        return cls({**made, Scope.ADMIN: secret})

    def scope_of(self, token: str) -> Scope | None:
        """The scope that a token sent by a client allows; None where it allows nothing."""
        given, found = token.encode(errors="surrogateescape"), None  # it may be any bytes
        for scope, known in self.by_scope.items():
            if hmac.compare_digest(given, known.encode()):
                found = scope
        return found

    @classmethod
    def at(cls, path: Path, *, renew: bool = False) -> tuple[Tokens, bool]:
        """The tokens in the file, made and written when there is none; and whether they are new.

        Raises:
            SettingsError: the file is there and cannot be used.
        """
        if path.exists() and not renew:
            return cls.of_secret(read_token(path, Scope.ADMIN)), False
        tokens = cls.of_secret(secrets.token_hex(32))
        tokens.write(path)
        return tokens, True

    def write(self, path: Path) -> None:
        """Write the tokens to a new file that its owner alone can read, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = {scope.name.lower(): token for scope, token in self.by_scope.items()}
        with replacing(path) as draft:  # somebody may be waiting for it
            draft.touch(mode=0o600, exist_ok=False)
            with draft.open("w") as file:
                json.dump(content, file, indent=1)


def default_token_file(port: int) -> Path:
    """Where a server on this machine leaves its tokens, and a worker on it finds them."""
    return Path.home() / ".torchft" / f"diloco-{port}.json"


def find_token(scope: Scope, token: str | None, file: Path | None, own: Path | None) -> str | None:
    """The token to send along: an argument's (`token`, then `file`), then that of the variables
    `DILOCO_AUTH_TOKEN` and `DILOCO_AUTH_TOKEN_FILE`, then that of the file `own`, if there is one.

    Raises:
        SettingsError: a file that was named cannot be read, or has no token for `scope`.
    """
    named = settings.path_or_none(settings.DILOCO_AUTH_TOKEN_FILE)
    variables = settings.text(settings.DILOCO_AUTH_TOKEN), named
    for value, path in ((token, file), variables, (None, own if own and own.exists() else None)):
        if value is not None:
            return value
        if path is not None:
            return read_token(path, scope)
    return None


def read_token(path: Path, scope: Scope) -> str:
    """The token of `scope`, from a server's file or from one that holds a token alone.

    Raises:
        SettingsError: the file cannot be read, or has no such token.
    """
    try:
        text = path.read_text().strip()
    except OSError as error:
        raise SettingsError(
            f"cannot read {path}: {error.strerror}; check --auth-token-file"
        ) from None
    if not text:
        raise SettingsError(f"{path} is empty: it should hold a token, or a server's three")
    if not text.startswith("{"):
        return text
    try:
        return str(json.loads(text)[scope.name.lower()])
    except (ValueError, KeyError, TypeError):
        raise SettingsError(
            f"{path} has no token for {scope.name.lower()}: copy the server's file again, or make "
            "new ones there with --regen-token"
        ) from None
