"""The outer step: an optimizer that takes the averaged delta of a fragment as its gradient.

Two kinds. `FlatOuter` makes an optimizer of its own over the memory of the flat backup: the same
kernel over the same layout in every runtime. `ModelOuter` uses optimizers that somebody made over
the model's own parameters, and borrows those parameters for the length of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn, strided
from torch.optim import SGD, Optimizer

from torchft.errors import SettingsError
from torchft.sharded import is_sharded
from torchft.strategies.local import Fragment
from torchft.strategies.model_local import ModelLocal, like_parameter
from torchft.strategies.parts.backup import Backup
from torchft.strategies.parts.coupling import check_steps, sees_shapes
from torchft.strategies.parts.masters import masters_of, restored_on_error, take_over

__all__ = ["FlatOuter", "Flats", "ModelOuter", "Outer", "OuterFactory"]

OuterFactory = Callable[[list[nn.Parameter]], Optimizer]
"""For example `functools.partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)`."""


class Flats(Protocol):
    """What is stepped: a `Backup`, or a server's weights."""

    @property
    def flats(self) -> Sequence[Tensor]:
        """The tensors of a fragment, flat, each `[1, n]`."""
        ...

    def in_shape(self, flats: Sequence[Tensor]) -> Sequence[Tensor]:
        """One view per parameter of the model, in its shape, of tensors like `flats`."""
        ...


class Outer(Protocol):
    """An outer optimizer, which advances the backups of fragments."""

    leaves_news: bool
    """After a step the model's weights are the new backup already."""

    def bind(self, fragments: Sequence[Fragment], backups: Sequence[Backup]) -> None:
        """Prepare it for a model; called once, before any step."""
        ...

    def described(self) -> str:
        """What the optimizers were made with, which must be the same in all groups."""
        ...

    def step(self, fragment: Fragment, average: Sequence[Tensor]) -> None:
        """Advance the backup of `fragment` with the averaged delta `[1, n]`."""
        ...

    def state_dict(self, fragment: Fragment) -> dict[str, Any]:
        """The optimizer state of `fragment`; empty when an earlier fragment's has it."""
        ...

    def load_state_dict(self, fragment: Fragment, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        ...


class FlatOuter:
    """One optimizer of `factory` per fragment, over the backups' own memory.

    Its parameters are the flat backups themselves where `factory`'s optimizers step number by
    number, and the parameters of the model, in their shapes, where they do not: for Adafactor,
    Muon or LARS one flat tensor would be another model.
    """

    leaves_news = False

    def __init__(self, factory: OuterFactory) -> None:
        self._factory = factory
        self._backups: list[Flats] = []
        self._in_shape = False
        self._parameters: list[list[nn.Parameter]] = []
        self._optimizers: list[Optimizer] = []

    def bind(self, fragments: Sequence[Fragment], backups: Sequence[Flats]) -> None:
        """Make one optimizer for each fragment of the model."""
        check_steps("the outer optimizer", self._factory, torch.device("cpu"))
        self._in_shape = sees_shapes(self._factory)
        self._backups = list(backups)
        self._parameters = [[nn.Parameter(t) for t in self._cut(b, b.flats)] for b in backups]
        self._optimizers = [self._factory(parameters) for parameters in self._parameters]

    def _cut(self, backup: Flats, flats: Sequence[Tensor]) -> Sequence[Tensor]:
        return backup.in_shape(flats) if self._in_shape else flats

    def described(self) -> str:
        """What the optimizer of each fragment was made with."""
        return _described(self._optimizers[:1])

    def step(self, fragment: Fragment, average: Sequence[Tensor]) -> None:
        """Step in place, on the backup's device."""
        parameters = self._parameters[fragment.index]
        gradients = self._cut(self._backups[fragment.index], average)
        for parameter, mean in zip(parameters, gradients, strict=True):
            parameter.grad = mean.to(parameter.device)
        self._optimizers[fragment.index].step()
        for parameter in parameters:
            parameter.grad = None

    def change(self, **settings: float) -> None:
        """Other hyperparameters for all steps from now on, such as `lr`."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group.update(settings)

    def state_dict(self, fragment: Fragment) -> dict[str, Any]:
        """The state of the optimizer of one fragment."""
        return self._optimizers[fragment.index].state_dict()

    def load_state_dict(self, fragment: Fragment, state: dict[str, Any]) -> None:
        """Load a state into the optimizer of one fragment."""
        self._optimizers[fragment.index].load_state_dict(state)


class ModelOuter:
    """Optimizers over the model's parameters: one per fragment, or a single one for all of them.

    The parameters are lent: they become the backup, get the average as gradient, are stepped and
    read back. The backup changes last, so an optimizer that raises leaves the last synchronisation
    whole. `keep_weights` puts the local weights back afterwards, for a recipe that mixes them.

    Where the backup has more digits than the parameters, its views are stepped instead of them: see
    `masters.py`.
    """

    _local: ModelLocal

    def __init__(self, optimizers: Sequence[Optimizer], *, keep_weights: bool = False) -> None:
        self._optimizers = list(optimizers)
        self._backups: list[Backup] = []
        self._masters: dict[nn.Parameter, nn.Parameter] = {}
        """Parameter → what is stepped in its place. Empty: the parameters themselves are."""
        self._keep_weights = keep_weights
        self.leaves_news = not keep_weights

    def bind(self, fragments: Sequence[Fragment], backups: Sequence[Backup]) -> None:
        """Check that every parameter that is sent will also be stepped.

        Raises:
            SettingsError: one of them is in no outer optimizer's groups, or the nodes of a
                simulation share one process, and so those parameters.
        """
        self._backups = list(backups)
        local = backups[0].local
        if not isinstance(local, ModelLocal):
            raise SettingsError(
                "an outer optimizer over the model's own parameters runs in a process of its own: "
                "give OptimSpec(torch.optim.SGD, lr=0.7, …) in its place"
            )
        self._local = local
        for fragment in fragments:
            known = {id(p) for g in self._optimizer(fragment).param_groups for p in g["params"]}
            names = self._local.names_of(fragment)
            for name, parameter in zip(names, self._local.of(fragment), strict=True):
                if id(parameter) not in known:
                    raise SettingsError(
                        f"parameter {name} of fragment {fragment.index} is not in its outer "
                        "optimizer, so it would never move: make that optimizer over all "
                        "parameters of the fragment"
                    )
        if any(backup.is_wider for backup in backups):
            self._make_masters(fragments)

    def _make_masters(self, fragments: Sequence[Fragment]) -> None:
        self.leaves_news = False
        for fragment, backup in zip(fragments, self._backups, strict=True):
            parameters = self._local.of(fragment)
            views = self._local.layout(fragment).views(backup.flats)
            masters = masters_of(parameters, views, self._optimizer(fragment))
            self._masters.update(zip(parameters, masters, strict=True))
        for optimizer in self._optimizers:
            take_over(optimizer, self._masters)

    def _optimizer(self, fragment: Fragment) -> Optimizer:
        return self._optimizers[fragment.index if len(self._optimizers) > 1 else 0]

    def described(self) -> str:
        """What the optimizers were made with."""
        return _described(self._optimizers)

    def step(self, fragment: Fragment, average: Sequence[Tensor]) -> None:
        """Step the lent parameters and read them back, or step the backup itself."""
        backup, local = self._backups[fragment.index], self._local
        if self._masters:
            with restored_on_error(backup.flats):
                self._step(fragment, average)
            return
        mine = local.weights(fragment) if self._keep_weights else None
        backup.restore()
        self._step(fragment, average)
        local.read_weights(fragment, backup.flats)
        if mine is not None:
            local.set_weights(fragment, mine)
            local.release(mine, reusable=True)

    def _step(self, fragment: Fragment, average: Sequence[Tensor]) -> None:
        optimizer = self._optimizer(fragment)
        with self._lent_grads(fragment, average), _fused(optimizer):
            optimizer.step()

    @contextmanager
    def _lent_grads(self, fragment: Fragment, average: Sequence[Tensor]) -> Iterator[None]:
        """The average as the only gradients of the optimizer; the local ones come back."""
        groups = self._optimizer(fragment).param_groups
        mine = [(p, p.grad) for group in groups for p in group["params"]]
        try:
            for parameter, _ in mine:
                parameter.grad = None
            views = self._local.layout(fragment).views(average)
            for own, view in zip(self._local.of(fragment), views, strict=True):
                parameter = self._masters.get(own, own)
                # A donor's result lies on the CPU.
                parameter.grad = like_parameter(view.to(parameter.device), parameter)
            yield
        finally:
            for parameter, grad in mine:
                parameter.grad = grad

    def state_dict(self, fragment: Fragment) -> dict[str, Any]:
        """The fragment's optimizer; an optimizer that all share goes with the first fragment."""
        if len(self._optimizers) == 1 and fragment.index > 0:
            return {}
        return self._optimizer(fragment).state_dict()

    def load_state_dict(self, fragment: Fragment, state: dict[str, Any]) -> None:
        """Take over a donor's optimizer state."""
        if state:
            self._optimizer(fragment).load_state_dict(state)


def _described(optimizers: Sequence[Optimizer]) -> str:
    return ", ".join(f"{type(o).__name__} {sorted(o.defaults.items())}" for o in optimizers)


@contextmanager
def _fused(optimizer: Optimizer) -> Iterator[None]:
    """Let SGD step in one pass without temporaries, where its maker left that choice to torch."""
    groups = [group for group in optimizer.param_groups if _may_fuse(optimizer, group)]
    for group in groups:
        group["fused"] = True
    try:
        yield
    finally:
        for group in groups:
            group["fused"] = None


def _may_fuse(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Elsewhere than on a CPU, torch's own choice is as good."""
    if type(optimizer) is not SGD or isinstance(group["lr"], Tensor) or group["differentiable"]:
        return False
    spoken = group["fused"] is not None or group["foreach"] is not None
    tensors = [t for p in group["params"] for t in (p, p.grad) if t is not None]
    return not spoken and all(map(_is_plain, tensors))


def _is_plain(tensor: Tensor) -> bool:
    # The fused kernel takes a tensor with gaps for one without.
    on_cpu = tensor.device.type == "cpu" and tensor.layout is strided
    return on_cpu and tensor.is_contiguous() and not is_sharded(tensor)
