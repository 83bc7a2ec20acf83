"""Where a run is, out of the two ways of saying so: one device, or numbers of CUDA devices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from torchft.errors import SettingsError

__all__ = ["chosen_device", "usable_device", "usable_devices"]


def chosen_device(
    device: torch.device | str | None, devices: Sequence[int] | None, *, several: bool
) -> torch.device | str | None:
    """`device`, or the one that `devices` are. None: the best that is there.

    `several`: each node has a process, so they can take all CUDA devices in turn.

    Raises:
        SettingsError: the two do not go together, or `devices` asks for what cannot be.
    """
    device = None if isinstance(device, str) and not device else device
    if not devices:
        return device
    if device is not None and torch.device(device).type != "cuda":
        raise SettingsError(f"devices={list(devices)} are numbers of CUDA devices: not {device}")
    if len(devices) == 1:
        return f"cuda:{devices[0]}"
    if not several:
        raise SettingsError(
            f"devices={list(devices)}: the nodes of one process share one device. Give one, or "
            "fit(processes=True) for real processes, a device each in turn"
        )
    if list(devices) != list(range(torch.cuda.device_count())):
        raise SettingsError(
            f"devices={list(devices)}: real processes take all {torch.cuda.device_count()} CUDA "
            "devices in turn; choose among them by CUDA_VISIBLE_DEVICES"
        )
    return "cuda"


def usable_device(
    device: torch.device | str | None, *, stacklevel: int = 3
) -> torch.device | str | None:
    """`device`, or None and a warning where this machine has no such: then the best there is."""
    if not device:
        return None
    kind = torch.device(device).type
    missing = {
        "cuda": not torch.cuda.is_available(),
        "mps": not torch.backends.mps.is_available(),
    }
    if not missing.get(kind, False):
        return device
    warnings.warn(
        f"device={str(device)!r} is not there: left out", UserWarning, stacklevel=stacklevel
    )
    return None


def usable_devices(devices: Sequence[int] | None, *, stacklevel: int = 3) -> Sequence[int] | None:
    """`devices`, or None and a warning where there is no CUDA: then the best device there is."""
    if not devices or torch.cuda.is_available():
        return devices
    warnings.warn(
        f"devices={list(devices)} are numbers of CUDA devices, and CUDA is not there: left out",
        UserWarning,
        stacklevel=stacklevel,
    )
    return None
