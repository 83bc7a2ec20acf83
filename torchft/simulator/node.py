"""One node's forward and backward pass: what users extend.

    class Distill(TrainNode):
        def loss(self, batch):
            return ((self.model(batch[0]) - teacher(batch[0])) ** 2).mean()

A simulation, and each real process, makes one for every node.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import SettingsError, TorchftError

__all__ = ["NodeError", "TrainNode", "finite_losses", "micro_batches", "to_device"]


class NodeError(TorchftError):
    """A node's step went wrong; the message names node and step."""


class TrainNode:
    """One node."""

    def __init__(
        self,
        model: nn.Module,
        *,
        node: int,
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.node = node
        self.device = device
        self._autocast = autocast

    def loss(self, batch: Any) -> Tensor:
        """One number to minimise. By default the model gets the batch and returns it."""
        return self.model(batch)

    def evaluate(self, batch: Any) -> Tensor:
        """The loss of a batch, checked, under autocast where that is asked for.

        Raises:
            SettingsError: it is no single number.
        """
        with self._casting():
            try:
                loss = self.loss(to_device(batch, self.device))
            except TypeError as error:
                self._check_call(error)
                raise
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = (
                f"a tensor of shape {tuple(loss.shape)} and type {loss.dtype}"
                if isinstance(loss, Tensor)
                else f"a {type(loss).__name__}"
            )
            raise SettingsError(
                f"node {self.node}'s model returned {what}: it must take the batch and return "
                "its loss, one floating-point number"
            )
        return loss

    def backward(self, batch: Any, micro_batch_size: int | None = None) -> Tensor:
        """Add to the gradients those of the mean loss over `batch`; returns that loss.

        The batch passes in pieces of `micro_batch_size`, each weighted by its share.
        """
        if micro_batch_size is None:
            loss = self._differentiable(self.evaluate(batch))
            loss.backward()
            return loss.detach()
        total: Tensor | None = None
        for piece, share in micro_batches(batch, micro_batch_size):
            loss = self._differentiable(self.evaluate(piece)) * share
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _check_call(self, error: TypeError) -> None:
        """Say it if the forward pass cannot be called with a batch alone."""
        if type(self).loss is not TrainNode.loss:
            return
        try:
            inspect.signature(self.model.forward).bind(None)
        except TypeError as wrong:
            raise SettingsError(
                f"{type(self.model).__name__}.forward must take the batch alone and return its "
                f"loss ({wrong}): write forward(self, batch), with x, y = batch in it, or give "
                "node_cls=, a TrainNode with a loss(batch) of its own"
            ) from error

    def _differentiable(self, loss: Tensor) -> Tensor:
        if not loss.requires_grad:
            raise SettingsError(
                f"the loss of node {self.node} has no gradient: it depends on no parameter that is "
                "trained, or was cut off by detach(), item() or torch.no_grad()"
            )
        return loss

    def _casting(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast)


def finite_losses(losses: Mapping[int, Tensor], step: int) -> dict[int, float]:
    """Node → its loss as a number, read from the device at once. `step` counts from 0; the message
    counts from 1, as progress, CSV files and checkpoints do.

    Raises:
        NodeError: one is not finite.
    """
    values = _numbers(list(losses.values()))
    for node, value in zip(losses, values, strict=True):
        if not math.isfinite(value):
            raise NodeError(
                f"the loss of node {node} in step {step + 1} is {value}: use a lower learning "
                "rate, clip with max_norm, or look for bad samples"
            )
    return dict(zip(losses, values, strict=True))


def _numbers(losses: list[Tensor]) -> list[float]:
    if all(loss.device.type == "cpu" for loss in losses):
        return [loss.item() for loss in losses]
    # One wait for the device instead of one for each.
    return torch.stack([loss.reshape(()).float() for loss in losses]).tolist()


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors in tuples, lists and dicts, moved."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if device.type == "cpu":
        return batch
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def micro_batches(batch: Any, size: int) -> Iterator[tuple[Any, float]]:
    """Pieces of about equal length, at most `size` samples, with their share of the batch.

    About equal, so that no lonely last sample meets a BatchNorm.
    """
    length = _samples(batch)
    count = -(-length // size)
    bounds = [-(-length * piece // count) for piece in range(count + 1)]
    for start, stop in pairwise(bounds):
        piece = _mapped(batch, lambda tensor, a=start, b=stop: tensor[a:b])
        yield piece, (stop - start) / length


def _samples(batch: Any) -> int:
    lengths = {tensor.shape[0] if tensor.dim() else None for tensor in _tensors(batch)}
    length = lengths.pop() if len(lengths) == 1 else None
    if length is None:
        raise SettingsError(
            f"a batch of type {type(batch).__name__} cannot be cut into micro-batches, since its "
            "tensors have no common first dimension: leave minibatch_size (in an Experiment, "
            "micro_batch_size) out"
        )
    return length


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for inside in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(inside)


def _mapped(batch: Any, change: Any) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_mapped(value, change) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_mapped(value, change) for value in batch)
    return batch
