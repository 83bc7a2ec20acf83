"""Who fails and who comes back in a run: given by step, by simulated time, or at random.

    FaultSchedule(
        events=[
            FaultEvent(node=1, event="dies", step=40),
            FaultEvent(node=1, event="joins", step=60),
        ],
    )

Failures and joins change what a run learns, so they become its events (`events.py`). Pure but for
`read_trace`, which reads one file when the events are asked for.
"""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torchft.arguments import boolean_of, check_integer, check_number, integer_from
from torchft.errors import SettingsError
from torchft.simulator.events import Dies, Event, Joins, check_events
from torchft.simulator.network import NetworkModel

__all__ = ["FaultEvent", "FaultSchedule", "RandomFailures", "parse_trace", "read_trace"]


def _check(good: bool, otherwise: str) -> None:
    if not good:
        raise SettingsError(otherwise)


@dataclass(frozen=True, kw_only=True)
class FaultEvent:
    """A node fails or comes, at a step or at a simulated time. One line of a trace."""

    node: int
    event: Literal["dies", "joins"]
    step: int | None = None
    """Counted from 0."""
    time_s: float | None = None
    """Since the start; becomes a step by the schedule's pace."""
    in_round: bool = False
    """It dies while it communicates, so that the round fails for all."""

    def __post_init__(self) -> None:
        _check(self.event in ("dies", "joins"), f"event={self.event!r} is neither dies nor joins")
        _check(self.node >= 0, f"node={self.node}: nodes count from 0")
        both = (self.step is None) == (self.time_s is None)
        _check(not both, f"an event of node {self.node} needs either step or time_s")
        _check(self.step is None or self.step >= 0, f"step={self.step}: steps count from 0")
        bad_time = self.time_s is not None and not 0 <= self.time_s < math.inf
        _check(not bad_time, f"time_s={self.time_s} is no time")
        wrong = self.in_round and self.event == "joins"
        _check(not wrong, f"node {self.node} joins between rounds: leave in_round out")


@dataclass(frozen=True, kw_only=True)
class RandomFailures:
    """Nodes fail by chance and come back. Node 0 stays, so that there always is a donor."""

    rate: float
    """Chance that a node fails in one step."""
    away_steps: int = 20
    """Steps until it is back."""
    in_round: float = 0.0
    """Share of the failures that happen while the node communicates."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("rate", self.rate, least=0, most=1)
        check_integer("away_steps", self.away_steps, least=1)
        check_number("in_round", self.in_round, least=0, most=1)

    def draw(self, num_nodes: int, steps: int) -> list[FaultEvent]:
        """Of one run. Which node fails when follows from the seed alone."""
        drawn: list[FaultEvent] = []
        for node in range(1, num_nodes):
            step = 0
            while step < steps:
                dice = random.Random(f"{self.seed}/{node}/{step}")
                if dice.random() < self.rate:
                    hit = dice.random() < self.in_round
                    drawn.append(FaultEvent(node=node, event="dies", step=step, in_round=hit))
                    step += self.away_steps
                    drawn.append(FaultEvent(node=node, event="joins", step=step))
                step += 1
        return drawn


@dataclass(frozen=True, kw_only=True)
class FaultSchedule:
    """Which nodes fail and come back in a run, and when.

    Raises:
        SettingsError: events and random failures are both given, or `pace_s` is not above 0.
    """

    events: Sequence[FaultEvent] = ()
    trace: Path | None = None
    """A file of further events, see `read_trace`."""
    failures: RandomFailures | None = None
    """Further events by chance; not together with events or a trace."""
    pace_s: float | None = None
    """Seconds per step, communication included, by which the times of events become steps.
    None: the compute of the slowest node alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", tuple(self.events))
        if self.pace_s is not None:
            check_number("pace_s", self.pace_s, above=0)
        both = self.failures is not None and bool(self.events or self.trace)
        _check(not both, "give events (or a trace) or failures by chance, not both")

    def to_events(
        self, num_nodes: int, steps: int, network: NetworkModel | None = None
    ) -> list[Event]:
        """List what happens in a run of `steps` steps, by step; later events are left out.

        Args:
            network: gives the pace of events that have a time, where `pace_s` does not.

        Raises:
            SettingsError: a node that does not exist, that dies twice, that joins while it is
                there; nobody is left; or an event has a time, and nothing gives a pace.
        """
        wanted = [*self.events, *(read_trace(self.trace) if self.trace else ())]
        if self.failures is not None:
            wanted = self.failures.draw(num_nodes, steps)
        for event in wanted:
            last = num_nodes - 1
            _check(event.node <= last, f"{event}: the nodes are 0 to {last}")
        pace_s = self.pace_s
        if pace_s is None and network is not None:
            pace_s = network.slowest_step_s(num_nodes)
        timed = [(_step_of(event, pace_s), event) for event in wanted]
        # Joins come before deaths of the same step, so that a replacement is there in time.
        timed.sort(key=lambda one: (one[0], one[1].event == "dies", one[1].node))
        happening = [_event_at(step, event) for step, event in timed if step < steps]
        check_events(num_nodes, happening)
        return happening


def _step_of(event: FaultEvent, pace_s: float | None) -> int:
    if event.step is not None:
        return event.step
    assert event.time_s is not None
    if pace_s is None:
        raise SettingsError(
            "events at a time need a pace: give pace_s, the seconds of one step, or step_s of "
            "every node of the network"
        )
    return math.ceil(event.time_s / pace_s - 1e-9)


def _event_at(step: int, event: FaultEvent) -> Event:
    if event.event == "joins":
        return Joins(node=event.node, step=step)
    return Dies(node=event.node, step=step, in_round=event.in_round)


def read_trace(path: str | Path) -> list[FaultEvent]:
    """Events from a file: CSV with a header (`.csv`), else JSON lines.

        step,node,event            {"time_s": 12.5, "node": 1, "event": "dies"}
        40,1,dies                  {"time_s": 30, "node": 1, "event": "joins"}

    Columns: `node`, `event` (dies or joins), `step` or `time_s`, and perhaps `in_round`.

    Raises:
        SettingsError: the file cannot be read, or a line is no event; names the line.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the trace {path}: {error}") from error
    return parse_trace(text, source=str(path), as_csv=path.suffix.lower() == ".csv")


def parse_trace(text: str, *, source: str, as_csv: bool) -> list[FaultEvent]:
    """The events of a trace that has been read, as CSV or as JSON lines.

    Raises:
        SettingsError: a line is no event; names it by `source` and number.
    """
    lines = text.splitlines()
    rows = _csv_rows(lines) if as_csv else _json_rows(lines, source)
    events = []
    for number, row in rows:
        try:
            events.append(_event_of(row))
        except (SettingsError, TypeError, ValueError) as error:
            raise SettingsError(f"{source}:{number} is no event: {error}") from error
    return events


def _csv_rows(lines: list[str]) -> Iterable[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(lines, skipinitialspace=True)
    for row in reader:
        # An empty cell is one that was left out.
        yield reader.line_num, {name: cell for name, cell in row.items() if cell not in ("", None)}


def _json_rows(lines: list[str], source: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{source}:{number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise SettingsError(f"{source}:{number} is no JSON object")
        yield number, row


def _event_of(row: Mapping[str, Any]) -> FaultEvent:
    known = {one.name for one in fields(FaultEvent)}
    unknown = sorted(str(name) for name in row.keys() - known)
    _check(not unknown, f"there is no column {', '.join(unknown)}; use {', '.join(sorted(known))}")
    missing = sorted({"node", "event"} - row.keys())
    _check(not missing, f"{' and '.join(missing)} missing")
    return FaultEvent(
        node=_integer("node", row["node"]),
        event=row["event"],
        step=_integer("step", row["step"]) if row.get("step") is not None else None,
        time_s=float(row["time_s"]) if row.get("time_s") is not None else None,
        in_round=_boolean("in_round", row.get("in_round", False)),
    )


def _integer(name: str, cell: Any) -> int:
    value = integer_from(cell) if isinstance(cell, str) else cell
    check_integer(name, value)
    return int(cell)


def _boolean(name: str, cell: object) -> bool:
    return cell if isinstance(cell, bool) else boolean_of(name, str(cell))
