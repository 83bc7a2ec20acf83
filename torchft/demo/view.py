"""What a person sees while a run goes on: a live table in a terminal, plain lines elsewhere.

Both get the same two things: events, a line each, which stay; and frames, the present state, which
the table redraws and the plain view prints once in a while.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TextIO

__all__ = ["Frame", "PlainView", "RichView", "View", "choose_view", "loss_text"]

PLAIN_EVERY_S = 2.0
"""How often the plain view tells a frame that differs from the one before."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The present state of a run: a table for the live view, and the same as one line."""

    elapsed_s: float
    """Seconds since the beginning."""
    title: str
    columns: Sequence[str]
    """Headings; the second is the state, which is coloured, the next three are in the line too."""
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def line(self) -> str:
        """The title, and each row in a few words."""
        return "; ".join([self.title, *map(self._words, self.rows)])

    def _words(self, row: Sequence[str]) -> str:
        name, state, *cells = row
        if state.startswith(("starting", "dead", "killed", "ended")):
            return f"{name} {state}"
        told = zip(self.columns[2:5], cells, strict=False)
        return ", ".join([f"{name} {state}", *(f"{what} {value}" for what, value in told)])

    def table(self) -> Any:
        """Return the table as `rich` draws it."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"{self.elapsed_s:.1f} s, {self.title}", caption=self.caption or None)
        for heading in self.columns:
            table.add_column(heading, justify="left" if heading == "state" else "right")
        for name, state, *cells in self.rows:
            table.add_row(name, Text(state, style=COLOURS.get(state.split(":")[0], "")), *cells)
        return table


COLOURS = {
    "training": "green",
    "starting": "cyan",
    "healed": "yellow",
    "alone": "yellow",
    "dead": "red",
    "killed": "red",
}


def loss_text(loss: float | None) -> str:
    """Return a loss in nats with three digits, or a dash where there is none yet."""
    return "-" if loss is None else f"{loss:.3f}"


class View(AbstractContextManager["View"], Protocol):
    """Where a run is shown, from `with` until its end."""

    def tell(self, elapsed_s: float, event: str) -> None:
        """Show one line about something that happened."""
        ...

    def show(self, frame: Frame) -> None:
        """Show the present state of the run."""
        ...


class PlainView:
    """Lines for a file, a pipe or a terminal without rich."""

    def __init__(self, out: TextIO, *, every_s: float = PLAIN_EVERY_S) -> None:
        self._out = out
        self._every_s = every_s
        self._next_s = 0.0
        self._told = ""

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def tell(self, elapsed_s: float, event: str) -> None:
        """Print one line about something that happened."""
        self._line(elapsed_s, event)

    def show(self, frame: Frame) -> None:
        """Print how the run stands, in one line."""
        text = frame.line
        if frame.elapsed_s >= self._next_s and text != self._told:
            self._next_s = frame.elapsed_s + self._every_s
            self._told = text
            self._line(frame.elapsed_s, text)

    def _line(self, elapsed_s: float, text: str) -> None:
        print(f"{elapsed_s:6.1f} s  {text}", file=self._out, flush=True)


class RichView:
    """A table that is redrawn in place, below the event."""

    def __init__(self, *, every_s: float = 0.1) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live: Any = Live(console=Console(), auto_refresh=False, transient=True)
        self._every_s = every_s
        self._drawn = 0.0

    def __enter__(self) -> RichView:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def tell(self, elapsed_s: float, event: str) -> None:
        """Print one line about something that happened, above the table."""
        from rich.text import Text

        self._live.console.print(Text(f"{elapsed_s:6.1f} s  {event}"))

    def show(self, frame: Frame) -> None:
        """Draw the table of how the run stands anew."""
        if time.monotonic() - self._drawn >= self._every_s:
            self._drawn = time.monotonic()
            self._live.update(frame.table(), refresh=True)


def choose_view(out: TextIO | None = None) -> View:
    """Return the table if `out` (standard output) is a terminal and rich is there, else lines."""
    out = out or sys.stdout
    if not out.isatty():
        return PlainView(out)
    try:
        return RichView()
    except ImportError:
        view = PlainView(out)
        view.tell(0.0, "plain lines, since rich is not installed: pip install '.[demo]'")
        return view
