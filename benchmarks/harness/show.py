"""Figures as tables: aligned lines on a terminal, markdown for documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.figures import Figure, Result
from harness.goals import GOALS, judge

__all__ = ["as_lines", "as_markdown", "taken_on"]

TIMES = "\N{MULTIPLICATION SIGN}"
HEADER = ("metric", "figure", "floor", "ratio", "goal", "")


def as_lines(result: Result) -> str:
    """A title, then one line a figure."""
    rows = [HEADER, *(_row(figure) for figure in result.figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join((f"{result.benchmark} ({taken_on(result)})", *lines))


def as_markdown(results: Iterable[Result]) -> str:
    """One table over all results."""
    lines = [_markdown(HEADER), _markdown(["---"] * len(HEADER))]
    for result in results:
        lines += [_markdown(_row(figure)) for figure in result.figures]
    return "\n".join(lines)


def taken_on(result: Result) -> str:
    """The machine, in words."""
    return ", ".join(f"{name} {value}" for name, value in result.machine.items())


def _markdown(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def _row(figure: Figure) -> tuple[str, ...]:
    floor = f"{_number(figure.floor.value)} ({figure.floor.name})" if figure.floor else ""
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    spread = "" if figure.spread is None else f" ± {figure.spread:.1g}"
    value = f"{_number(figure.value)}{spread} {figure.unit}".rstrip()
    return figure.name, value, floor, ratio, _goal(figure), judge(figure).value


def _goal(figure: Figure) -> str:
    goal = GOALS.get(figure.key)
    if goal is None:
        return ""
    bound = f"{'≥' if goal.least else '≤'} {goal.bound:g}"
    return f"{bound} {TIMES if goal.ratio else figure.unit}".rstrip()


def _number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:#.3g}"
