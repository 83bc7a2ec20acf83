"""The accelerator of this process, whichever kind it is, by what all kinds have in common."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["finish_current_stream", "has_streams", "is_lost", "module_of"]

_LOST = ("CUDA error", "XPU error", "HIP error", "unhandled cuda error")
"""What torch and NCCL say in the RuntimeError of a device that does not come back."""


def module_of(device: torch.device) -> Any:
    """`torch.cuda` and its likes, which have one interface."""
    return torch.get_device_module(device)


def has_streams(device: torch.device) -> bool:
    """Whether work on this device is queued in streams, of which there can be several."""
    return device.type != "cpu" and hasattr(module_of(device), "Stream")


def finish_current_stream() -> None:
    """Wait until the accelerator, where this process uses one, has done all of its current stream.

    Raises:
        RuntimeError: torch's own, of a device that failed.
    """
    device = torch.accelerator.current_accelerator(check_available=True)
    # Asking for the stream of one that is not in use would take it into use, with its memory.
    if device is not None and has_streams(device) and module_of(device).is_initialized():
        module_of(device).current_stream().synchronize()


def is_lost(error: BaseException | None) -> bool:
    """Whether it, or what caused it, says that a device has failed in such a way that this process
    cannot use it any more. Memory that ran out is no such failure."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if _says_lost(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _says_lost(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return False
    named = getattr(torch, "AcceleratorError", None)  # torch 2.8
    if named is not None and isinstance(error, named):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error) for one in _LOST)
