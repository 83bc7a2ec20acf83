"""One node's forward and backward pass: what users extend.

    class Distill(TrainNode):
        def loss(self, batch):
            return ((self.model(batch[0]) - teacher(batch[0])) ** 2).mean()

A simulation, and each real process, makes one for every node.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchft.errors import SettingsError, TorchftError

__all__ = [
    "NodeError",
    "TrainNode",
    "finite_losses",
    "loss_in",
    "micro_batches",
    "noted",
    "to_device",
]


class NodeError(TorchftError):
    """A node's step went wrong; the message names node and step."""


class TrainNode:
    """One simulated node: its model, its optimizer and its loss."""

    batch_size: int | None = None
    """Samples of a batch, where that is known."""

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
        """One number to minimise, or an output with a field `loss`. By default the model gets the
        batch and returns it; a dict whose keys are arguments of its forward, by keyword."""
        return self.model(**batch) if self._goes_by_keyword(batch) else self.model(batch)

    def evaluate(self, batch: Any) -> Tensor:
        """The loss of a batch, checked, under autocast where that is asked for.

        Raises:
            SettingsError: it is no single number.
        """
        with self._casting():
            try:
                loss = loss_in(self.loss(to_device(batch, self.device)))
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
                "its loss, one floating-point number, or an output with a field loss (models of "
                "transformers have it if the batch has labels)"
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
        for piece, share in micro_batches(batch, micro_batch_size, self.batch_size):
            loss = self._differentiable(self.evaluate(piece)) * share
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _goes_by_keyword(self, batch: Any) -> bool:
        """A dict of several arguments, as transformers' models take them.

        Raises:
            SettingsError: some of its keys are no arguments.
        """
        if not isinstance(batch, Mapping):
            return False
        keys = tuple(batch)
        known = self.__dict__.setdefault("_by_keyword", {})
        if keys not in known:
            known[keys] = _fits_by_keyword(self.model, keys)
        return bool(known[keys])

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


@contextmanager
def noted(where: str) -> Iterator[None]:
    """An error from inside has a note below its message, which says where it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"({where})")
        raise


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


def loss_in(output: Any) -> Any:
    """The loss of an output object or a dict, anything else as it is."""
    if isinstance(output, Tensor):
        return output
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return found if isinstance(found, Tensor) else output


def _fits_by_keyword(model: nn.Module, keys: Sequence[Any]) -> bool:
    model = getattr(model, "_orig_mod", model)  # what torch.compile has wrapped
    try:
        taken = inspect.signature(model.forward).parameters
    except ValueError:
        return False  # written in C: it has no signature to look at
    named = {n for n, p in taken.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    unknown = [key for key in keys if key not in named]
    if len(named) < 2 or len(keys) - len(unknown) < min(2, len(keys)):
        return False  # the dict itself is the argument
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise SettingsError(
            f"the batch has {', '.join(map(repr, unknown))}, which {type(model).__name__}.forward "
            f"does not take (it takes {', '.join(sorted(named))}): leave it out of the data set, "
            "or give node_cls=, a TrainNode with a loss(batch) of its own"
        )
    return True


def micro_batches(
    batch: Any, size: int, batch_size: int | None = None
) -> Iterator[tuple[Any, float]]:
    """Pieces of about equal length, at most `size` samples, with their share of the batch.

    Cut are tensors and arrays along their first dimension, and what has an entry for each sample
    beside them, such as a list of texts. About equal, so that no lonely last sample meets a
    BatchNorm. A list of `batch_size` entries is one of samples.

    Raises:
        SettingsError: the batch has no common first dimension.
    """
    length = _samples(batch, batch_size)
    count = -(-length // size)
    bounds = [-(-length * piece // count) for piece in range(count + 1)]
    for start, stop in pairwise(bounds):
        yield _cut(batch, length, slice(start, stop)), (stop - start) / length


def _samples(batch: Any, batch_size: int | None) -> int:
    if type(batch) is list and len(batch) == batch_size and _lengths(batch) != {batch_size}:
        return batch_size
    lengths = _lengths(batch)
    length = lengths.pop() if len(lengths) == 1 else None
    if length is None:
        raise SettingsError(
            f"a batch of type {type(batch).__name__} cannot be cut into micro-batches, since its "
            "tensors have no common first dimension: leave minibatch_size (in an Experiment, "
            "micro_batch_size) out"
        )
    return length


def _lengths(batch: Any) -> set[int | None]:
    return {tensor.shape[0] if tensor.ndim else None for tensor in _tensors(batch)}


def _tensors(batch: Any) -> Iterator[Tensor | np.ndarray]:
    if isinstance(batch, Tensor | np.ndarray):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for inside in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(inside)


def _cut(batch: Any, length: int, piece: slice) -> Any:
    """`piece` of the `length` samples. What has no entry for each sample stays as it is."""
    if isinstance(batch, Tensor | np.ndarray):
        return batch[piece] if batch.shape[0] == length else batch
    if isinstance(batch, list | tuple) and len(batch) == length and _lengths(batch) != {length}:
        return batch[piece]  # texts, or tensors of samples
    return _inside(batch, lambda value: _cut(value, length, piece))


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    return _inside(batch, lambda value: _mapped(value, change))


def _inside(batch: Any, change: Callable[[Any], Any]) -> Any:
    """The same dict, list or tuple of what `change` makes of each entry; others as they are."""
    if isinstance(batch, Mapping):
        return {key: change(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(change, batch))
    return batch
