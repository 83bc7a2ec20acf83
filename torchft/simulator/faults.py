"""Weather: how fast each node and its link are, who fails, and who comes when.

It comes in two halves. Speeds, bandwidths and latencies change no learning, only time: they are
applied afterwards, to the record of a run (`torchft.simulator.forecast`), so one run can be
asked about many networks. Failures and joins do change the learning: they become events of the run.

    Weather(
        nodes=[NodeProfile(step_s=0.1, up_bps=100e6, down_bps=1e9, latency_s=0.02)],
        events=[
            FaultEvent(node=1, event="dies", step=40),
            FaultEvent(node=1, event="joins", step=60),
        ],
    )

Pure but for `read_trace`, which reads one file, when the events are asked for.
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

from torchft.arguments import check_integer, check_number, integer_from
from torchft.errors import SettingsError
from torchft.simulator.events import Dies, Event, Joins, check_events

__all__ = ["FaultEvent", "NodeProfile", "RandomFailures", "Weather", "parse_trace", "read_trace"]

HEARTBEAT_TIMEOUT_S = 5.0
"""The lighthouse's default: so long is a silent group waited for."""


def _check(good: bool, otherwise: str) -> None:
    if not good:
        raise SettingsError(otherwise)


@dataclass(frozen=True, kw_only=True)
class NodeProfile:
    """One node and its link. What is left out costs no time."""

    step_s: float | None = None
    """Seconds of one inner step. None: those that the run measured, divided by `speed`."""
    speed: float = 1.0
    """2 is twice as fast as measured. Not together with `step_s`."""
    up_bps: float = math.inf
    """Bits per second that leave the node."""
    down_bps: float = math.inf
    """Bits per second that reach it."""
    latency_s: float = 0.0
    """Seconds until the first bit of a message arrives."""

    def __post_init__(self) -> None:
        check_number("speed", self.speed, above=0)
        check_number("up_bps", self.up_bps, above=0, finite=False)
        check_number("down_bps", self.down_bps, above=0, finite=False)
        check_number("latency_s", self.latency_s, least=0)
        if self.step_s is not None:
            check_number("step_s", self.step_s, above=0)
            _check(self.speed == 1.0, "give step_s, or a speed relative to the measured step")

    def seconds_a_step(self, measured_s: float | None) -> float:
        """Of one inner step, `measured_s` being what the run took.

        Raises:
            SettingsError: only a speed is known, and nothing was measured.
        """
        if self.step_s is not None:
            return self.step_s
        if measured_s is None:
            raise SettingsError(
                "a speed is relative to a measured step, and none was measured: give step_s"
            )
        return measured_s / self.speed


@dataclass(frozen=True, kw_only=True)
class FaultEvent:
    """A node fails or comes, at a step or at a simulated time. One line of a trace."""

    node: int
    event: Literal["dies", "joins"]
    step: int | None = None
    """Counted from 0."""
    time_s: float | None = None
    """Since the start; becomes a step by the weather's pace."""
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
class Weather:
    """Of all nodes."""

    nodes: Sequence[NodeProfile] = (NodeProfile(),)
    """Entry i is node i's; the last stands for all further nodes."""
    events: Sequence[FaultEvent] = ()
    trace: Path | None = None
    """A file of further events, see `read_trace`."""
    failures: RandomFailures | None = None
    """Further events by chance; not together with events or a trace."""
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    """So long do the others wait for a node that died."""
    pace_s: float | None = None
    """Seconds per step, communication included, by which the times of events become steps.
    None: the slowest node's compute alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "events", tuple(self.events))
        _check(len(self.nodes) > 0, "weather needs one node at least")
        check_number("heartbeat_timeout_s", self.heartbeat_timeout_s, least=0)
        if self.pace_s is not None:
            check_number("pace_s", self.pace_s, above=0)
        both = self.failures is not None and bool(self.events or self.trace)
        _check(not both, "give events (or a trace) or failures by chance, not both")

    def of(self, node: int) -> NodeProfile:
        """This node's."""
        return self.nodes[min(node, len(self.nodes) - 1)]

    def to_events(
        self, num_nodes: int, steps: int, *, measured_s: float | None = None
    ) -> list[Event]:
        """What happens in a run of `steps` steps, by step; what is later than that does not.

        Raises:
            SettingsError: a node that does not exist, that dies twice, that joins while it is
                there; or nobody is left.
        """
        wanted = [*self.events, *(read_trace(self.trace) if self.trace else ())]
        if self.failures is not None:
            wanted = self.failures.draw(num_nodes, steps)
        for event in wanted:
            last = num_nodes - 1
            _check(event.node <= last, f"{event}: the nodes are 0 to {last}")
        timed = [(self._step_of(event, num_nodes, measured_s), event) for event in wanted]
        # Who joins comes before who dies, so that a relief is there in time.
        timed.sort(key=lambda one: (one[0], one[1].event == "dies", one[1].node))
        happening = [_event_at(step, event) for step, event in timed if step < steps]
        check_events(num_nodes, happening)
        return happening

    def _step_of(self, event: FaultEvent, num_nodes: int, measured_s: float | None) -> int:
        if event.step is not None:
            return event.step
        assert event.time_s is not None
        return math.ceil(event.time_s / self._pace(num_nodes, measured_s) - 1e-9)

    def _pace(self, num_nodes: int, measured_s: float | None) -> float:
        if self.pace_s is not None:
            return self.pace_s
        nodes = [self.of(node) for node in range(num_nodes)]
        if measured_s is None and any(node.step_s is None for node in nodes):
            raise SettingsError(
                "events at a time need a pace: give pace_s, the seconds of one step, or step_s of "
                "every node"
            )
        return max(node.seconds_a_step(measured_s) for node in nodes)


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
    """The events of a trace that has been read."""
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
        in_round=_truth(row.get("in_round", False)),
    )


def _integer(name: str, cell: Any) -> int:
    value = integer_from(cell) if isinstance(cell, str) else cell
    check_integer(name, value)
    return int(cell)


def _truth(cell: object) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    answer = cell if isinstance(cell, bool) else words.get(str(cell).lower())
    if answer is None:
        raise SettingsError(f"in_round={cell!r} is neither true nor false")
    return answer
