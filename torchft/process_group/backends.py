"""The backends for devices, each made for one quorum: what `ProcessGroupNCCL` and its kin run on.

nccl   torch's reconfigurable NCCL (`ProcessGroupNCCL2`, torch 2.14 and NCCL 2.28), where a timeout
       or an abort ends what is pending and nothing else. Elsewhere torch's older `ProcessGroupNCCL`
       with its own watchdog, which would end the process, told to do nothing.
xccl   Intel's, the same way. Never run.

Each quorum gets a new communicator. Members have met at the store by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store

from torchft import settings

__all__ = ["Seats", "nccl", "xccl"]

_c10d: Any = dist.distributed_c10d  # its stubs have neither backend

_QUIET = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""At 0, the older NCCL's watchdog leaves a failed operation to us instead of ending the process."""


@dataclass(frozen=True, slots=True)
class Seats:
    """The members that a backend is made for."""

    store: Store
    """Theirs alone."""
    rank: int
    world_size: int
    timeout: timedelta
    """Of the making, and of each operation."""
    device: torch.device
    """Of this member."""


def nccl(seats: Seats) -> dist.ProcessGroup:
    """NCCL among these members, connected.

    Raises:
        RuntimeError: torch's own errors; a member died meanwhile, or the network fails.
    """
    if not _reconfigures():
        return _older(seats)
    options = _c10d.ProcessGroupNCCL.Options()
    options._timeout = seats.timeout
    options.enable_reconfigure = True
    backend = _c10d.ProcessGroupNCCL2(seats.store, seats.rank, seats.world_size, options)
    _reconfigure(backend, seats)
    return _group(backend, seats, dist.ProcessGroup.BackendType.NCCL)


def xccl(seats: Seats) -> dist.ProcessGroup:
    """XCCL among these members, connected.

    Raises:
        RuntimeError: as `nccl`.
    """
    options = _c10d.ProcessGroupXCCL.Options()
    options._timeout = seats.timeout
    backend = _c10d.ProcessGroupXCCL(seats.store, seats.rank, seats.world_size, options)
    group = _group(backend, seats, dist.ProcessGroup.BackendType.XCCL)
    backend.eager_connect_single_device(seats.device)
    return group


def _reconfigures() -> bool:
    """Whether torch has the reconfigurable NCCL, and nobody has switched it off."""
    if settings.text("TORCH_DIST_USE_NCCL2") == "0" or not hasattr(_c10d, "ProcessGroupNCCL2"):
        return False
    return tuple(torch.cuda.nccl.version())[:2] >= (2, 28)


def _reconfigure(backend: Any, seats: Seats) -> None:
    """Connect a backend of torch's reconfigurable kind, which waits for that."""
    handles = [f"handle/{rank}" for rank in range(seats.world_size)]
    seats.store.set(handles[seats.rank], backend.get_reconfigure_handle())
    opts = _c10d.ReconfigureOptions()
    opts.uuid = 1  # the store is of this quorum alone
    opts.handles = [seats.store.get(handle).decode() for handle in handles]  # in rank order
    opts.timeout = seats.timeout
    backend.reconfigure(opts).wait()


def _older(seats: Seats) -> dist.ProcessGroup:
    options = _c10d.ProcessGroupNCCL.Options()
    options._timeout = 2 * seats.timeout + timedelta(minutes=1)  # our deadlines come first
    with settings.set_during(_QUIET, "0"):
        backend = _c10d.ProcessGroupNCCL(seats.store, seats.rank, seats.world_size, options)
    group = _group(backend, seats, dist.ProcessGroup.BackendType.NCCL)
    backend.eager_connect_single_device(seats.device)
    return group


def _group(backend: Any, seats: Seats, kind: Any) -> dist.ProcessGroup:
    """A torch process group around one backend: it has operations that the backend alone lacks."""
    group: Any = dist.ProcessGroup(seats.store, seats.rank, seats.world_size)
    group._set_default_backend(kind)
    backend._set_sequence_number_for_group()
    group._register_backend(torch.device(seats.device.type), kind, backend)
    return group
