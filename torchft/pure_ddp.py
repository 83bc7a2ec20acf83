"""Gradients averaged parameter by parameter, when a backward pass ends."""

# No postponed annotations in this file: torch reads those of hooks.

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchft.gradients import GradientAverager
from torchft.quantization import Codec
from torchft.sharded import gradient_part
from torchft.uncopied import Uncopied

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["PureDistributedDataParallel"]


class PureDistributedDataParallel(Uncopied, nn.Module):
    """Averages each parameter's gradient when a backward pass ends; one all-reduce per parameter.

    A parameter that got no gradient here sends zeros, since another group may have used it. Weights
    that several calls of backward accumulate into are averaged each time: the sum of averages is
    the average of sums. `should_quantize` and what is followed between steps are as in
    `DistributedDataParallel`.

    Raises:
        SettingsError: a module whose gradients are sparse; no such codec, or one that cannot hold a
            parameter's dtype.
    """

    copy_instead = "copy its .module, and wrap the copy if it is to be trained"

    def __init__(
        self,
        manager: "Manager",
        module: nn.Module,
        *,
        should_quantize: bool | str | Codec = False,
    ) -> None:
        super().__init__()
        self._serve(_EachParameter(type(self).__name__, manager, module, should_quantize))

    def _serve(self, averager: GradientAverager) -> None:
        self.module, self._averager = averager.module, averager
        averager.follow()
        averager.manager.listeners.add(averager)
        averager.leave_with(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass of the wrapped module."""
        self._averager.before_forward()
        output = self.module(*args, **kwargs)
        self._averager.backward.expect(output)
        return output

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state dict of the wrapped module, without a prefix."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict into the wrapped module."""
        return self.module.load_state_dict(*args, **kwargs)


class _EachParameter(GradientAverager):
    def follow(self) -> None:
        """As `GradientAverager`, and describe the parameters to the other groups."""
        super().follow()
        self.description = {"parameters": self.trained.description()}

    def backward_ends(self, arrived: set[int]) -> None:
        """Average all parameters at once, where a gradient has arrived."""
        if arrived:
            self.average_all()

    @torch.no_grad()
    def average_all(self) -> None:
        """As `GradientAverager`, in the order of the parameters, which all groups share."""
        self.has_local, self.has_averaged = False, True
        works = []
        for name, parameter in self.trained.named:
            works.append(self.reduce(gradient_part(parameter), name))
        for work in works:
            work.wait()
