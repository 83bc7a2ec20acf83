"""What happens to the nodes of a run, and who is there because of it.

    Dies(node=2, step=40)                  gone before step 40
    Dies(node=2, step=40, in_round=True)   gone while the first round from step 40 on is open
    Joins(node=2, step=60)                 back: heals when the next round opens

A node whose first event is `Joins` is absent from the start. Steps are inner steps, from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torchft.arguments import check_choice, check_integer
from torchft.errors import SettingsError

__all__ = [
    "Dies",
    "Discards",
    "Event",
    "Joins",
    "Membership",
    "Misses",
    "check_events",
    "check_list",
]


@dataclass(frozen=True)
class Dies:
    """A node is killed, with all that it holds."""

    node: int
    step: int
    in_round: bool = False
    """Between the opening and the close of a round, which then comes to nothing for all."""


@dataclass(frozen=True)
class Joins:
    """A node starts, and heals when the next round opens."""

    node: int
    step: int
    donor: int | None = None
    """Whose state it gets; by default that of the first node that is up to date."""


@dataclass(frozen=True)
class Discards:
    """The rounds that close in this step are voted down, though nobody is lost."""

    step: int


@dataclass(frozen=True)
class Misses:
    """The rounds of this step commit for the others; this node missed that and must heal again."""

    node: int
    step: int
    donor: int | None = None


Event = Dies | Joins | Discards | Misses
_Timed = TypeVar("_Timed", Dies, Joins)
_PENDING: dict[str, type[Dies | Joins]] = {"_deaths": Dies, "_doomed": Dies, "_joins": Joins}


class Membership:
    """Who is there, step by step. It decides; whoever asks carries it out."""

    def __init__(self, num_nodes: int, events: Sequence[Event] = ()) -> None:
        check_events(num_nodes, events)
        ordered = sorted(events, key=lambda event: event.step)
        self._deaths = [e for e in ordered if isinstance(e, Dies) and not e.in_round]
        self._doomed = [e for e in ordered if isinstance(e, Dies) and e.in_round]
        self._joins = [e for e in ordered if isinstance(e, Joins)]
        self._misses = {(e.node, e.step): e.donor for e in ordered if isinstance(e, Misses)}
        self._discards = {e.step for e in ordered if isinstance(e, Discards)}
        absent = _absent_at_start(ordered)
        self.alive = [node for node in range(num_nodes) if node not in absent]
        """Up to date and training, in node order."""
        self.waiting: dict[int, int | None] = {}
        """Started, not yet healed: node → the donor it asks for."""
        self.lives = [0] * num_nodes
        """How often each node has gone: a round that a member did not outlive sees it here."""

    def begin(self, step: int) -> list[int]:
        """What is due when `step` begins. Returns who is gone.

        Raises:
            SettingsError: nobody is left to train, or to heal from.
        """
        gone = [e.node for e in _take(self._deaths, step)]
        for node in gone:
            self._leave(node)
        # One that is to die in a round that has not opened yet starts again only after it.
        late = [e for e in self._joins if e.node in self.alive]
        self._joins = [e for e in self._joins if e not in late]
        for event in _take(self._joins, step):
            self.waiting[event.node] = event.donor
        self._joins = sorted([*self._joins, *late], key=lambda event: event.step)
        if not self.alive:
            raise SettingsError(
                f"nobody is left at step {step} (events count steps from 0): let some node live"
            )
        return gone

    def admit(self) -> list[tuple[int, int]]:
        """A round opens: who heals, and from whom.

        Raises:
            SettingsError: a donor that is not up to date.
        """
        healed = []
        for node, donor in sorted(self.waiting.items()):
            source = self.alive[0] if donor is None else donor
            if source not in self.alive:
                raise SettingsError(f"node {node} cannot heal from node {source}: it is not there")
            healed.append((node, source))
        self.waiting.clear()
        self.alive = sorted([*self.alive, *(node for node, _ in healed)])
        return healed

    def strike(self, step: int) -> list[int]:
        """A round has opened: who is gone before it closes."""
        gone = [e.node for e in _take(self._doomed, step)]
        for node in gone:
            self._leave(node)
        return gone

    def goes(self, step: int) -> bool:
        """Whether rounds that close in `step` are let through."""
        return step not in self._discards

    def miss(self, step: int) -> list[int]:
        """A round committed: who missed it, and now waits to heal."""
        missed = [node for node in self.alive if (node, step) in self._misses]
        for node in missed:
            self._leave(node)
            self.waiting[node] = self._misses[node, step]
        return missed

    def state_dict(self) -> dict[str, Any]:
        """Who is there now; events that are past follow from the step."""
        return {
            "alive": list(self.alive),
            "waiting": list(self.waiting.items()),
            "lives": list(self.lives),
            "pending": {
                name: [asdict(event) for event in getattr(self, name)] for name in _PENDING
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.alive = list(state["alive"])
        self.waiting = dict(state["waiting"])
        self.lives = list(state["lives"])
        for name, kind in _PENDING.items():
            setattr(self, name, [kind(**fields) for fields in state["pending"][name]])

    def _leave(self, node: int) -> None:
        self.lives[node] += 1
        self.waiting.pop(node, None)
        if node in self.alive:
            self.alive.remove(node)


def check_events(num_nodes: int, events: Sequence[Event]) -> None:
    """Refuse events that contradict each other.

    Raises:
        SettingsError: a node or donor that there is not, the death of one that is absent, the start
            of one that is there, or nobody left.
    """
    check_list(events)
    for event in events:
        _check_types(event)
    ordered = sorted(events, key=lambda event: event.step)
    present = set(range(num_nodes)) - _absent_at_start(ordered)
    if not present:
        raise SettingsError("no node is there at the start: somebody must be, to heal from")
    for event in ordered:
        if event.step < 0:
            raise SettingsError(f"{event}: events count steps from 0")
        if isinstance(event, Discards):
            continue
        if not 0 <= event.node < num_nodes:
            raise SettingsError(f"{event}: the nodes are 0 to {num_nodes - 1}")
        if (event.node in present) is isinstance(event, Joins):
            there = "there already" if event.node in present else "not there"
            raise SettingsError(
                f"{event}: this node is {there} at that step (events count steps from 0)"
            )
        if isinstance(event, Dies):
            present.discard(event.node)
        else:
            _check_donor(event, num_nodes)
            present.add(event.node)
        if not present:
            raise SettingsError(f"{event}: nobody is left after it: let some node live")


def _check_donor(event: Joins | Misses, num_nodes: int) -> None:
    if event.donor is None:
        return
    if event.donor == event.node:
        raise SettingsError(f"{event}: a node cannot heal from itself, name another donor or none")
    if not 0 <= event.donor < num_nodes:
        raise SettingsError(f"{event}: the donor must be one of the nodes 0 to {num_nodes - 1}")


def check_list(events: object) -> None:
    """They are a list of events.

    Raises:
        SettingsError: they are not.
    """
    if isinstance(events, Event):
        raise SettingsError(f"events is one {type(events).__name__}: give a list, [{events}]")
    if not isinstance(events, Sequence) or isinstance(events, str):
        raise SettingsError(
            f"events is a {type(events).__name__}: give a list, like [Dies(node=1, step=40)]"
        )
    for event in events:
        if not isinstance(event, Event):
            what = event.__name__ if isinstance(event, type) else repr(event)
            raise SettingsError(
                f"{what} among the events is none: use Dies(node, step), Joins(node, step), "
                "Discards(step) or Misses(node, step)"
            )


def _check_types(event: Event) -> None:
    for name, value in asdict(event).items():
        if name == "in_round":
            check_choice(f"{event}: {name}", value, (True, False))
        elif name != "donor" or value is not None:
            check_integer(f"{event}: {name}", value)


def _absent_at_start(ordered: Sequence[Event]) -> set[int]:
    """Nodes whose first event is their start."""
    first: dict[int, Event] = {}
    for event in ordered:
        if not isinstance(event, Discards):
            first.setdefault(event.node, event)
    return {node for node, event in first.items() if isinstance(event, Joins)}


def _take(pending: list[_Timed], step: int) -> Iterator[_Timed]:
    """Remove and give what is due by `step`."""
    while pending and pending[0].step <= step:
        yield pending.pop(0)
