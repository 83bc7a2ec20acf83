"""The parameter server's rounds and outer steps in simulated time, all nodes in this process.

Rounds, shared weights and workers' weights are the server's own and the workers' own; what is left
out is the network. A node trains H steps, submits, and goes on with the newest weights as soon as
there are other ones than those it has measured from. Time is what the nodes' speeds make of it, so
a run depends on nothing but its seed.
"""

from __future__ import annotations

import heapq
import itertools
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.events import Event, RoundClosed
from torchft.parameter_server.core.options import OuterOptions
from torchft.parameter_server.core.rounds import Rounds
from torchft.parameter_server.core.rules import Refusal, Rules
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.core.submission import Submission
from torchft.parameter_server.server.weights import ServerWeights
from torchft.parameter_server.worker.sharded import named_parameters
from torchft.parameter_server.worker.weights import WorkerWeights
from torchft.quantization import codec_of

__all__ = ["Node", "Plan", "Simulated"]

JITTER = 0.1
"""Standard deviation of the time that H steps take, of their mean."""


@dataclass
class Node:
    """`train(step, done)` takes one inner step; `done` is how much of the run has been begun."""

    name: str
    model: nn.Module
    train: Callable[[int, float], None]
    step_s: float
    weights: WorkerWeights = field(init=False)
    version: int = 0
    identity: str = ""
    """Of the base that it measured from."""
    sent: list[memoryview] = field(default_factory=list)
    number: int = 0
    steps: int = 0
    waits: bool = False


@dataclass(frozen=True)
class Plan:
    """Of one run."""

    rules: Rules
    outer: OuterOptions
    sync_every: int
    """H."""
    steps: int
    """Of all nodes together."""
    seed: int
    codec: str = "bf16"


class Simulated:
    """One run. `run` leaves the common weights in the first node's model."""

    def __init__(self, plan: Plan, nodes: Sequence[Node]) -> None:
        self.plan, self.nodes = plan, nodes
        self.now = 0.0
        """Seconds of simulated time."""
        self._folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        self._uploads = Path(self._folder.name)
        self._codec = codec_of(plan.codec)
        self._random = random.Random(plan.seed)
        self._ends: list[tuple[float, int]] = []
        """When a node's H steps are over, and its place."""
        self._begun = 0
        self._rounds = Rounds(plan.rules, 1)
        parameters = named_parameters(nodes[0].model)
        shape = ModelShape.of(parameters.items())
        first = WorkerWeights(parameters, shape).row(0)
        outer = plan.outer.build(plan.rules)
        self._state = ServerWeights(shape, self._codec, outer, [first], self._uploads / "news")
        for node in nodes:
            node.weights = WorkerWeights(named_parameters(node.model), shape)
            self._fetch(node)
            joined = self._rounds.join(0.0, node.name, "1", 0.0)
            assert not isinstance(joined, Refusal)
            self._carry_out(joined)

    def run(self) -> None:
        """Until all steps are taken and all of them count."""
        for place, _ in enumerate(self.nodes):
            self._begin(place)
        while self._ends or any(node.waits for node in self.nodes):
            self._next_event()
        self._fetch(self.nodes[0])
        self._folder.cleanup()

    # ------------------------------------------------------------------ events

    def _next_event(self) -> None:
        tick = self._rounds.next_at(self.now)
        if self._ends and (tick is None or self._ends[0][0] <= tick):
            self.now, place = heapq.heappop(self._ends)
            self._submit(place)
        elif tick is not None:
            self.now = tick
            self._carry_out(self._rounds.tick(self.now))
        else:
            raise RuntimeError(f"a round never closes: {self._rounds.waiting(self.now, 0)}")

    def _begin(self, place: int) -> None:
        """H more steps; or the node leaves, when the run has been given all of them."""
        node, plan = self.nodes[place], self.plan
        if self._begun + plan.sync_every > plan.steps:
            self._carry_out(self._rounds.leave(node.name))
            return
        for _ in range(plan.sync_every):
            node.train(node.steps, self._begun / plan.steps)
            node.steps += 1
            self._begun += 1
        pace = max(0.5, self._random.gauss(1.0, JITTER))
        heapq.heappush(self._ends, (self.now + plan.sync_every * node.step_s * pace, place))

    def _submit(self, place: int) -> None:
        node = self.nodes[place]
        node.number += 1
        name = f"{node.name}-{node.number}"
        chunks = Chunks(self._state.shape.numel, self._codec)
        node.identity, node.sent = node.weights.identity(0), node.weights.encode(0, chunks)
        self._upload(name).write_bytes(b"".join(node.sent))
        node.waits = True
        of = (
            node.name,
            "1",
            0,
            node.version,
            node.number,
            self.plan.sync_every,
            self.plan.sync_every,
        )
        self._carry_out([Submission(*of, name)])

    def _carry_out(self, events: Sequence[Event]) -> None:
        closes = iter(lambda: self._rounds.next_close(self.now), None)
        for event in itertools.chain(events, closes):
            self._rounds.apply(self.now, event)
            if isinstance(event, RoundClosed):
                self._state.apply(event, self._upload)
                for share in event.shares:
                    self._upload(share.submission.upload).unlink()
        self._go_on()

    def _go_on(self) -> None:
        for place, node in enumerate(self.nodes):
            if node.waits and self._state.published(0).version > node.version:
                node.waits = False
                self._adopt(node)
                self._begin(place)

    # ------------------------------------------------------------------ how

    def _upload(self, name: str) -> Path:
        return self._uploads / f"{name}.row"

    def _adopt(self, node: Node) -> None:
        update = self._state.update_for(0, node.version, node.identity)
        files = [(update.kind, self._state.folder / name) for name in update.files]
        if node.weights.apply(0, node.sent, files, self._codec) != update.identity:
            raise RuntimeError(f"{node.name} does not have the bits that the server has")
        node.version = update.version

    def _fetch(self, node: Node) -> None:
        """All of the newest weights."""
        update = self._state.update_for(0, -1, "none")
        node.weights.load(
            0, [(update.kind, self._state.folder / n) for n in update.files], self._codec
        )
        node.weights.restore(0)
        node.version = update.version
