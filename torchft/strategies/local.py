"""What a strategy sees of training at home: weights and gradients as a few flat tensors.

A fragment is a run of parameters. Its weights, and likewise its gradients, are seen as one flat
tensor `[rows, elements]` per dtype and device, most often a single one. `rows` is the number of
nodes that live here: 1 in a process of its own, N in the simulator.

    model parameters   a [3, 4]   b [4]   c [2, 2] bfloat16
    weights(whole)     [ [1, 16] float32: a then b,   [1, 4] bfloat16: c ]

Decided once, alike in every runtime: frozen parameters are not part of any fragment, a tied weight
is one slot, a missing gradient is zero, buffers stay local.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchft.errors import SettingsError
from torchft.strategies.parts.scratch import Scratch

__all__ = ["Fragment", "Layout", "Local", "ModelLocal", "local_part"]


@dataclass(frozen=True)
class Fragment:
    """A run of parameters that is synchronised at one time."""

    index: int
    parameters: range
    """Positions in the order of the model's parameters."""


class Local(Protocol):
    """The weights and gradients of the nodes that live in this process.

    What `weights`, `delta` and `grads` return belongs to the caller until it is released: a real
    process copies, the simulator may show its own storage, and then nobody writes in it.
    """

    @property
    def rows(self) -> int:
        """Nodes in this process."""
        ...

    @property
    def whole(self) -> Fragment:
        """All parameters."""
        ...

    def split(self, parts: int) -> Sequence[Fragment]:
        """`parts` fragments that cover all parameters.

        Raises:
            SettingsError: there are fewer parameters than that.
        """
        ...

    def weights(self, fragment: Fragment) -> list[Tensor]:
        """The parameters."""
        ...

    def delta(self, fragment: Fragment, base: Sequence[Tensor]) -> list[Tensor]:
        """`base - weights`; `base` is `[1, n]` and may lie on another device."""
        ...

    def set_weights(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Write the parameters from `[1 or rows, n]`."""
        ...

    def grads(self, fragment: Fragment) -> list[Tensor]:
        """The gradients, zero where there is none."""
        ...

    def set_grads(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Write the gradients from `[1 or rows, n]`."""
        ...

    def named_views(self, fragment: Fragment, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameter name → its view in `flats`, `[1, n]`."""
        ...

    def inner_step(self) -> None:
        """The step of the inner optimizer, on all rows."""
        ...

    def release(self, tensors: Sequence[Tensor], *, reusable: bool) -> None:
        """The caller is done with what it got. Not `reusable`: something may still write there."""
        ...


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor (DTensor) that lies here, others as they are; shares storage."""
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


@dataclass(frozen=True)
class _Slot:
    """Where one parameter lies."""

    flat: int
    start: int
    stop: int
    shape: torch.Size


class Layout:
    """Where each parameter of a fragment lies in the fragment's flat tensors."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.kinds: list[tuple[torch.dtype, torch.device]] = []
        self.sizes: list[int] = []
        self._slots: list[_Slot] = []
        for tensor in map(local_part, parameters):
            kind = (tensor.dtype, tensor.device)
            if kind not in self.kinds:
                self.kinds.append(kind)
                self.sizes.append(0)
            flat = self.kinds.index(kind)
            start = self.sizes[flat]
            self.sizes[flat] = start + tensor.numel()
            self._slots.append(_Slot(flat, start, self.sizes[flat], tensor.shape))

    def views(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """One view per parameter, in its shape, in the flat tensors `[1, n]`."""
        return [flats[s.flat][0, s.start : s.stop].view(s.shape) for s in self._slots]


class ModelLocal:
    """`Local` for the modules of one process: one row, copied in and out of their parameters.

    Each module is one fragment when `split` asks for as many; a single module can be split further,
    at parameter boundaries. A parameter that several modules share belongs to the first of them.

    Raises:
        SettingsError: nothing to train, or a parameter that cannot be averaged.
    """

    rows = 1

    def __init__(
        self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self._optimizer = optimizer
        self._scratch = Scratch()
        self._layouts: dict[range, Layout] = {}
        self._modules: list[Fragment] = []
        for index, module in enumerate(modules):
            self._add(index, module)
        if not self.parameters:
            raise SettingsError("the model has no parameter that requires a gradient")
        self.whole = Fragment(0, range(len(self.parameters)))

    def _add(self, index: int, module: nn.Module) -> None:
        first, seen = len(self.parameters), {id(p) for p in self.parameters}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            if not parameter.is_floating_point():
                raise SettingsError(f"parameter {name} is {parameter.dtype}: it cannot be averaged")
            self.names.append(name)
            self.parameters.append(parameter)
        self._modules.append(Fragment(index, range(first, len(self.parameters))))

    def split(self, parts: int) -> list[Fragment]:
        """The modules as they were given, or one module in runs of about equal size."""
        if parts == len(self._modules):
            for fragment in self._modules:
                if not fragment.parameters:
                    raise SettingsError(
                        f"fragment {fragment.index} has no parameter of its own to train"
                    )
            return self._modules
        if len(self._modules) > 1:
            raise SettingsError(f"{len(self._modules)} modules cannot be {parts} fragments")
        return even_runs([local_part(p).numel() for p in self.parameters], parts)

    def layout(self, fragment: Fragment) -> Layout:
        """Where the parameters of `fragment` lie in its flat tensors."""
        layout = self._layouts.get(fragment.parameters)
        if layout is None:
            layout = Layout(self.of(fragment))
            self._layouts[fragment.parameters] = layout
        return layout

    def of(self, fragment: Fragment) -> list[nn.Parameter]:
        """The parameters of `fragment`."""
        run = fragment.parameters
        return self.parameters[run.start : run.stop]

    def named_views(self, fragment: Fragment, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameter name → its view in `flats`."""
        run = fragment.parameters
        names = self.names[run.start : run.stop]
        return dict(zip(names, self.layout(fragment).views(flats), strict=True))

    @torch.no_grad()
    def weights(self, fragment: Fragment) -> list[Tensor]:
        """A copy of the parameters."""
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
        """`base - weights`, in one pass where both lie on one device."""
        out = self._take(fragment)
        views = self._views(fragment, out)
        if [b.device for b in base] == [o.device for o in out]:
            minuends = self._views(fragment, base)
        else:
            for flat, source in zip(out, base, strict=True):
                flat.copy_(source, non_blocking=True)
            minuends = views
        for view, minuend, parameter in zip(views, minuends, self.of(fragment), strict=True):
            torch.sub(minuend, local_part(parameter), out=view)
        return out

    @torch.no_grad()
    def set_weights(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Copy into the parameters, from whichever device."""
        for view, parameter in zip(self._views(fragment, values), self.of(fragment), strict=True):
            local_part(parameter).copy_(view, non_blocking=True)

    @torch.no_grad()
    def grads(self, fragment: Fragment) -> list[Tensor]:
        """A copy of the gradients."""
        out = self._take(fragment)
        for view, parameter in zip(self._views(fragment, out), self.of(fragment), strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(local_part(parameter.grad).to_dense())
        return out

    @torch.no_grad()
    def set_grads(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Copy into the gradients, making those that are missing."""
        for view, parameter in zip(self._views(fragment, values), self.of(fragment), strict=True):
            if parameter.grad is None or parameter.grad.layout is not torch.strided:
                parameter.grad = like_parameter(view.clone(), parameter)
            else:
                local_part(parameter.grad).copy_(view)

    def inner_step(self) -> None:
        """Step the optimizer.

        Raises:
            SettingsError: none was given.
        """
        if self._optimizer is None:
            raise SettingsError("ModelLocal needs an optimizer to take an inner step")
        self._optimizer.step()

    def release(self, tensors: Sequence[Tensor], *, reusable: bool) -> None:
        """Keep the scratch for the next round, or let it go."""
        self._scratch.release(tensors, reusable=reusable)

    def _take(self, fragment: Fragment) -> list[Tensor]:
        layout = self.layout(fragment)
        return [
            self._scratch.take(size, dtype, device)
            for size, (dtype, device) in zip(layout.sizes, layout.kinds, strict=True)
        ]

    def _views(self, fragment: Fragment, flats: Sequence[Tensor]) -> list[Tensor]:
        return self.layout(fragment).views(flats)


def like_parameter(values: Tensor, parameter: nn.Parameter) -> Tensor:
    """`values`, the local part, as the kind of tensor that the gradient of `parameter` must be."""
    if not hasattr(parameter, "to_local"):
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


def even_runs(sizes: Sequence[int], parts: int) -> list[Fragment]:
    """`parts` runs of whole parameters, as equal in elements as their order allows.

    Raises:
        SettingsError: there are fewer parameters than parts.
    """
    if not 1 <= parts <= len(sizes):
        raise SettingsError(f"{len(sizes)} parameters cannot be {parts} fragments")
    runs: list[Fragment] = []
    total, first, passed = sum(sizes), 0, 0
    for position, size in enumerate(sizes):
        passed += size
        left, wanted = len(sizes) - position - 1, parts - len(runs) - 1
        if left == wanted or (wanted and passed * parts >= total * (len(runs) + 1)):
            runs.append(Fragment(len(runs), range(first, position + 1)))
            first = position + 1
    return runs
