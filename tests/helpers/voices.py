"""Workers of a parameter server that say what a test tells them to say, and raw requests."""

from __future__ import annotations

import socket
from typing import Any

import torch
from helpers.ps import Net

from torchft.parameter_server.auth import Scope, Tokens
from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.server.server import DiLoCoServer
from torchft.parameter_server.worker.client import DiLoCoClient
from torchft.parameter_server.worker.sharded import named_parameters
from torchft.quantization import Identity

__all__ = ["TOKENS", "Voice", "raw"]

TOKENS = Tokens.of_secret("a secret of the tests")


class Voice:
    """A worker that says what the test tells it to say."""

    def __init__(self, server: str, worker: str = "v", scope: Scope | None = Scope.WORKER) -> None:
        self.token = None if scope is None else TOKENS.by_scope[scope]
        self.client = DiLoCoClient(server, token=self.token, timeout_s=20.0)
        self.who = {"worker": worker, "session": f"{worker}-1"}
        self.shape = ModelShape.of(named_parameters(Net()).items())

    def register(self, **changes: Any) -> dict[str, Any]:
        request = {
            **self.who,
            "model": self.shape.to_json(),
            "wished": {"sync_every": 5, "codec": "fp32", "fragments": 1},
            "beat_s": 0.0,
            **changes,
        }
        return self.client.post("/v1/register", request)

    def begin(self) -> None:
        """Register, and send the first weights if they are wanted."""
        if self.register()["send_weights"]:
            self.put("/v1/weights/0", torch.ones(1, self.shape.size(0)), **self.who)

    def put(self, path: str, row: torch.Tensor, **query: object) -> dict[str, Any]:
        chunks = Chunks(row.shape[1], Identity())
        data = [chunks.encode(i, row[:, chunks.span(i)]) for i in range(chunks.count)]
        return self.client.put(path, iter(data), sum(map(len, data)), **query)

    def ticket(self, base: int = 0, number: int = 1, **changes: Any) -> dict[str, Any]:
        request = {
            **self.who,
            "fragment": 0,
            "base": base,
            "number": number,
            "steps": 5,
            "tokens": 5,
            "fingerprint": self.shape.fingerprint,
            **changes,
        }
        return self.client.post("/v1/tickets", request)

    def submit(self, value: float = 0.5, base: int = 0, number: int = 1) -> dict[str, Any]:
        upload = self.ticket(base, number)["upload"]
        row = torch.full((1, self.shape.size(0)), value)
        return self.put(f"/v1/uploads/{upload}", row)

    def news(self, base: int = 0, wait_s: float = 5.0) -> dict[str, Any]:
        question = {"fragment": 0, "base": base, "identity": "none", "wait_s": wait_s}
        return self.client.post("/v1/news", question)

    def status(self) -> dict[str, Any]:
        return self.client.get("/v1/status")

    def version(self) -> int:
        return int(self.status()["fragments"][0]["version"])


def raw(server: DiLoCoServer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
            if b"\r\n\r\n" in answer:
                break
        return answer
