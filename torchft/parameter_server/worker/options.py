"""The settings of a worker; those not given come from `DILOCO_*` variables."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torchft import settings
from torchft.arguments import check_integer, check_number
from torchft.errors import SettingsError
from torchft.parameter_server.auth import Scope, default_token_file, find_token
from torchft.parameter_server.core.options import SharedSettings, check_shared
from torchft.parameter_server.worker.client import DiLoCoClient

__all__ = ["WorkerOptions", "host_name"]

_LOCAL = ("127.0.0.1", "localhost", "::1")
_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "server": (settings.DILOCO_SERVER, settings.text),
    "worker_id": (settings.DILOCO_WORKER_ID, settings.text),
    "sync_every": (settings.DILOCO_SYNC_EVERY, settings.integer_or_none),
    "num_fragments": (settings.DILOCO_NUM_FRAGMENTS, settings.integer_or_none),
    "codec": (settings.DILOCO_CODEC, settings.text),
    "heartbeat_interval_s": (settings.DILOCO_HEARTBEAT_INTERVAL, settings.number_or_none),
    "dylu": (settings.DILOCO_DYLU, settings.boolean_or_none),
    "tls_ca": (settings.DILOCO_TLS_CA, settings.path_or_none),
}


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
        check_shared(self.sync_every, self.codec, self.num_fragments, "num_fragments")
        check_number("mix", self.mix, least=0, below=1)
        check_number("heartbeat_interval_s", self.heartbeat_interval_s, least=0)
        check_number("timeout_s", self.timeout_s, above=0, finite=False)
        if self.in_flight is not None:
            check_integer("in_flight", self.in_flight, least=0)

    @classmethod
    def resolve(cls, **explicit: Any) -> WorkerOptions:
        """Read from the environment what was not given; None counts as not given.

        Raises:
            SettingsError: an unknown name, or a value that cannot be.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(explicit.keys() - known):
            raise SettingsError(f"a worker has no option {', '.join(unknown)}")
        found = explicit | {
            name: settings.argument_first(explicit.get(name), variable, read)
            for name, (variable, read) in _VARIABLES.items()
        }
        if found["codec"] is None and settings.boolean_or_none(settings.DILOCO_BF16_COMM) is False:
            found["codec"] = "fp32"
        return cls(**{name: value for name, value in found.items() if value is not None})

    def named(self) -> str:
        """The worker's id, made where none was given."""
        if self.worker_id:
            return self.worker_id
        return f"worker_{host_name()[:100]}_{uuid.uuid4().hex[:8]}"

    @property
    def wished(self) -> SharedSettings:
        """What it asks for of the settings that all workers share."""
        return SharedSettings(self.sync_every, self.codec, self.num_fragments)

    def client(self) -> DiLoCoClient:
        """A client of the server, with the token that goes with it.

        Raises:
            SettingsError: `server` is no address, or the file of a token or of the certificates to
                trust cannot be used.
        """
        plain = DiLoCoClient(self.server)
        token = self.token(plain.host, plain.port)
        return DiLoCoClient(self.server, token=token, tls_ca=self.tls_ca)

    def token(self, host: str, port: int) -> str | None:
        """The token to send to a server; None where there is none.

        Raises:
            SettingsError: a file that should hold it cannot be used.
        """
        own = default_token_file(port) if host in _LOCAL else None
        return find_token(Scope.WORKER, self.auth_token, self.auth_token_file, own)


def host_name() -> str:
    """This host's name, as a request may have it: letters, digits and any of `. - _`."""
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in socket.gethostname()) or "host"
