"""How fast each node computes and communicates. It changes the time of a run, not what it learns.

    NetworkModel(nodes=[NodeProfile(step_s=0.1, up_bps=100e6, down_bps=1e9, latency_s=0.02)])

`torchft.simulator.forecast` applies it to the record of a run, so one run can be asked about many
networks. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchft.arguments import check_number
from torchft.errors import SettingsError

__all__ = ["NetworkModel", "NodeProfile"]

HEARTBEAT_TIMEOUT_S = 5.0
"""The lighthouse's default: so long is a silent group waited for."""


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
            if self.speed != 1.0:
                raise SettingsError("give step_s, or a speed relative to the measured step")

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
class NetworkModel:
    """The speed and the link of every node of a run."""

    nodes: Sequence[NodeProfile] = (NodeProfile(),)
    """Entry i is node i's; the last stands for all further nodes."""
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S
    """How long the others wait for a node that died."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", tuple(self.nodes))
        if not self.nodes:
            raise SettingsError("a network needs at least one node: give nodes")
        check_number("heartbeat_timeout_s", self.heartbeat_timeout_s, least=0)

    def of(self, node: int) -> NodeProfile:
        """The speed and the link of one node, which counts from 0."""
        return self.nodes[min(node, len(self.nodes) - 1)]

    def slowest_step_s(self, num_nodes: int) -> float | None:
        """Seconds of one inner step of the slowest of the first `num_nodes` nodes; None where a
        node's seconds are not given."""
        known = [s for node in range(num_nodes) if (s := self.of(node).step_s) is not None]
        return max(known) if len(known) == num_nodes else None
