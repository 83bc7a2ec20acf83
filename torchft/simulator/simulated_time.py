"""How long a run would have taken on some network: its record moves the clocks of the nodes.

What each thing costs is in `torchft.simulator.clocks`. Pure: no clock of this computer is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from torchft.peers import Place
from torchft.simulator.clocks import Clocks, Lost, NodeSeconds
from torchft.simulator.events import Dies
from torchft.simulator.network import NetworkModel
from torchft.simulator.round_records import HealRecord, RoundRecord

if TYPE_CHECKING:
    from torchft.simulator.result import Result

__all__ = ["Forecast", "ForecastStep", "forecast", "forecast_records", "smoothed"]


@dataclass(frozen=True)
class ForecastStep:
    """When one step began and ended, in simulated time."""

    end_s: float
    """When the last node that was there had ended it."""
    nodes: tuple[NodeSeconds, ...]
    """What each node spent in it."""


@dataclass(frozen=True)
class Forecast:
    """How long a run takes on one network, in simulated time."""

    elapsed_s: float
    nodes: tuple[NodeSeconds, ...]
    """Totals of each node; each adds up to `elapsed_s`."""
    steps: tuple[ForecastStep, ...]
    losses: tuple[float, ...]
    """Mean training loss of the nodes that computed, by step."""
    bytes_sent: tuple[int, ...]
    """By node: rounds, and state given to others."""
    lost: Lost

    @property
    def step_ends_s(self) -> list[float]:
        """Simulated seconds at the end of each step."""
        return [step.end_s for step in self.steps]

    @property
    def utilisation(self) -> float:
        """Share of the nodes' time, while they were there, that went into computing."""
        there = sum(node.elapsed_s - node.away_s for node in self.nodes)
        return sum(node.compute_s for node in self.nodes) / there if there else 0.0

    def time_to_loss(self, threshold: float, *, window: int = 10) -> float | None:
        """Simulated seconds until the mean training loss of the last `window` steps was at most
        `threshold`; None when it never was."""
        ends = zip(self.steps, smoothed(self.losses, window), strict=True)
        return next((step.end_s for step, loss in ends if loss <= threshold), None)


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """At each step the mean of the last `window`; infinite where there are not so many yet, so
    that a lucky start is not taken for learning. A shorter run has one such mean, at its end."""
    if not losses:
        return []
    window = min(window, len(losses))
    whole = [sum(losses[at - window : at]) / window for at in range(window, len(losses) + 1)]
    return [math.inf] * (window - 1) + whole


def forecast(result: Result, network: NetworkModel, *, measured_s: float | None = None) -> Forecast:
    """How long the run of `result` takes on this network, and where the time goes.

    The network may be another than the one the run had: speeds and links change no learning. Only
    failures and joins do, and those are the run's own.

        slow, fast = forecast(result, dsl), forecast(result, fibre)

    `measured_s`: seconds of one inner step of a node of speed 1; by default those that the run took
    here for one node. They wander, so give each node its `step_s` for figures that are to be equal
    in the next run.

    Raises:
        SettingsError: the network gives speeds, and nothing was measured.
    """
    if measured_s is None:
        measured_s = _measured(result)
    return forecast_records(
        num_nodes=result.num_nodes,
        losses=[row.losses for row in result.history],
        rounds=result.rounds,
        heals=result.heals,
        deaths=[event for event in result.events if isinstance(event, Dies)],
        network=network,
        measured_s=measured_s,
    )


def forecast_records(
    *,
    num_nodes: int,
    losses: Sequence[Mapping[int, float]],
    rounds: Sequence[RoundRecord],
    heals: Sequence[HealRecord] = (),
    deaths: Sequence[Dies] = (),
    network: NetworkModel,
    measured_s: float | None = None,
) -> Forecast:
    """`forecast` of bare records. `losses`: by step, the loss of each node that computed in it."""
    links = [network.of(node) for node in range(num_nodes)]
    pace = [link.seconds_a_step(measured_s) for link in links]
    record = _Record(rounds, heals, deaths)
    clocks = Clocks(links, network.heartbeat_timeout_s, _there_at_first(losses, record, num_nodes))
    steps: list[ForecastStep] = []
    for step, computed in enumerate(losses):
        before = [spent.copy() for spent in clocks.spent]
        _play(record, clocks, step, computed, pace)
        end = max([steps[-1].end_s if steps else 0.0, clocks.latest()])
        nodes = (now.since(then) for now, then in zip(clocks.spent, before, strict=True))
        steps.append(ForecastStep(end, tuple(nodes)))
    return Forecast(
        elapsed_s=clocks.end(),
        nodes=tuple(clocks.spent),
        steps=tuple(steps),
        losses=tuple(sum(row.values()) / len(row) if row else math.nan for row in losses),
        bytes_sent=tuple(clocks.bytes_sent),
        lost=clocks.lost,
    )


def _there_at_first(
    losses: Sequence[Mapping[int, float]], record: _Record, num_nodes: int
) -> set[int]:
    """Also those that died in a round of the first step, before they had computed anything."""
    if not losses:
        return set(range(num_nodes))
    members = {node for turn in record.turns.get(0, ()) if turn.opens for node in turn.of.members}
    return set(losses[0]) | (members - {heal.node for heal in record.heals.get(0, ())})


def _measured(result: Result) -> float | None:
    node_steps = sum(len(row.losses) for row in result.history)
    seconds = result.seconds.get("steps")
    return seconds / node_steps if seconds and node_steps else None


@dataclass(frozen=True)
class _Turn:
    """A step in which something of a round happens: with a delay it has two of them."""

    step: int
    number: int
    """Of the round."""
    of: RoundRecord
    opens: bool
    closes: bool


class _Record:
    """What happened, by step."""

    def __init__(
        self,
        rounds: Sequence[RoundRecord],
        heals: Sequence[HealRecord],
        deaths: Sequence[Dies],
    ) -> None:
        self.turns = _turns(rounds)
        self.heals = _by_step(heals)
        self.deaths = _by_step([death for death in deaths if not death.in_round])
        self.doomed = [death for death in deaths if death.in_round]
        """Those that die in a round, until that round has come."""
        self.arrives: dict[int, float] = {}
        """When a round that is open will have arrived, by its number."""

    def struck(self, record: RoundRecord) -> list[int]:
        """Who dies in this round, which opens now."""
        if record.committed:
            return []
        opened = record.step - record.delay
        hit = [d for d in self.doomed if d.step <= opened and d.node in record.members]
        self.doomed = [death for death in self.doomed if death not in hit]
        return [death.node for death in hit]


class _HasStep(Protocol):
    @property
    def step(self) -> int: ...


R = TypeVar("R", bound=_HasStep)


def _by_step(records: Sequence[R]) -> dict[int, list[R]]:
    found: dict[int, list[R]] = {}
    for record in records:
        found.setdefault(record.step, []).append(record)
    return found


def _turns(rounds: Sequence[RoundRecord]) -> dict[int, list[_Turn]]:
    """As the strategy takes them: recipe by recipe what is due to close, then what opens."""
    turns = []
    for number, one in enumerate(rounds):
        late = one.delay > 0
        turns.append(_Turn(one.step, number, one, opens=not late, closes=True))
        if late:
            turns.append(_Turn(one.step - one.delay, number, one, opens=True, closes=False))
    turns.sort(key=lambda turn: (turn.of.place is Place.AFTER, turn.of.recipe, turn.opens))
    return _by_step(turns)


def _play(
    record: _Record,
    clocks: Clocks,
    step: int,
    computed: Iterable[int],
    pace: Sequence[float],
) -> None:
    """Move the clocks by one step."""
    for death in record.deaths.get(step, ()):
        clocks.die(death.node)
    heals = record.heals.get(step, [])
    # Who heals and computes in one step healed before it: the round averages gradients.
    early = [heal for heal in heals if heal.node in computed]
    clocks.heal(early, computed)
    for node in computed:
        clocks.compute(node, pace[node])
    late = [heal for heal in heals if heal not in early]
    for turn in record.turns.get(step, ()):
        one = turn.of
        if turn.opens:
            clocks.heal([heal for heal in late if heal.node in one.members], one.members)
            late = [heal for heal in late if heal.node not in one.members]
            record.arrives[turn.number] = clocks.open(one, record.struck(one))
        if turn.closes:
            clocks.close(one, record.arrives.pop(turn.number))
