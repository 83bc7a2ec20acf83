"""`Local` over the modules of one process: weights and gradients are copied in and out of them."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from torchft.arguments import check_choice
from torchft.errors import SettingsError
from torchft.sharded import is_sharded, local_part
from torchft.step_hooks import state_of
from torchft.strategies.buffers import buffers_of
from torchft.strategies.checks import check_values
from torchft.strategies.fragments import PATTERNS, SEQUENTIAL, cut
from torchft.strategies.local import Fragment, Layout
from torchft.strategies.parts.deltas import delta_into
from torchft.strategies.parts.scratch import Scratch

__all__ = ["InnerOptimizer", "ModelLocal", "like_parameter"]


class InnerOptimizer(Protocol):
    """A torch optimizer, or what else takes the inner step."""

    def step(self) -> object:
        """Take one step of the inner optimizer."""
        ...


class ModelLocal:
    """`Local` for the modules of one process: one row, copied in and out of their parameters.

    Several modules are the fragments, as they were given; a single one can be cut. A parameter that
    several modules share belongs to the first of them.

    Raises:
        SettingsError: nothing to train, or a parameter that cannot be averaged.
    """

    rows = 1
    written = (0,)
    samples: Sequence[int] | None = None
    own_data = False

    def __init__(
        self, modules: Sequence[nn.Module], optimizer: InnerOptimizer | None = None
    ) -> None:
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self._optimizer = optimizer
        self._roots = list(modules)
        self._scratch = Scratch()
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._modules: list[Fragment] = []
        for index, module in enumerate(modules):
            self._add(index, module)
        if not self.parameters:
            raise SettingsError("the model has no parameter that requires a gradient")
        self.whole = Fragment(0, tuple(range(len(self.parameters))))

    def _add(self, index: int, module: nn.Module) -> None:
        first, seen = len(self.parameters), {id(p) for p in self.parameters}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            if parameter.is_meta or isinstance(parameter, UninitializedParameter):
                raise SettingsError(
                    f"parameter {name} has no values yet: move the model off the meta device, with "
                    "model.to_empty(device=…) and initialised weights, or run its lazy modules once"
                )
            if not parameter.is_floating_point():
                raise SettingsError(f"parameter {name} is {parameter.dtype}: it cannot be averaged")
            self.names.append(name)
            self.parameters.append(parameter)
        self._modules.append(Fragment(index, tuple(range(first, len(self.parameters)))))

    def split(self, parts: int, pattern: str = SEQUENTIAL) -> list[Fragment]:
        """The modules as they were given, or one module cut in that pattern.

        Raises:
            SettingsError: several modules are asked for another number of fragments or another
                pattern, or one of them has no parameter of its own.
        """
        check_choice("pattern", pattern, PATTERNS)
        if len(self._modules) == 1:
            # Of a sharded parameter the whole counts, so that all ranks cut alike.
            nbytes = [p.numel() * p.element_size() for p in self.parameters]
            return cut(self.names, nbytes, parts, pattern)
        if parts != len(self._modules) or pattern != SEQUENTIAL:
            raise SettingsError(
                f"{len(self._modules)} modules are that many fragments, and cannot be {parts} in a "
                f"{pattern} pattern: give one module to have it cut"
            )
        for fragment in self._modules:
            if not fragment.parameters:
                raise SettingsError(
                    f"fragment {fragment.index} has no parameter of its own to train"
                )
        return self._modules

    def layout(self, fragment: Fragment) -> Layout:
        """Where the parameters of `fragment` lie in its flat tensors."""
        layout = self._layouts.get(fragment.parameters)
        if layout is None:
            layout = Layout(self.of(fragment))
            self._layouts[fragment.parameters] = layout
        return layout

    def of(self, fragment: Fragment) -> list[nn.Parameter]:
        """The parameters that belong to `fragment`, in order."""
        return [self.parameters[position] for position in fragment.parameters]

    def names_of(self, fragment: Fragment) -> list[str]:
        """The names of the parameters that belong to `fragment`."""
        return [self.names[position] for position in fragment.parameters]

    def views(self, fragment: Fragment, flats: Sequence[Tensor]) -> list[Tensor]:
        """One view `[rows, *shape]` per parameter in `flats`."""
        return self.layout(fragment).row_views(flats)

    def named_views(self, fragment: Fragment, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameter name → its view in `flats`."""
        views = self.layout(fragment).views(flats)
        return dict(zip(self.names_of(fragment), views, strict=True))

    @torch.no_grad()
    def weights(self, fragment: Fragment) -> list[Tensor]:
        """A copy of the parameters of a fragment, each `[1, …]`."""
        out = self._take(fragment)
        self.read_weights(fragment, out)
        return out

    @torch.no_grad()
    def read_weights(self, fragment: Fragment, out: Sequence[Tensor]) -> None:
        """Copy the parameters into `out`, on whichever device it lies."""
        for view, parameter in zip(self._views(fragment, out), self.of(fragment), strict=True):
            view.copy_(local_part(parameter))

    @torch.no_grad()
    def delta(self, fragment: Fragment, base: Sequence[Tensor]) -> list[Tensor]:
        """`base - weights`, in one pass where both lie on one device and have one dtype."""
        out = self._take(fragment, [b.dtype for b in base])
        views = self._views(fragment, out)
        if [b.device for b in base] == [o.device for o in out]:
            minuends = self._views(fragment, base)
        else:
            for flat, source in zip(out, base, strict=True):
                flat.copy_(source, non_blocking=True)
            minuends = views
        for view, minuend, parameter in zip(views, minuends, self.of(fragment), strict=True):
            delta_into(view, minuend, local_part(parameter))
        return out

    @torch.no_grad()
    def set_weights(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Copy into the parameters, from whichever device."""
        check_values("set_weights", self.layout(fragment).sizes, values)
        for view, parameter in zip(self._views(fragment, values), self.of(fragment), strict=True):
            local_part(parameter).copy_(view, non_blocking=True)

    @torch.no_grad()
    def select(self, fragment: Fragment, positions: Sequence[Tensor]) -> list[Tensor]:
        """A copy of the selected elements of the parameters."""
        whole = self.weights(fragment)
        some = [flat[:, at] for flat, at in zip(whole, positions, strict=True)]
        self.release(whole, reusable=True)
        return some

    @torch.no_grad()
    def put(
        self, fragment: Fragment, positions: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Write some elements of the parameters."""
        check_values("put", [at.numel() for at in positions], values)
        whole = self.weights(fragment)
        for flat, at, value in zip(whole, positions, values, strict=True):
            flat[:, at] = value
        self.set_weights(fragment, whole)
        self.release(whole, reusable=True)

    @torch.no_grad()
    def grads(self, fragment: Fragment) -> list[Tensor]:
        """A copy of the gradients of a fragment, each `[1, …]`."""
        out = self._take(fragment)
        for view, parameter in zip(self._views(fragment, out), self.of(fragment), strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                # As where gradients are added to zeros: no zero is negative.
                torch.add(local_part(parameter.grad).to_dense(), 0.0, out=view)
        return out

    @torch.no_grad()
    def set_grads(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Copy into the gradients, making those that are missing."""
        check_values("set_grads", self.layout(fragment).sizes, values)
        for view, parameter in zip(self._views(fragment, values), self.of(fragment), strict=True):
            if parameter.grad is None or parameter.grad.layout is not torch.strided:
                parameter.grad = like_parameter(view.clone(), parameter)
            else:
                local_part(parameter.grad).copy_(view)

    def zero_grads(self) -> None:
        """No gradient is left from before."""
        for parameter in self.parameters:
            parameter.grad = None

    def buffers(self) -> list[dict[str, Tensor]]:
        """Those of the modules, as one row."""
        return [buffers_of(self._roots)]

    def inner_step(self) -> None:
        """Step the optimizer. A parameter that nobody used has a zero gradient.

        Raises:
            SettingsError: no optimizer was given.
        """
        if self._optimizer is None:
            raise SettingsError("ModelLocal needs an optimizer to take an inner step")
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()

    def inner_states(self, fragment: Fragment) -> dict[tuple[int, int], MutableMapping[str, Any]]:
        """The optimizer's state of each parameter of `fragment`.

        Raises:
            SettingsError: no torch optimizer was given.
        """
        state = state_of(self._optimizer)
        if state is None:
            raise SettingsError("inner_state='restored' needs the inner optimizer's state")
        return {(0, at): state[self.parameters[at]] for at in fragment.parameters}

    def release(self, tensors: Sequence[Tensor], *, reusable: bool) -> None:
        """Keep the scratch for the next round, or let it go."""
        self._scratch.release(tensors, reusable=reusable)

    def _take(
        self, fragment: Fragment, dtypes: Sequence[torch.dtype] | None = None
    ) -> list[Tensor]:
        """`dtypes` None: the parameters' own."""
        layout = self.layout(fragment)
        wanted = [own for own, _ in layout.kinds] if dtypes is None else dtypes
        kinds = zip(layout.sizes, wanted, layout.kinds, strict=True)
        return [self._scratch.take(size, dtype, device) for size, dtype, (_, device) in kinds]

    def _views(self, fragment: Fragment, flats: Sequence[Tensor]) -> list[Tensor]:
        return self.layout(fragment).views(flats)


def like_parameter(values: Tensor, parameter: nn.Parameter) -> Tensor:
    """`values`, the local part, as the kind of tensor that the gradient of `parameter` must be."""
    if not is_sharded(parameter):
        return values
    sharded: Any = parameter
    return type(sharded).from_local(
        values,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )
