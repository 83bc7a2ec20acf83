"""Run something before and after each step of an optimizer, whatever kind of object it is.

torch's own hooks run where `Optimizer.__init__` has put them around the class's `step`. Many
optimizers are not so: wrappers that leave `Optimizer.__init__` out (Accelerate's, Lookahead's),
classes whose `step` calls that of a base class which has hooks as well (they would run twice),
objects that are no `Optimizer`, and those whose `step` somebody has replaced. Of these, `step` is
replaced on the object itself, as learning-rate schedules do it, until `detach`.

    plain optimizer          torch's hooks, also under torch.compile
    wrapper of an optimizer  its step is replaced, and torch's hooks tell whether the inner
                             optimizer stepped in it: with gradient accumulation it may not have
    anything else            its step is replaced, and each call is a step

What none of these sees, `StepWatch` notices.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from types import MethodType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchft.arguments import in_words
from torchft.errors import ClosureError, SettingsError
from torchft.step_watch import StepWatch
from torchft.untraced import untraced

__all__ = [
    "StepHooks",
    "check_no_closure",
    "check_optimizer",
    "check_trains",
    "hook_before_steps",
    "parameters_of",
    "state_of",
]


class StepHooks:
    """`before` runs before each step of `optimizer`; behind it `after`, or `abandoned` when the
    object that was called took no step.

    A step in a step (of a base class, of a wrapped optimizer) is part of the outer one. After a
    step that raised, a replaced `step` calls `abandoned`; with torch's hooks nothing is called.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        before: Callable[[], None],
        after: Callable[[], None],
        abandoned: Callable[[], None] = lambda: None,
    ) -> None:
        self.watch = StepWatch(parameters_of(optimizer), type(optimizer).__name__)
        self._optimizer = optimizer
        self._before, self._after, self._abandoned = before, after, abandoned
        self._handles: list[RemovableHandle] = []
        self._replaced: _ReplacedStep | None = None
        self._running = 0
        """Calls of a replaced `step`, one in the other."""
        self._each_counts = self._counts = False

    def attach(self) -> None:
        """Hook in, where that was not done yet.

        Raises:
            SettingsError: the object does not let its `step` be replaced.
        """
        if self._handles or self._replaced is not None:
            return
        layers = list(_layers(self._optimizer))
        hooked = [layer for layer in layers if _runs_hooks(layer)]
        for layer in hooked:
            self._handles.append(layer.register_step_pre_hook(untraced(lambda *_: self._begins())))
            self._handles.append(layer.register_step_post_hook(untraced(lambda *_: self._ended())))
        if len(layers) > 1 or not hooked or _steps_in_steps(self._optimizer):
            self._running, self._each_counts = 0, not hooked
            self._replaced = _ReplacedStep(self._optimizer, self._call_begins, self._call_ended)
        self.watch.begin()

    def detach(self) -> None:
        """Leave the optimizer as it was found."""
        self.watch.end()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._replaced is not None:
            self._replaced.undo()
            self._replaced = None

    def _begins(self) -> None:
        if not self._running:
            self.watch.stepping()
            self._before()

    def _ended(self) -> None:
        if self._running:
            self._counts = True
        else:
            self.watch.stepped()
            self._after()

    def _call_begins(self) -> None:
        if not self._running:
            self._counts = self._each_counts
            self._begins()
        self._running += 1

    def _call_ended(self, went: bool) -> None:
        self._running -= 1
        if self._running:
            return
        if went and self._counts:
            self._ended()
        else:
            self.watch.not_stepped()
            self._abandoned()


class _ReplacedStep:
    """`step` of one object, replaced until `undo`: `begins`, the step, `ended(whether it went)`."""

    def __init__(
        self, optimizer: Any, begins: Callable[[], None], ended: Callable[[bool], None]
    ) -> None:
        self._optimizer, self._active = optimizer, True
        self._found = _own_step(optimizer)
        call = optimizer.step
        begin, end = untraced(lambda: begins()), untraced(lambda went: ended(went))

        # Schedules leave a mark on a step that they have wrapped, which is kept.
        @functools.wraps(getattr(call, "__func__", call))
        def step(mine: Any, *args: Any, **kwargs: Any) -> Any:
            if mine is not optimizer:  # a copy of the object, which took this step along
                return type(mine).step(mine, *args, **kwargs)
            if not self._active:  # a schedule may have wrapped it and keep it
                return call(*args, **kwargs)
            begin()
            try:
                result = call(*args, **kwargs)
            except BaseException:
                end(False)
                raise
            end(True)
            return result

        self._mine = MethodType(step, optimizer)
        try:
            optimizer.step = self._mine
        except AttributeError:
            raise SettingsError(
                f"the steps of a {type(optimizer).__name__} cannot be seen: it has neither torch's "
                "step hooks nor a step that can be replaced; give the optimizer that it wraps"
            ) from None

    def undo(self) -> None:
        self._active = False
        if _own_step(self._optimizer) is not self._mine:
            return
        if self._found is None:
            del self._optimizer.step
        else:
            self._optimizer.step = self._found


def hook_before_steps(optimizer: Any, call: Callable[..., None]) -> list[RemovableHandle]:
    """Run `call` before each step of the optimizer and of those that it wraps, as far as they have
    torch's own hooks. What it raises comes out of that step, before it changes anything."""
    layers = [layer for layer in _layers(optimizer) if _runs_hooks(layer)]
    return [layer.register_step_pre_hook(call) for layer in layers]


def check_optimizer(argument: str, optimizer: Any) -> None:
    """Refuse what cannot step.

    Raises:
        SettingsError: names the argument, and what it got.
    """
    if isinstance(optimizer, type):
        raise SettingsError(
            f"{argument} is the class {optimizer.__name__}: give an optimizer made of it, such as "
            f"{optimizer.__name__}(model.parameters(), lr=1e-3)"
        )
    if not callable(getattr(optimizer, "step", None)) or not hasattr(optimizer, "param_groups"):
        raise SettingsError(
            f"{argument} is {in_words(optimizer)}, which is no optimizer: give an object with "
            "step() and param_groups, such as torch.optim.AdamW(model.parameters(), lr=1e-3)"
        )


def check_no_closure(kind: type[Any]) -> None:
    """Optimizers of class `kind` step without a closure.

    Raises:
        ClosureError: they compute the loss in their step, as LBFGS does.
    """
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ClosureError(
            f"{kind.__name__} computes the loss several times in a step (its closure), and here it "
            "is given one gradient: use another optimizer, or LocalSGD or DiLoCo, whose inner "
            "optimizer steps with its closure between the rounds"
        )


def check_trains(names: Sequence[str], parameters: Sequence[Tensor], optimizer: Any) -> None:
    """`optimizer` steps at least one of `parameters`.

    Raises:
        SettingsError: it is an optimizer of another model.
    """
    if {id(p) for p in parameters_of(optimizer)}.isdisjoint(map(id, parameters)):
        raise SettingsError(
            f"the optimizer steps none of the model's {len(parameters)} trained parameters (such "
            f"as {names[0]}), so they would stay as they are: make it of this model's parameters, "
            "after the model was moved, sharded or wrapped"
        )


def parameters_of(optimizer: Any) -> list[Tensor]:
    """The parameters of all its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def state_of(optimizer: Any) -> MutableMapping[Tensor, Any] | None:
    """The state of each parameter, also where a wrapper such as `torchft.optim.OptimizerWrapper`
    holds the optimizer; None where none is known."""
    return getattr(getattr(optimizer, "optimizer", optimizer), "state", None)


def _layers(optimizer: Any) -> Iterator[Any]:
    """The optimizer, and those that it wraps: torch optimizers that it holds, of parameters that
    are its own too."""
    mine = {id(parameter) for parameter in parameters_of(optimizer)}
    found, waiting = [optimizer], [optimizer]
    while waiting:
        layer = waiting.pop()
        yield layer
        for held in list(getattr(layer, "__dict__", {}).values()):
            if not isinstance(held, Optimizer) or any(held is one for one in found):
                continue
            if mine.intersection(map(id, parameters_of(held))):
                found.append(held)
                waiting.append(held)


def _own_step(optimizer: Any) -> Any:
    """A `step` that was put on the object itself; None: it has its class's."""
    return getattr(optimizer, "__dict__", {}).get("step")


def _runs_hooks(optimizer: Any) -> bool:
    """Whether its `step` runs the hooks that are registered on it.

    `Optimizer.__init__` marks the class's `step` when it puts hooks around it, and gives the object
    a place for them; there is no public way to ask.
    """
    step, own = getattr(type(optimizer), "step", None), _own_step(optimizer)
    is_class_step = own is None or inspect.unwrap(own) is inspect.unwrap(step or own)
    has_place = "_optimizer_step_post_hooks" in getattr(optimizer, "__dict__", {})
    return bool(getattr(step, "hooked", False)) and has_place and is_class_step


def _steps_in_steps(optimizer: Any) -> bool:
    """Whether several of its classes have a `step`, of which one may call the other."""
    kinds = [kind for kind in type(optimizer).__mro__ if kind is not Optimizer]
    steps = [vars(kind)["step"] for kind in kinds if "step" in vars(kind)]
    return len({id(inspect.unwrap(step)) for step in steps}) > 1
