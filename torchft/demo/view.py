"""What a person sees while a run goes on: a live table in a terminal, plain lines elsewhere.

Both get the same two things: news, a line each, which stay; and frames, the state right now, which
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

__all__ = ["Frame", "Picture", "PlainView", "RichView", "Row", "View", "choose_view"]

PLAIN_EVERY_S = 2.0
"""How often the plain view tells a frame that differs from the one before."""


class Picture(Protocol):
    """A state right now, for both views."""

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        ...

    def in_words(self) -> str:
        """A line."""
        ...

    def table(self) -> Any:
        """A table of rich's."""
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One group right now."""

    number: int
    state: str
    """starting (and with what), training, dead, healed, ended."""
    step: int
    loss: float | None
    members: int
    """Groups in its quorum."""
    participants: int
    """Those that contribute."""
    discarded: int


@dataclass(frozen=True, kw_only=True)
class Frame:
    """All groups right now."""

    elapsed_s: float
    target: int
    """Steps to be committed."""
    rows: Sequence[Row]

    def in_words(self) -> str:
        """A line."""
        return "; ".join(map(_in_words, self.rows))

    def table(self) -> Any:
        """A row for each group."""
        return _table(self)


class View(AbstractContextManager["View"], Protocol):
    """Where a run is shown, from `with` until its end."""

    def tell(self, elapsed_s: float, news: str) -> None:
        """Something happened."""
        ...

    def show(self, frame: Picture) -> None:
        """How it stands."""
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

    def tell(self, elapsed_s: float, news: str) -> None:
        self._line(elapsed_s, news)

    def show(self, frame: Picture) -> None:
        text = frame.in_words()
        if frame.elapsed_s >= self._next_s and text != self._told:
            self._next_s = frame.elapsed_s + self._every_s
            self._told = text
            self._line(frame.elapsed_s, text)

    def _line(self, elapsed_s: float, text: str) -> None:
        print(f"{elapsed_s:6.1f} s  {text}", file=self._out, flush=True)


class RichView:
    """A table that is redrawn in place, below the news."""

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

    def tell(self, elapsed_s: float, news: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(f"{elapsed_s:6.1f} s  {news}"))

    def show(self, frame: Picture) -> None:
        if time.monotonic() - self._drawn >= self._every_s:
            self._drawn = time.monotonic()
            self._live.update(frame.table(), refresh=True)


COLOURS = {"training": "green", "healed": "yellow", "dead": "red", "starting": "cyan"}


def _table(frame: Frame) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{frame.elapsed_s:.1f} s, until step {frame.target}")
    for heading in ("group", "state", "step", "loss", "members", "take part", "discarded"):
        table.add_column(heading, justify="left" if heading == "state" else "right")
    for row in frame.rows:
        state = Text(row.state, style=COLOURS.get(row.state.split(":")[0], ""))
        figures = (row.members, row.participants, row.discarded)
        table.add_row(
            str(row.number), state, str(row.step), _loss(row.loss), *(str(f) for f in figures)
        )
    return table


def _in_words(row: Row) -> str:
    if row.state.startswith(("starting", "dead", "ended")):
        return f"{row.number} {row.state}"
    return f"{row.number} {row.state} step {row.step} loss {_loss(row.loss)} of {row.members}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def choose_view(out: TextIO | None = None) -> View:
    """The table when `out` (standard output) is a terminal and rich is installed, else lines."""
    out = out or sys.stdout
    if not out.isatty():
        return PlainView(out)
    try:
        return RichView()
    except ImportError:
        view = PlainView(out)
        view.tell(0.0, "plain lines, since rich is not installed: pip install '.[demo]'")
        return view
