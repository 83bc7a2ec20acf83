"""A clock for each node, moved by what the record of a run says.

    a node computes           its clock moves by its seconds a step
    a round opens             when all its members are there: the others wait for the slowest
    it communicates           its messages' latencies + what the busiest member sends / the slowest
                              link among them, as soon as nothing else travels there
    it has a delay            its members train on, and wait for what has not arrived at its close
    a member dies in it       the others wait for the heartbeat timeout, and the round fails
    a node died before it     it cannot open before that node's heartbeats have timed out
    a node heals at its start its clock moves by latency + state / the slower of both links; a donor
                              of several shares its uplink among them, and goes on training

Messages of a round among n members, one behind the other: 2(n-1) of an average (a ring, or an
exchange and a gathering), n-1 of a gathering, for each operation. One node alone communicates not
at all; islands take as many messages as all together would. The sum of a node's seconds by kind is
the run's elapsed time. Pure.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, fields

from torchft.peers import Place
from torchft.simulator.network import NodeProfile
from torchft.simulator.round_records import HealRecord, RoundRecord

__all__ = [
    "Clocks",
    "Lost",
    "NodeSeconds",
    "heal_seconds",
    "round_seconds",
]


@dataclass
class NodeSeconds:
    """Where one node's simulated time went."""

    compute_s: float = 0.0
    communicate_s: float = 0.0
    """While it did nothing else: what travels beside training costs no time."""
    wait_s: float = 0.0
    """For slower members, for a lost one's heartbeats, at the end for the last."""
    heal_s: float = 0.0
    """Receiving state."""
    away_s: float = 0.0
    """Not there: dead, or not yet joined."""

    @property
    def elapsed_s(self) -> float:
        """The sum of all its kinds of seconds."""
        return sum(getattr(self, one.name) for one in fields(self))

    def since(self, before: NodeSeconds) -> NodeSeconds:
        """The seconds that were added since the copy `before`."""
        pairs = {o.name: (getattr(self, o.name), getattr(before, o.name)) for o in fields(self)}
        return NodeSeconds(**{name: now - then for name, (now, then) in pairs.items()})

    def copy(self) -> NodeSeconds:
        """A copy that later seconds do not change."""
        return NodeSeconds(**vars(self))


@dataclass
class Lost:
    """How many steps and seconds were lost to failures."""

    deaths: int = 0
    rounds: int = 0
    """Rounds that came to nothing."""
    node_steps: int = 0
    """Inner steps computed in vain: by nodes that died, since they last contributed; and by all
    members of a discarded round that gave up what it was about."""
    heals: int = 0
    heal_bytes: int = 0


def round_seconds(record: RoundRecord, links: Sequence[NodeProfile]) -> float:
    """How long the members communicate, from the moment when all are there."""
    members = len(record.members)
    if members < 2:
        return 0.0
    messages = (members - 1) * (1 if record.kind == "gather" else 2) * record.collectives
    busiest = max(record.bytes_per_node.get(node, 0) for node in record.members)
    slowest = min(min(links[n].up_bps, links[n].down_bps) for n in record.members)
    latency = max(links[node].latency_s for node in record.members)
    return messages * latency + 8 * busiest / slowest


def heal_seconds(nbytes: int, donor: NodeProfile, node: NodeProfile, sharing: int = 1) -> float:
    """How long the state travels, while `sharing` nodes take it from the same donor."""
    latency = max(donor.latency_s, node.latency_s)
    return latency + 8 * nbytes / min(donor.up_bps / sharing, node.down_bps)


class Clocks:
    """All nodes' clocks while the record is read."""

    def __init__(
        self, links: Sequence[NodeProfile], heartbeat_timeout_s: float, there: Container[int]
    ) -> None:
        self.links = links
        self.heartbeat_timeout_s = heartbeat_timeout_s
        self.now = [0.0] * len(links)
        self.spent = [NodeSeconds() for _ in links]
        self.left_at = {node: 0.0 for node in range(len(links)) if node not in there}
        """Nodes that are not there, and since when."""
        self.opens_after = 0.0
        """Until then a dead node may still be alive for all that the others know."""
        self.at_stake = [0] * len(links)
        """By node: inner steps since it last contributed to a committed round."""
        self.busy_until = [0.0] * len(links)
        """When the last round that a node sends for will have arrived: the next one follows it."""
        self.bytes_sent = [0] * len(links)
        self.lost = Lost()

    def compute(self, node: int, seconds: float) -> None:
        """Account for one inner step of one node."""
        self.now[node] += seconds
        self.spent[node].compute_s += seconds
        self.at_stake[node] += 1

    def wait_until(self, nodes: Iterable[int], moment: float) -> None:
        """All of them are idle until then."""
        for node in nodes:
            self.spent[node].wait_s += moment - self.now[node]
            self.now[node] = moment

    def meet(self, nodes: Iterable[int]) -> float:
        """The first moment at which all of them are there, and nobody else can be."""
        return max([self.opens_after, *(self.now[node] for node in nodes)])

    def leave(self, node: int) -> None:
        """It dies, there or while it waits to heal."""
        self.lost.deaths += 1
        if node in self.left_at:
            return
        self.left_at[node] = self.now[node]
        self.lost.node_steps += self.at_stake[node]
        self.at_stake[node] = 0

    def die(self, node: int) -> None:
        """It dies; the others find out when its heartbeats have timed out."""
        self.leave(node)
        self.opens_after = max(self.opens_after, self.now[node] + self.heartbeat_timeout_s)

    def heal(self, heals: Sequence[HealRecord], members: Iterable[int]) -> None:
        """At the opening of a round with `members`."""
        healing = {heal.node for heal in heals}
        opened = self.meet(node for node in members if node not in healing)
        donors = [heal.donor for heal in heals]
        for heal in heals:
            node, sharing = heal.node, donors.count(heal.donor)
            self._arrive(node, opened)
            seconds = heal_seconds(
                heal.nbytes, self.links[heal.donor], self.links[node], sharing=sharing
            )
            self.now[node] += seconds
            self.spent[node].heal_s += seconds
            self.bytes_sent[heal.donor] += heal.nbytes
            self.lost.heals += 1
            self.lost.heal_bytes += heal.nbytes
            self.at_stake[node] = 0

    def open(self, record: RoundRecord, dying: Sequence[int]) -> float:
        """A round opens, and its bytes go on their way. When they will have arrived."""
        opened = self.meet(record.members)
        self.wait_until(record.members, opened)
        for node, sent in record.bytes_per_node.items():
            self.bytes_sent[node] += sent
        for node in dying:
            self.die(node)
        if dying:
            return self.opens_after
        begins = max([opened, *(self.busy_until[node] for node in record.members)])
        arrives = begins + round_seconds(record, self.links)
        for node in record.members:
            self.busy_until[node] = arrives
        return arrives

    def close(self, record: RoundRecord, arrives: float) -> None:
        """A round closes: its members wait until it has arrived, or until one is known dead."""
        there = [node for node in record.members if node not in self.left_at]
        if not record.committed and len(there) < len(record.members):
            for node in there:
                self.wait_until([node], max(self.now[node], self.opens_after))
                self.busy_until[node] = min(self.busy_until[node], self.now[node])
        else:
            for node in there:
                seconds = max(0.0, arrives - self.now[node])
                self.now[node] += seconds
                self.spent[node].communicate_s += seconds
        self._account(record)

    def latest(self) -> float:
        """When the last node that is there is."""
        return max(
            (now for node, now in enumerate(self.now) if node not in self.left_at), default=0
        )

    def end(self) -> float:
        """Let every node wait for the one that ends last."""
        there = [node for node in range(len(self.now)) if node not in self.left_at]
        elapsed = max(self.now)
        self.wait_until(there, elapsed)
        for node in list(self.left_at):
            self._arrive(node, elapsed)
        return elapsed

    def _arrive(self, node: int, moment: float) -> None:
        left = self.left_at.pop(node, None)
        if left is None:  # it was there, but behind
            self.wait_until([node], max(moment, self.now[node]))
        else:
            self.spent[node].away_s += moment - left
            self.now[node] = moment

    def _account(self, record: RoundRecord) -> None:
        if record.committed:
            for node in record.counted:
                self.at_stake[node] = min(self.at_stake[node], record.delay)
            return
        self.lost.rounds += 1
        for node in record.members:
            given_up = _given_up(record, self.at_stake[node])
            self.lost.node_steps += given_up
            self.at_stake[node] -= given_up


def _given_up(record: RoundRecord, at_stake: int) -> int:
    """Inner steps that a member loses by a round that came to nothing."""
    if record.place is Place.BEFORE:
        return min(1, at_stake)  # the gradient
    return at_stake if record.restores else 0
