"""What a run leaves: how it learned, what it sent, and the models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchft.records import StepRecord
from torchft.simulator.copies import Remake, weights_copied
from torchft.simulator.events import Event
from torchft.simulator.round_records import HealRecord, RoundRecord

__all__ = ["Result", "StepRow", "averaged_tensors", "mean_model"]


@dataclass(frozen=True)
class StepRow:
    """The losses of all nodes in one inner step."""

    step: int
    losses: dict[int, float]
    """By node, of those that trained in this step."""
    lr: float

    @property
    def loss(self) -> float:
        """The mean of the losses over the nodes."""
        return sum(self.losses.values()) / len(self.losses)


@dataclass
class Result:
    """Of one run, simulated or real."""

    num_nodes: int
    events: list[Event] = field(default_factory=list)
    history: list[StepRow] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    correlations: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[RoundRecord] = field(default_factory=list)
    heals: list[HealRecord] = field(default_factory=list)
    digests: list[tuple[int, list[str | None]]] = field(default_factory=list)
    """After each step in which a round committed, if asked for: step, and each node's digest."""
    models: list[nn.Module] = field(default_factory=list)
    """Each node's, also of those that are gone: as they left."""
    alive: list[int] = field(default_factory=list)
    """The nodes that are there at the end, or where a run broke off."""
    model: nn.Module | None = None
    """The mean of the living: see `mean_model`. None: the run broke off."""
    records: list[StepRecord] = field(default_factory=list)
    """Of real processes: what each wrote of its rounds."""
    seconds: dict[str, float] = field(default_factory=dict)
    """By name: `setup`, `train` with all that happens meanwhile, and of this the steps alone, by
    wall time (`steps`) and processor time (`steps_cpu`), earlier parts of a resumed run included.
    Of real processes: `train` from their start to their end, and `steps` is what all of them
    together spent in forward and backward passes."""
    simulated: Any = None
    """On the given network: times, and what was lost."""

    @property
    def bytes_sent(self) -> list[int]:
        """How many bytes each node has sent in rounds."""
        sent = [0] * self.num_nodes
        for record in self.rounds:
            for node, amount in record.bytes_per_node.items():
                sent[node] += amount
        return sent

    @property
    def final_loss(self) -> float:
        """The mean training loss of the last step."""
        return self.history[-1].loss


@torch.no_grad()
def mean_model(models: Sequence[nn.Module], remake: Remake | None = None) -> nn.Module:
    """A copy that holds the mean of all trained parameters and floating-point buffers.

    Other buffers (BatchNorm's count of batches) and frozen parameters are the first model's. The
    mean of equal models is that model, bit for bit. Where the first model cannot be copied,
    `remake` makes the one that takes the mean.

    Raises:
        SettingsError: the first model cannot be copied, and there is no `remake`.
    """
    mean = weights_copied(models[0], remake)
    everyones = [averaged_tensors(model) for model in models]
    for name, value in averaged_tensors(mean).items():
        wide = value.dtype if value.device.type == "mps" else torch.float64
        total = torch.zeros_like(value, dtype=wide)
        for one in everyones:
            total.add_(one[name])
        value.copy_(total.div_(len(models)))
    return mean


def averaged_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What has a mean; a tied weight once."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | {name: b for name, b in model.named_buffers() if b.is_floating_point()}
