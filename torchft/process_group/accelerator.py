"""Process groups whose backend communicates on a device by itself: NCCL, and XCCL the same way.

Each quorum has a new communicator (`backends.py`). An operation returns when it is enqueued;
`work.wait()` holds up the current stream and not the host, and the watchdog of the generation has
its deadline. An abort ends what is pending on the device, so that the streams go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import Store

from torchft.errors import MissingDeviceError, SettingsError
from torchft.process_group import backends
from torchft.process_group.backends import Seats
from torchft.process_group.rendezvous import Member, Seat
from torchft.process_group.wrapper import ProcessGroupWrapper

__all__ = ["Kind", "ProcessGroupNCCL", "ProcessGroupXCCL"]


@dataclass(frozen=True, slots=True)
class Kind:
    """What one kind differs in from the others."""

    name: str
    """Of the backend, in capitals."""
    device_type: str
    """As torch names it."""
    in_torch: Callable[[], bool]
    """Whether torch was built with the backend."""
    create: Callable[[Seats], dist.ProcessGroup]

    def check(self, group: str) -> None:
        """Refuse to make `group` where its backend could not work.

        Raises:
            MissingDeviceError: torch lacks the backend, or the machine a device for it.
        """
        if not self.in_torch():
            missing = f"this torch ({torch.__version__}) is built without {self.name}"
        elif not torch.get_device_module(self.device_type).is_available():
            missing = f"torch finds no {self.device_type} device on this machine"
        else:
            return
        raise MissingDeviceError(
            f"{group} needs {self.name} and a {self.device_type} device, and {missing}: use "
            "ProcessGroupGloo, which takes tensors of every device"
        )


NCCL = Kind("NCCL", "cuda", dist.is_nccl_available, backends.nccl)
XCCL = Kind("XCCL", "xpu", dist.is_xccl_available, backends.xccl)


class ProcessGroupNCCL(ProcessGroupWrapper):
    """Collectives over NCCL, for tensors on the GPU that is current when the group is made.

    Each member needs a GPU of its own. An operation that has no result in `timeout`, or in the
    timeout of the manager if that is shorter, is aborted, and so is all that is pending beside it.

    Args:
        timeout: deadline of each configure and each operation.

    Raises:
        SettingsError: the timeout is not above 0.
        MissingDeviceError: torch lacks NCCL, or the machine a GPU.
    """

    kind = NCCL

    def __init__(self, timeout: timedelta = timedelta(seconds=60)) -> None:
        if timeout <= timedelta(0):
            raise SettingsError(f"timeout={timeout} is no timeout: give one above 0")
        self.kind.check(type(self).__name__)
        super().__init__(timeout)
        index = torch.get_device_module(self.kind.device_type).current_device()
        self._device = torch.device(self.kind.device_type, index)

    @property
    def device(self) -> torch.device:
        """The one device whose tensors it takes."""
        return self._device

    def getBackendName(self) -> str:
        """The name of its backend, such as `torchft-nccl`."""
        return f"torchft-{self.kind.name.lower()}"

    def _member(self, seat: Seat) -> Member:
        module = torch.get_device_module(self.kind.device_type)
        identity = str(module.get_device_properties(self._device).uuid)
        return Member.here(seat, None, identity)

    def _create_pg(self, store: Store, rank: int, world_size: int) -> dist.ProcessGroup:
        # Which device is current is remembered for each thread, and this one is new.
        torch.get_device_module(self.kind.device_type).set_device(self._device)
        return self.kind.create(Seats(store, rank, world_size, self._timeout, self._device))


class ProcessGroupXCCL(ProcessGroupNCCL):
    """`ProcessGroupNCCL` over Intel's XCCL, for tensors on an XPU. Untested: never run on one.

    Args and errors are those of `ProcessGroupNCCL`.
    """

    kind = XCCL
