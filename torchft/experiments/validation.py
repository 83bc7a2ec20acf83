"""The loss on samples that nobody trains on: of each node's model, and of their mean.

Looking changes nothing: each module goes back to the mode it was in, buffers keep their values
whatever a forward pass does to them, and random generators stand where they stood. All models see
the same samples and, where they draw in a forward pass, the same numbers, so losses compare.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from torchft.errors import SettingsError
from torchft.seeds import seed64
from torchft.simulator.experiment import Experiment
from torchft.simulator.feed import Feed, check_factory, is_factory
from torchft.simulator.frozen import own_frozen
from torchft.simulator.node import NodeError, TrainNode, noted
from torchft.simulator.result import mean_model
from torchft.simulator.seeds import kept_rng, seed_node

__all__ = ["Validation", "Validator", "as_it_was"]

_VALIDATION = 1 << 35
"""In the place of a node's number, so that looking draws nothing that training draws."""

_Batch = tuple[Any, int]
"""With the number of its samples."""


@dataclass(frozen=True)
class Validation:
    """The losses of one validation, at one step."""

    local_losses: dict[int, float]
    """By node, of its own model, on its own held-out data where a factory gives each its own."""
    global_loss: float
    """Of the mean of all of them, on the held-out data of all nodes."""

    @property
    def local_loss(self) -> float:
        """The mean of the nodes' own."""
        return sum(self.local_losses.values()) / len(self.local_losses)


class Validator:
    """`size` samples of the experiment's validation data, the same at every look. A factory is
    asked for each node's own, and the mean model is looked at on the samples of all nodes.

    Raises:
        SettingsError: there is no sample, or the data cannot be indexed.
    """

    def __init__(self, experiment: Experiment, size: int) -> None:
        self._seed, self._device = experiment.seed, experiment.torch_device
        self._remake = experiment.remake_model
        self._batches: list[list[_Batch]] = []
        """Of each different data set."""
        self._of_node: dict[int, int] = {}
        """Which of them is a node's own; where it has none, the only one is."""
        with kept_rng(self._device):
            known: list[Any] = []
            for node, data in _held_out(experiment):
                at = next((at for at, one in enumerate(known) if one is data), len(known))
                if at == len(known):
                    known.append(data)
                    self._batches.append(list(_batches(experiment, data, size, node)))
                if node is not None:
                    self._of_node[node] = at

    def __call__(self, nodes: Sequence[TrainNode]) -> Validation:
        """Of these nodes and their mean."""
        local = {node.node: self.local_loss(node) for node in nodes}
        return Validation(local, self.loss(self.mean_of(nodes)))

    def local_loss(self, node: TrainNode) -> float:
        """The mean over this node's own samples, of its model."""
        return self._loss(node, [self._of_node.get(node.node, 0)])

    def mean_of(self, nodes: Sequence[TrainNode]) -> TrainNode:
        """A node like the first one, with the mean of all their models."""
        together = copy.copy(nodes[0])
        together.model = mean_model([node.model for node in nodes], self._remake)
        return together

    def loss(self, node: TrainNode) -> float:
        """The mean over all samples of all nodes, of one model."""
        return self._loss(node, range(len(self._batches)))

    def _loss(self, node: TrainNode, data: Iterable[int]) -> float:
        total, samples = 0.0, 0
        with torch.no_grad(), kept_rng(self._device), as_it_was(node.model):
            seed_node(self._seed, _VALIDATION, 0, self._device)
            for batch, size in (one for at in data for one in self._batches[at]):
                with noted(f"node {node.node}, held-out data"):
                    total += float(node.evaluate(batch)) * size
                samples += size
        return total / samples


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module's own mode, and the values of every buffer
    and of frozen parameters, which a forward pass may update in either mode."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    frozen = [(p, p.detach().clone()) for p in own_frozen(model)]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for p, value in frozen:
            p.data.copy_(value)
        for module, name, buffer, value in buffers:
            buffer.copy_(value)
            setattr(module, name, buffer)


def _held_out(experiment: Experiment) -> Iterator[tuple[int | None, Any]]:
    """Each node's held-out data, as the factory gives them; or those of all, and None."""
    data, nodes = experiment.val_dataset, experiment.num_nodes
    if not is_factory(data):
        yield None, data
        return
    check_factory(data)
    for node in range(nodes):
        with noted(f"the validation data set's factory, asked for rank {node}"):
            made = data(node, nodes, False)
        yield node, made


def _batches(experiment: Experiment, data: Any, size: int, node: int | None) -> Iterator[_Batch]:
    """Batches of a fixed random choice, the last one smaller; and how many samples each has.
    `node` is whose data it is, if that is one's own."""
    length = _length(data, node)
    choice = torch.Generator().manual_seed(seed64(experiment.seed, _VALIDATION, 1))
    at = torch.randperm(length, generator=choice, device="cpu")[:size]
    collate = (experiment.dataloader_kwargs or {}).get("collate_fn")
    options = {"collate_fn": collate} if collate else None
    for part in at.split(min(experiment.batch_size, len(at))):
        some = Subset(data, part.tolist())
        feed = Feed(
            some, num_nodes=1, batch_size=len(part), shuffle=False, dataloader_kwargs=options
        )
        try:
            batch = feed.batch(0, 0)
        except NodeError as error:
            raise SettingsError(f"val_dataset{_whose(node)}: {error.__cause__!r}") from error
        yield batch, len(part)


def _length(data: Any, node: int | None) -> int:
    try:
        return Feed(data, num_nodes=1, batch_size=1, shuffle=False).batches_per_epoch
    except SettingsError as error:
        raise SettingsError(f"val_dataset{_whose(node)}: {error}") from error


def _whose(node: int | None) -> str:
    return "" if node is None else f" of node {node}"
