"""CUDA streams beside the training loop's, for what the background encodes and sends.

What the loop computed before comes first, and what the loop computes meanwhile does not wait:

    beside = SideStream(tensors)     in the loop: marks what the tensors' numbers wait for
    with beside: ...                 in the background: kernels and copies go to the side stream
    beside.join()                    in the loop: from here on its stream sees the result

Tensors on the CPU need none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from typing import Self

import torch
from torch import Tensor

__all__ = ["SideStream"]


class SideStream:
    """For one piece of work on `tensors`."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.is_cuda]
        self._devices = sorted({tensor.device for tensor in self._tensors}, key=str)
        self._before = [torch.cuda.current_stream(at).record_event() for at in self._devices]
        self._after: list[torch.cuda.Event] = []
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        for device, before in zip(self._devices, self._before, strict=True):
            side = _of(device)
            side.wait_event(before)
            self._entered.enter_context(torch.cuda.stream(side))
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
            torch.cuda.current_stream(device).wait_event(after)


@cache
def _of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
