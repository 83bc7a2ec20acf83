"""What a server says to a request that it does not take, and what the worker then raises.

Refused                       the request is wrong; nothing at the server has changed
├── Unauthorized      401     no token, or a wrong one
├── Forbidden         403     a token that does not allow this
├── NotFound          404     there is no such thing (any more)
├── Interrupted       408     an upload did not arrive completely: go on where it broke
├── Conflict          409     another process has this id
├── Gone              410     not registered (any more): register again
├── TooLarge          413     more bytes than can be right
├── Unfit             422     another model, or numbers that would spoil the weights
└── NotReady          503     the server waits for the first weights
"""

from __future__ import annotations

from torchft.errors import TorchftError

__all__ = [
    "Conflict",
    "Forbidden",
    "Gone",
    "Interrupted",
    "NotFound",
    "NotReady",
    "Refused",
    "TooLarge",
    "Unauthorized",
    "Unfit",
    "printable",
    "refusal_of",
]


class Refused(TorchftError):
    """The request is wrong, and nothing at the server has changed."""

    status = 400


class Unauthorized(Refused):
    """The request has no token, or a wrong one."""

    status = 401


class Forbidden(Refused):
    """The request has a token that does not allow this."""

    status = 403


class NotFound(Refused):
    """There is no such thing (any more)."""

    status = 404


class Interrupted(Refused):
    """An upload did not arrive completely: go on where it broke."""

    status = 408


class Conflict(Refused):
    """Another process has this worker's id just now."""

    status = 409


class Gone(Refused):
    """The worker is not registered, or is so no more: it should register again."""

    status = 410


class TooLarge(Refused):
    """The request has more bytes than can be right."""

    status = 413


class Unfit(Refused):
    """Another model, or numbers that would spoil the weights."""

    status = 422


class NotReady(Refused):
    """The server waits for the first weights."""

    status = 503


_KINDS: dict[int, type[Refused]] = {kind.status: kind for kind in Refused.__subclasses__()}


def refusal_of(status: int, reason: str) -> Refused:
    """The error that a reply of this status stands for."""
    return _KINDS.get(status, Refused)(reason)


def printable(said: str, limit: int = 300) -> str:
    """`said` by somebody on the network, fit for a log or a terminal: control characters and
    others that do not print are escaped, so that it stays one line, and is at most `limit` long."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in said[:limit])
    return shown if len(said) <= limit else f"{shown}…"
