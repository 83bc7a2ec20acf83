"""A small fleet in one process: a server's thread, and workers in threads of their own."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchft.parameter_server.core.options import OuterOptions, ServerOptions
from torchft.parameter_server.core.rules import Mode, Rules
from torchft.parameter_server.worker.worker import DiLoCoWorker

__all__ = ["Fleet", "Net", "options", "train"]

DEADLINE_S = 60.0


class Net(nn.Module):
    """Blocks, a buffer, a BatchNorm, a frozen parameter, a tied weight."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.h = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 6)
        self.head.weight = self.h[0].weight
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.h:
            x = torch.tanh(layer(x))
        return self.head(self.norm(x))


def options(folder: Path, workers: int = 2, **more: Any) -> ServerOptions:
    """A server's; the rules' fields among `more` are told from its own."""
    names = ("mode", "min_workers", "grace_s", "heartbeat_timeout_s", "max_staleness")
    rules = {name: more.pop(name) for name in names if name in more}
    return ServerOptions(folder, Rules(workers, **{"mode": Mode.SYNCHRONOUS, **rules}), **more)


plain_outer = OuterOptions(lr=1.0, momentum=0.0)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int) -> None:
    """Steps on data that follow from (seed, step)."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        ((model(x) - x.flip(1)) ** 2).mean().backward()
        optimizer.step()


class Fleet:
    """Workers by name; each trains in a thread, and errors are raised by `join`."""

    def __init__(self, server: str, **options: Any) -> None:
        self.server, self.options = server, {"sync_every": 5, "codec": "fp32", **options}
        self.models: dict[str, nn.Module] = {}
        self.workers: dict[str, DiLoCoWorker] = {}
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def worker(self, name: str, seed: int = 0, **options: Any) -> DiLoCoWorker:
        """Not started yet."""
        model = self.models[name] = Net(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        worker = DiLoCoWorker(
            model, optimizer, self.server, worker_id=name, **{**self.options, **options}
        )
        worker.optimizer = optimizer  # type: ignore[attr-defined]
        self.workers[name] = worker
        return worker

    def run(self, name: str, steps: int, seed: int = 0, **options: Any) -> threading.Thread:
        """Train in a thread."""
        worker = self.worker(name, seed, **options)

        def body() -> None:
            try:
                with worker:
                    train(self.models[name], worker.optimizer, seed, steps)  # type: ignore[attr-defined]
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=body, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        """All have ended, none with an error."""
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), f"{thread.name} is stuck"
        if self._errors:
            raise self._errors[0]

    def weights(self, name: str) -> torch.Tensor:
        """The trained ones, flat."""
        trained = [p for p in self.models[name].parameters() if p.requires_grad]
        return torch.cat([p.detach().reshape(-1) for p in trained])
