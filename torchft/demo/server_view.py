"""The picture of a run with a parameter server: the server in the title, a row for each worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ServerFrame", "WorkerRow"]

COLOURS = {"training": "green", "starting": "cyan", "killed": "red", "alone": "yellow"}


@dataclass(frozen=True, kw_only=True)
class WorkerRow:
    """One worker right now."""

    name: str
    state: str
    """starting, training, alone (without a server), killed, ended."""
    step: int
    rounds: int
    """That it has taken part in."""
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class ServerFrame:
    """All of them right now; satisfies `view.Picture`."""

    elapsed_s: float
    server: str
    """starting, up, killed, ended."""
    version: int
    """Rounds that have closed."""
    waiting: str
    """What the open round waits for, in the server's words."""
    megabytes: float
    """Encoded numbers, both ways."""
    rows: Sequence[WorkerRow]

    def in_words(self) -> str:
        """A line."""
        workers = "; ".join(map(_in_words, self.rows))
        return f"server {self.server}, {self.version} rounds; {workers}"

    def table(self) -> Any:
        """For rich."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=f"{self.elapsed_s:.1f} s, server {self.server}: {self.version} rounds, "
            f"{self.megabytes:.1f} MB",
            caption=self.waiting or None,
        )
        for heading in ("worker", "state", "step", "rounds", "loss"):
            table.add_column(heading, justify="left" if heading == "state" else "right")
        for row in self.rows:
            state = Text(row.state, style=COLOURS.get(row.state, ""))
            table.add_row(row.name, state, str(row.step), str(row.rounds), _loss(row.loss))
        return table


def _in_words(row: WorkerRow) -> str:
    if row.state in ("starting", "killed"):
        return f"{row.name} {row.state}"
    return f"{row.name} {row.state}, step {row.step}, loss {_loss(row.loss)}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"
