"""The manager as a process group: for code that wants to all-reduce, not to know about steps."""
# mypy: disable-error-code="override"

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from torch.distributed import Work
from torch.distributed.distributed_c10d import AllreduceOptions, BroadcastOptions

from torchft.errors import SettingsError, UnsupportedError
from torchft.process_group.base import AnyAllreduceOptions, ProcessGroup
from torchft.process_group.wrapper import ProcessGroupWrapper
from torchft.untraced import untraced

__all__ = ["ManagedProcessGroup"]


class _Manager(Protocol):
    """What is needed of `torchft.Manager`."""

    process_group: ProcessGroup

    def allreduce(self, tensor: Tensor, *, reduce_op: Any) -> Work: ...

    def errored(self) -> Any: ...

    def num_participants(self) -> int: ...


class ManagedProcessGroup(ProcessGroupWrapper):
    """All-reduces go through the manager, which owns their failures; its size is the step's.

    Other collectives go to the manager's process group as they are, unmanaged.
    """

    def __init__(self, manager: _Manager) -> None:
        super().__init__(pg=manager.process_group)
        self._manager = manager

    @untraced  # by torch's DistributedDataParallel, in the backward pass
    def allreduce(self, tensors: list[Tensor], opts: AnyAllreduceOptions) -> Work:
        """All-reduce exactly one tensor by the manager, in place.

        Raises:
            SettingsError: there is not exactly one tensor.
        """
        if len(tensors) != 1:
            raise SettingsError(f"a managed all-reduce takes one tensor, not {len(tensors)}")
        op = opts.reduceOp if isinstance(opts, AllreduceOptions) else opts
        return self._manager.allreduce(tensors[0], reduce_op=op)

    @untraced  # by torch's DistributedDataParallel, of buffers
    def broadcast(self, tensor_list: list[Tensor], opts: BroadcastOptions | None = None) -> Work:
        """Broadcast by the manager's process group, without the manager."""
        return super().broadcast(tensor_list, opts)

    def size(self) -> int:
        """How many groups are counted in this step; waits for its quorum."""
        return self._manager.num_participants()

    def getBackendName(self) -> str:
        """`torchft-managed-` and the name of the group inside."""
        return f"torchft-managed-{super().getBackendName()}"

    def errored(self) -> Exception | None:
        """The error of the manager's step."""
        return self._manager.errored()

    def configure(self, *members: Any, **more: Any) -> None:
        """Refuse: the manager configures its process group itself.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "a managed process group does not support configure: its manager configures it"
        )
