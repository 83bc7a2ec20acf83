"""What is seen of a run."""

from __future__ import annotations

import io
import sys

import pytest

from torchft.demo.view import Frame, PlainView, RichView, choose_view


def frame(elapsed_s: float, step: int = 7) -> Frame:
    return Frame(
        elapsed_s=elapsed_s,
        title="until step 100",
        columns=("group", "state", "step", "loss"),
        rows=[["0", "training", str(step), "4.250"], ["1", "starting: worker", "7", "-"]],
        caption="waiting for b",
    )


def test_events_are_lines_at_once() -> None:
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
    assert first == "   1.0 s  until step 100; 0 training, step 7, loss 4.250; 1 starting: worker"
    assert second.startswith("   3.1 s  until step 100; 0 training, step 9"), (
        "nothing had changed at 3.0"
    )


def test_a_process_that_does_not_train_is_told_in_a_word() -> None:
    columns, last = ("worker", "state", "step", "loss", "rounds", "more"), ("70", "2.500", "7", "x")
    rows = [["a", "alone", *last], ["b", "killed", *last], ["c", "dead", *last]]
    told = Frame(elapsed_s=1.0, title="server up", columns=columns, rows=rows)
    assert told.line == "server up; a alone, step 70, loss 2.500, rounds 7; b killed; c dead"


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


def test_the_table_has_a_row_for_each_process() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=100)
    console.print(frame(3.0).table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "3.0 s, until step 100",
        "training",
        "starting: worker",
        "4.250",
        "waiting for b",
    ):
        assert words in text
