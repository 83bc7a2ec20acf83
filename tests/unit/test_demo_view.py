"""What is seen of a run."""

from __future__ import annotations

import io
import sys

import pytest

from torchft.demo.view import Frame, PlainView, RichView, Row, choose_view


def frame(elapsed_s: float, step: int = 7) -> Frame:
    training = Row(
        number=0, state="training", step=step, loss=4.25, members=1, participants=1, discarded=0
    )
    dead = Row(number=1, state="dead", step=7, loss=4.3, members=2, participants=2, discarded=0)
    return Frame(elapsed_s=elapsed_s, target=100, rows=[training, dead])


def test_news_are_lines_at_once() -> None:
    out = io.StringIO()
    with PlainView(out) as view:
        view.tell(12.34, "group 1 is killed")
    assert out.getvalue() == "  12.3 s  group 1 is killed\n"


def test_frames_are_lines_once_in_a_while() -> None:
    out = io.StringIO()
    view = PlainView(out, every_s=2.0)
    for elapsed_s, step in ((1.0, 7), (1.5, 8), (3.0, 7), (3.1, 9)):
        view.show(frame(elapsed_s, step))
    first, second = out.getvalue().splitlines()
    assert first == "   1.0 s  0 training step 7 loss 4.250 of 1; 1 dead"
    assert second.startswith("   3.1 s  0 training step 9"), "nothing had changed at 3.0"


def test_a_pipe_gets_plain_lines() -> None:
    assert isinstance(choose_view(io.StringIO()), PlainView)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_the_table() -> None:
    assert isinstance(choose_view(Terminal()), RichView)


def test_a_terminal_without_rich_gets_lines_and_is_told_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    out = Terminal()
    assert isinstance(choose_view(out), PlainView)
    assert "rich is not installed: pip install '.[demo]'" in out.getvalue()


def test_the_table_has_a_row_for_each_group() -> None:
    from rich.console import Console

    from torchft.demo.view import _table

    console = Console(file=io.StringIO(), width=100)
    console.print(_table(frame(3.0)))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "training" in text
    assert "dead" in text
    assert "4.250" in text
