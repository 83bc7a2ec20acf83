"""A run: what is known once the first worker has registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from torchft.parameter_server.core.dylu import local_steps
from torchft.parameter_server.core.events import (
    Event,
    OptimizerChanged,
    RoundClosed,
    WorkersExpected,
    event_to_json,
)
from torchft.parameter_server.core.options import OuterOptions, ServerOptions, SharedSettings
from torchft.parameter_server.core.rounds import Rounds
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.server.weights import ServerWeights

__all__ = ["TrainingRun"]


@dataclass
class TrainingRun:
    """Everything that a run consists of. It changes on the event loop alone, in `apply`; its
    weights change in a thread of their own, in `carry_out`."""

    agreed: SharedSettings
    shape: ModelShape
    rounds: Rounds
    outer: OuterOptions
    """As it is for the rounds that close now: orders change it."""
    weights_or_none: ServerWeights | None = None
    """None: the first weights are still to come."""
    extras: dict[str, Tensor] | None = None
    """Tensors of the starting model that nobody trains; they go into checkpoints as they are."""
    expected: WorkersExpected | None = None
    """The order that changed how many workers are expected, if one did."""

    @property
    def weights(self) -> ServerWeights:
        """The weights that all workers share, of a run that has them."""
        assert self.weights_or_none is not None
        return self.weights_or_none

    @property
    def versions(self) -> list[int]:
        """The version of each fragment, counting steps that are decided and not taken yet."""
        return [one.version for one in self.rounds.rounds]

    def apply(self, now: float, event: Event) -> None:
        """Change the run as `event` says, when it happens and when a journal is replayed."""
        if isinstance(event, OptimizerChanged):
            self.outer = self.outer.changed(event.lr, event.momentum)
        elif isinstance(event, WorkersExpected):
            self.expected = event
        self.rounds.apply(now, event)

    def carry_out(self, event: Event, upload: Callable[[str], Path]) -> None:
        """Change the weights and their optimizer as `event` says, in the order of the events.

        Raises:
            ChunkError, OSError: an upload cannot be read, or the new weights cannot be published.
        """
        if isinstance(event, RoundClosed):
            self.weights.apply(event, upload)
        elif isinstance(event, OptimizerChanged):
            changed = self.outer.changed(event.lr, event.momentum)
            self.weights.outer.change(**changed.settings)

    def steps_for(self, worker: str, options: ServerOptions) -> int:
        """How many inner steps a worker should take between two submissions."""
        if not options.dylu:
            return self.agreed.sync_every
        base = options.dylu_base_sync_every or self.agreed.sync_every
        speeds = {name: member.steps_per_s for name, member in self.rounds.members.items()}
        return local_steps(base, speeds, worker)

    def decided(self) -> dict[str, Any]:
        """What a checkpoint of now says; steps that are decided may still have to be taken."""
        return {
            "rounds": self.rounds.state_dict(),
            "optimizer": {"lr": self.outer.lr, "momentum": self.outer.momentum},
            "expected": None if self.expected is None else event_to_json(self.expected),
        }

    def saved(self, decided: dict[str, Any]) -> dict[str, Any]:
        """All that a restart needs; `decided` is of when it was decided to save."""
        return {
            "model": self.shape.to_json(),
            "agreed": asdict(self.agreed),
            "extras": self.extras or {},
            **decided,
            **self.weights.state_dict(),
        }

    def model(self) -> dict[str, Tensor]:
        """The weights by name in the model's own dtypes, and the tensors that nobody trains."""
        dtypes = {parameter.name: parameter.torch_dtype for parameter in self.shape.parameters}
        trained = {name: row.to(dtypes[name]) for name, row in self.weights.by_name().items()}
        return {**(self.extras or {}), **trained}
