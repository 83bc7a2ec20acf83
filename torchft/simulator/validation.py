"""The loss on samples that nobody trains on: of each node's model, and of their mean.

Looking changes nothing: each module goes back to the mode it was in, buffers keep their values
whatever a forward pass does to them, and random generators stand where they stood. All models see
the same samples and, where they draw in a forward pass, the same numbers, so losses compare.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from torchft.errors import SettingsError
from torchft.simulator.experiment import Experiment
from torchft.simulator.feed import Feed, check_factory, is_factory
from torchft.simulator.node import TrainNode
from torchft.simulator.result import mean_model
from torchft.simulator.seeds import kept_rng, seed_node, seed_of

__all__ = ["Validation", "Validator", "as_it_was"]

_VALIDATION = 1 << 35
"""In the place of a node's number, so that looking draws nothing that training draws."""


@dataclass(frozen=True)
class Validation:
    """One look."""

    local_losses: dict[int, float]
    """By node, of its own model."""
    global_loss: float
    """Of the mean of all of them."""

    @property
    def local_loss(self) -> float:
        """The mean of the nodes' own."""
        return sum(self.local_losses.values()) / len(self.local_losses)


class Validator:
    """`size` samples of the experiment's validation data, the same at every look.

    Raises:
        SettingsError: there is no sample, or the data cannot be indexed.
    """

    def __init__(self, experiment: Experiment, size: int) -> None:
        self._seed, self._device = experiment.seed, experiment.torch_device
        with kept_rng(self._device):
            self._batches = list(_batches(experiment, size))

    def __call__(self, nodes: Sequence[TrainNode]) -> Validation:
        """Of these nodes and their mean."""
        local = {node.node: self.loss(node) for node in nodes}
        together = copy.copy(nodes[0])
        together.model = mean_model([node.model for node in nodes])
        return Validation(local, self.loss(together))

    def loss(self, node: TrainNode) -> float:
        """The mean over all samples, of one model."""
        total, samples = 0.0, 0
        with torch.no_grad(), kept_rng(self._device), as_it_was(node.model):
            seed_node(self._seed, _VALIDATION, 0, self._device)
            for batch, size in self._batches:
                total += float(node.evaluate(batch)) * size
                samples += size
        return total / samples


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's own mode, and every buffer's values."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer, value in buffers:
            buffer.copy_(value)
            setattr(module, name, buffer)


def _batches(experiment: Experiment, size: int) -> Iterator[tuple[Any, int]]:
    """Batches of a fixed random choice, the last one smaller; and how many samples each has."""
    data = experiment.val_dataset
    if is_factory(data):
        check_factory(data)
        data = data(0, experiment.num_nodes, False)
    length = _length(data)
    choice = torch.Generator().manual_seed(seed_of(experiment.seed, _VALIDATION, 1))
    at = torch.randperm(length, generator=choice)[:size]
    collate = (experiment.dataloader_kwargs or {}).get("collate_fn")
    options = {"collate_fn": collate} if collate else None
    for part in at.split(min(experiment.batch_size, len(at))):
        some = Subset(data, part.tolist())
        feed = Feed(
            some, num_nodes=1, batch_size=len(part), shuffle=False, dataloader_kwargs=options
        )
        yield feed.batch(0, 0), len(part)


def _length(data: Any) -> int:
    try:
        return Feed(data, num_nodes=1, batch_size=1, shuffle=False).batches_per_epoch
    except SettingsError as error:
        raise SettingsError(f"val_dataset: {error}") from error
