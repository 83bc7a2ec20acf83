"""A worker's settings: explicit argument over `DILOCO_*` variable over default."""

from __future__ import annotations

import socket
import uuid
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchft import settings
from torchft.arguments import check_choice, check_integer, check_number
from torchft.errors import SettingsError
from torchft.parameter_server.auth import Scope, default_token_file, find_token
from torchft.parameter_server.core.options import MOST
from torchft.quantization import codec_names

__all__ = ["WorkerOptions"]

_LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class WorkerOptions:
    """`server` empty: nothing is done, so that one script serves alone and in a fleet."""

    server: str = ""
    worker_id: str = ""
    sync_every: int = 500
    """Asked for; the server's word holds."""
    codec: str = "bf16"
    """Asked for; the server's word holds."""
    num_fragments: int = 1
    """Asked for; the server's word holds."""
    dylu: bool = False
    """Take the steps that the server recommends."""
    heartbeat_interval_s: float = 30.0
    """At most this long between two signs of life; the server may ask for more of them. 0: none."""
    in_flight: int | None = None
    """Submissions that may be under way while training goes on. None: one where there are several
    fragments, else 0: training waits for the update."""
    mix: float = 0.0
    """The share of its own weights that a worker keeps."""
    timeout_s: float = 600.0
    """The longest that training waits for a round. Then it goes on; the submission stays open."""
    auth_token: str | None = None
    auth_token_file: Path | None = None
    tls_ca: Path | None = None

    def __post_init__(self) -> None:
        for name in ("sync_every", "num_fragments"):
            check_integer(name, getattr(self, name), least=1, most=MOST)
        if self.num_fragments > self.sync_every:
            raise SettingsError(
                f"num_fragments={self.num_fragments} do not fit into sync_every={self.sync_every} "
                "steps: each needs a step of its own"
            )
        check_choice("codec", self.codec, codec_names())
        check_number("mix", self.mix, least=0, below=1)
        check_number("heartbeat_interval_s", self.heartbeat_interval_s, least=0)
        check_number("timeout_s", self.timeout_s, above=0, finite=False)
        if self.in_flight is not None:
            check_integer("in_flight", self.in_flight, least=0)

    @classmethod
    def resolve(cls, **explicit: Any) -> WorkerOptions:
        """Of what was given, then of the environment. None counts as not given.

        Raises:
            SettingsError: an unknown name, or a value that cannot be.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(explicit.keys() - known):
            raise SettingsError(f"a worker has no option {', '.join(unknown)}")
        given = {name: value for name, value in explicit.items() if value is not None}
        return cls(**{**_from_environment(), **given})

    def named(self) -> str:
        """The worker's id, made where none was given."""
        if self.worker_id:
            return self.worker_id
        host = "".join(c if c.isalnum() or c in ".-" else "-" for c in socket.gethostname())
        return f"worker_{host[:100]}_{uuid.uuid4().hex[:8]}"

    def token(self, host: str, port: int) -> str | None:
        """The token to send to a server; None where there is none.

        Raises:
            SettingsError: a file that should hold it cannot be used.
        """
        own = default_token_file(port) if host in _LOCAL else None
        return find_token(Scope.WORKER, self.auth_token, self.auth_token_file, own)


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {
        "server": settings.text(settings.DILOCO_SERVER),
        "worker_id": settings.text(settings.DILOCO_WORKER_ID),
        "sync_every": settings.integer_or_none(settings.DILOCO_SYNC_EVERY),
        "num_fragments": settings.integer_or_none(settings.DILOCO_NUM_FRAGMENTS),
        "codec": settings.text(settings.DILOCO_CODEC),
        "heartbeat_interval_s": settings.number_or_none(settings.DILOCO_HEARTBEAT_INTERVAL),
        "dylu": settings.boolean_or_none(settings.DILOCO_DYLU),
    }
    ca = settings.text(settings.DILOCO_TLS_CA)
    found["tls_ca"] = None if ca is None else Path(ca)
    if found["codec"] is None and settings.boolean_or_none(settings.DILOCO_BF16_COMM) is False:
        found["codec"] = "fp32"
    return {name: value for name, value in found.items() if value is not None}
