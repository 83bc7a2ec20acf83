"""What a run with a parameter server came to, as values first, then as text.

It is good when the scenario reached its end, every survivor and the server ended by themselves
with exit code 0, nothing that had been counted was lost with the killed server, and the survivors'
weights are those that the server's last checkpoint says its workers hold, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.demo.run import RunSummary
from torchft.digest import digest
from torchft.errors import SettingsError
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.server.checkpoints import Checkpoints

__all__ = ["ServerSummary", "WorkerResult", "held_by_workers", "read_result"]


@dataclass(frozen=True, kw_only=True)
class WorkerResult:
    """What one worker that trained to its end has written."""

    name: str
    killed: bool
    code: int | None
    """Exit code; negative: the number of the signal that ended it."""
    steps: int
    rounds: int
    paused_at_kill_s: float
    """Its longest time between two steps from the worker's kill to the next round; 0: not there."""
    paused_without_server_s: float
    """The same, from the server's kill to the next round."""
    held_out: tuple[float, float] | None
    """Loss before and after, nats a byte; None: it did not get to its end."""
    digest: str | None
    """Of its final weights."""


@dataclass(frozen=True, kw_only=True)
class ServerSummary(RunSummary):
    """A whole run with a parameter server."""

    workers: Sequence[WorkerResult]
    told: bool
    """Everything that was to happen has happened."""
    rounds: int
    rounds_at_kill: int
    rounds_after_restart: int
    """As first heard from the new process."""
    bytes_in: int
    bytes_out: int
    away_s: float | None
    """From the server's kill until it was heard again; None: it was not."""
    server_code: int | None
    server_digest: str | None
    """Of what its workers hold, by its last checkpoint."""

    @property
    def survivors(self) -> list[WorkerResult]:
        """The workers that were not killed in the run."""
        return [worker for worker in self.workers if not worker.killed]

    @property
    def equal(self) -> bool:
        """Whether all survivors have told their weights, and they are the server's."""
        found = {worker.digest for worker in self.survivors}
        return self.server_digest is not None and found == {self.server_digest}

    @property
    def kept(self) -> bool:
        """Whether the new server knew all that had been counted."""
        return self.rounds_after_restart >= self.rounds_at_kill

    @property
    def good(self) -> bool:
        """Whether all happened, nothing was lost and the weights are equal."""
        ended = self.server_code == 0 and all(worker.code == 0 for worker in self.survivors)
        return self.trouble is None and self.told and ended and self.kept and self.equal

    def lines(self) -> list[str]:
        """Describe rounds, workers, the server and the digests."""
        told = self.told or self.trouble is not None
        left = [] if told else ["not all that was to happen has happened"]
        return [_headline(self), *_workers(self), *_server(self), *_digests(self), *left]


def held_by_workers(output: Path) -> str:
    """The digest of the weights that a server's workers hold, of its newest checkpoint.

    Raises:
        SettingsError: there is no good one.
    """
    saved = Checkpoints(output / "checkpoints", 0).newest()
    if saved is None:
        raise SettingsError(f"the server left no checkpoint in {output}")
    _, state = saved
    shape, held = ModelShape.from_json(state["model"]), dict[str, Tensor]()
    for fragment, row in enumerate(state["rows"]):
        sent = row["weights"] if row["sent"] is None else row["sent"]
        held |= shape.views(fragment, sent)
    kinds = {p.name: getattr(torch, p.dtype) for p in shape.parameters}
    return digest({name: tensor.to(kinds[name]) for name, tensor in held.items()})


def read_result(path: Path) -> dict[str, Any]:
    """A worker's last word; empty: there is none."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _headline(summary: ServerSummary) -> str:
    moved = (summary.bytes_in + summary.bytes_out) / 1e6
    return (
        f"{summary.rounds} rounds in {summary.wall_s:.1f} s; {moved:.1f} MB moved: "
        f"{summary.bytes_in / 1e6:.1f} to the server, {summary.bytes_out / 1e6:.1f} from it"
    )


def _workers(summary: ServerSummary) -> list[str]:
    lines = []
    for worker in summary.workers:
        end = "killed" if worker.killed else f"exit code {worker.code}"
        line = f"  {worker.name}: {worker.steps} steps, {worker.rounds} rounds, {end}"
        if worker.held_out is not None:
            before, after = worker.held_out
            line += f"; held-out loss {before:.3f} → {after:.3f}"
        lines.append(line)
        pauses = {
            "b's kill": worker.paused_at_kill_s,
            "the server's": worker.paused_without_server_s,
        }
        told = [f"{seconds:.2f} s at {what}" for what, seconds in pauses.items() if seconds]
        if told and not worker.killed:
            lines.append(f"     longest time between two steps: {', '.join(told)}")
    return lines


def _server(summary: ServerSummary) -> list[str]:
    if summary.away_s is None:
        return ["  the server did not come back"]
    return [
        f"  the server was killed after round {summary.rounds_at_kill}, and back with round "
        f"{summary.rounds_after_restart} after {summary.away_s:.1f} s"
    ]


def _digests(summary: ServerSummary) -> list[str]:
    if summary.equal:
        assert summary.server_digest is not None
        return [f"digests: the survivors' and the server's are equal, {summary.server_digest[:16]}"]
    told = [(worker.name, worker.digest) for worker in summary.survivors]
    everybody = [*told, ("server", summary.server_digest)]
    words = ", ".join(f"{name} {'none' if d is None else d[:16]}" for name, d in everybody)
    return [f"digests: NOT EQUAL: {words}"]
