"""Streams of the accelerator beside the training loop's, for what the background encodes and sends.

What the loop computed before comes first, and what the loop computes meanwhile does not wait:

    beside = SideStream(tensors)     in the loop: marks what the tensors' numbers wait for
    with beside: ...                 in the background: kernels and copies go to the side stream
    beside.join()                    in the loop: from here on its stream sees the result

Tensors on the CPU, or on a device without streams, need none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from torchft.devices import has_streams, module_of

__all__ = ["SideStream"]


class SideStream:
    """For one piece of work on `tensors`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if has_streams(tensor.device)]
        self._devices = sorted({tensor.device for tensor in self._tensors}, key=str)
        self._before = [_current(at).record_event() for at in self._devices]
        self._after: list[torch.Event] = []
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        for device, before in zip(self._devices, self._before, strict=True):
            side = _of(device)
            side.wait_event(before)
            self._entered.enter_context(module_of(device).stream(side))
        return self

    def __exit__(self, *raised: object) -> None:
        self._entered.close()
        for tensor in self._tensors:
            # Whoever gives it up does not get its memory back before this stream is done with it.
            tensor.record_stream(_of(tensor.device))
        self._after = [_of(device).record_event() for device in self._devices]

    def join(self) -> None:
        """The current streams go on after all that was done within."""
        for device, after in zip(self._devices, self._after, strict=False):
            _current(device).wait_event(after)


def _current(device: torch.device) -> Any:
    return module_of(device).current_stream(device)


@cache
def _of(device: torch.device) -> Any:
    return module_of(device).Stream(device)
