"""Where a backward pass ends, also one that runs others inside it.

Activation checkpointing with `use_reentrant=True` runs backward passes inside a backward pass, and
autograd says of none whether it is inside another. The outermost one is the one in which gradients
of what the model returned arrive.
"""

# No postponed annotations in this file: torch reads those of hooks.

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor
from torch.autograd import Variable

from torchft.untraced import untraced

__all__ = ["BackwardPass", "tensors_in"]

_NONE = -1


class BackwardPass:
    """Calls `at_end` once when a backward pass ends, before `backward` returns. With `last` that is
    after whatever else was to be called then: FSDP2 reduces its last gradients there.

    Example:
        backward = BackwardPass(average)
        backward.expect(output)      # after each forward pass
        backward.enter()             # in a hook of a parameter
    """

    def __init__(self, at_end: Callable[[], None], *, last: bool = False) -> None:
        self._at_end = at_end
        self._task = _NONE
        self._last, self._yielded = last, False

    @untraced
    def expect(self, output: object) -> None:
        """A forward pass returned `output`: what is computed from it has its backward pass yet to
        come. One that did not end, because it raised, is forgotten."""
        self._task = _NONE
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.register_hook(self._begin)

    @property
    def unfinished(self) -> bool:
        """Whether one began and did not end: it runs, or it raised."""
        return self._task != _NONE

    def enter(self) -> None:
        """A gradient arrived: a backward pass is running."""
        if self._task == _NONE:
            self._queue(torch._C._current_graph_task_id())

    def _begin(self, _: Tensor) -> None:
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._queue(task)

    def _queue(self, task: int) -> None:
        self._task, self._yielded = task, False
        Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        if self._last and not self._yielded:
            self._yielded = True
            Variable._execution_engine.queue_callback(self._end)
            return
        self._at_end()
        self._task = _NONE


def tensors_in(output: object) -> Iterator[Tensor]:
    """The tensors in what a model returned: in lists, tuples, mappings and dataclasses."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_in(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors_in(getattr(output, field.name))
