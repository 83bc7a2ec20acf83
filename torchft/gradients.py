"""What the wrappers that average gradients have in common.

A step begins with a forward pass at the latest, so that a new group heals before it computes
anything. What is trained is looked at when a step begins, and followed; groups compare it before
they average. Before the vote, what was not averaged yet is: gradients of a backward pass without
synchronisation, and nothing but zeros of a group that skipped its batch.
"""

from __future__ import annotations

import inspect
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import Work
from torch.utils.hooks import RemovableHandle

from torchft.backward import BackwardPass
from torchft.errors import StepError
from torchft.manager.average import Name
from torchft.manager.fingerprint import Description
from torchft.quantization import Codec, codec_for
from torchft.quantization.proof import prove
from torchft.sharded import local_part
from torchft.trained import Named, TrainedParameters, describe_values, refuse_sparse, sparse_error
from torchft.untraced import untraced

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["GradientAverager"]


class GradientAverager(ABC):
    """Averages the gradients of `module`'s trained parameters, whichever these are.

    Attributes:
        trained: the parameters whose gradients are averaged.
        codec: what they are encoded with.
        backward: the backward pass that runs, or ran last.
        has_local: some gradient holds what was not averaged yet.
        has_averaged: some gradient was averaged in this step.
    """

    def __init__(
        self,
        kind: str,
        manager: Manager,
        module: nn.Module,
        should_quantize: bool | str | Codec,
        ignored: Iterable[str] = (),
    ) -> None:
        self.kind = kind
        self.trained = TrainedParameters(module, frozenset(ignored))
        refuse_sparse(module)
        self.codec = self._choose(should_quantize)
        if self.codec is not None:
            manager.fingerprint.describe_setting("codec", self.codec.name)
        itself = weakref.WeakMethod(self._backward_ends)
        self.backward = BackwardPass(lambda: _call(itself), last=self.trained.sharded)
        self.has_local = self.has_averaged = False
        self.sent = 0
        self.description: Description = {}
        self.module, self.manager = module, manager
        self._takes_name = "name" in inspect.signature(manager.allreduce).parameters
        """False for a script's own all-reduce that has the signature of PyTorch's torchft."""
        manager.starting_state.add(self)
        self._hooks: list[RemovableHandle] = []
        self._arrived: list[int] = []
        """Identities of the parameters whose gradients came in this backward pass."""

    # ------------------------------------------------------------------ when a step begins, ends

    def before_step(self) -> Description:
        """As `StepListener`: follow what has changed about the trained parameters."""
        self.has_local = self.has_averaged = False
        self.sent = 0
        change = self.trained.look()
        if change is None:
            return {}
        refuse_sparse(self.module)
        self._prove(self.codec)
        self.follow()
        return describe_values(change.created)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the module has this parameter; see `StepListener`."""
        return self.trained.holds(parameter)

    def averaged(self) -> list[Named]:
        """The parameters that are equal in all groups; see `StepListener`."""
        return self.trained.averaged()

    def equal_state(self) -> dict[str, Any]:
        """What is compared with groups that start at the same step: the parameters. Each group may
        have buffers of its own."""
        return dict(self.averaged())

    def before_vote(self, *, idle: bool) -> None:
        """As `StepListener`: see that every gradient was averaged that the optimizer may apply."""
        name = self.trained.unseen()
        if name is not None:
            self.manager.report_error(
                StepError(
                    f"{name} began to be trained in the middle of the step, which is therefore "
                    "discarded: unfreeze or add parameters between step and zero_grad"
                )
            )
            return
        if idle or self.has_local:
            self.average_all()
            self.has_local, self.has_averaged = False, True
        if self.has_averaged:
            self._drop_frozen()

    @untraced
    def before_forward(self) -> None:
        """The model is about to compute something: begin a step, if it may be trained on."""
        if torch.is_grad_enabled() and self.module.training:
            self.manager.steps.begin_early()

    def reduce(self, tensor: Tensor, name: Name) -> Work:
        """Begin the average of `tensor`, which errors call by `name`."""
        self.sent += 1
        options: dict[str, Any] = {"name": name} if self._takes_name else {}
        if self.codec is not None:
            options["should_quantize"] = self.codec
        return self.manager.allreduce(tensor, **options)

    @abstractmethod
    def average_all(self) -> None:
        """Average all gradients as they are; a missing one is zero."""

    @abstractmethod
    def backward_ends(self, arrived: set[int]) -> None:
        """The outermost backward pass ends, in which these parameters, by identity, got a
        gradient."""

    def gradient_arrives(self, parameter: Tensor) -> None:
        """A gradient was accumulated, in a backward pass that goes on."""
        self.has_local = True
        self._arrived.append(id(parameter))

    def follow(self) -> None:
        """The trained parameters are others now."""
        self.unhook()
        itself = weakref.WeakMethod(self._accumulated)
        for name, parameter in self.trained.named:
            hook = _accumulated_hook(itself, name)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def leave_with(self, wrapper: nn.Module) -> None:
        """Unhook when nobody holds `wrapper` any more."""
        weakref.finalize(wrapper, self.unhook).atexit = False

    def unhook(self) -> None:
        """No longer be told of gradients."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ------------------------------------------------------------------ in a backward pass

    @untraced
    def _accumulated(self, name: str, parameter: Tensor) -> None:
        self.backward.enter()
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            error = sparse_error(name)
            self.manager.report_error(error)
            raise error
        self.gradient_arrives(parameter)

    @untraced
    def _backward_ends(self) -> None:
        arrived, self._arrived = set(self._arrived), []
        self.backward_ends(arrived)

    def _choose(self, should_quantize: bool | str | Codec) -> Codec | None:
        if not self.trained.named:
            return None
        codec = codec_for(should_quantize, self.trained.named[0][1].device)
        self._prove(codec)
        return codec

    def _prove(self, codec: Codec | None) -> None:
        if codec is not None:
            for dtype, device in {(p.dtype, p.device) for _, p in self.trained.named}:
                prove(codec, dtype, device)

    def _drop_frozen(self) -> None:
        """Whoever froze a parameter in this step does not apply what it was averaged to: zeros,
        unless another group trained it."""
        for name, parameter in self.trained.named:
            if not parameter.requires_grad and parameter.grad is not None:
                if local_part(parameter.grad).count_nonzero():
                    self.manager.report_error(
                        StepError(f"{name} is frozen here, and another group trains it")
                    )
                parameter.grad = None


def _call(method: weakref.WeakMethod[Any]) -> None:
    """What is called once nobody holds its owner does nothing."""
    if (bound := method()) is not None:
        bound()


def _accumulated_hook(method: weakref.WeakMethod[Any], name: str) -> Callable[[Tensor], None]:
    # The parameter holds the hook: an averager that it held would outlive its wrapper.
    def accumulated(parameter: Tensor) -> None:
        if (bound := method()) is not None:
            bound(name, parameter)

    return accumulated
