"""What every process group of ours can be asked: torch's collectives, and being made anew.

A torch process group is made once. Ours is configured again whenever the members change, can be
abandoned while operations are pending, and says whether it is broken. It is a torch process group
too, so that DDP, FSDP and device meshes take it.
"""
# mypy: disable-error-code="override"
# Torch declares several forms of each operation; the one of each that takes lists is ours.

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup as TorchProcessGroup
from torch.distributed import ReduceOp, Work
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)

from torchft.errors import PhaseError, UnsupportedError

if TYPE_CHECKING:
    from torchft.process_group.generation import Generation

__all__ = ["ProcessGroup"]

AnyAllreduceOptions = AllreduceOptions | ReduceOp | ReduceOp.RedOpType


class ProcessGroup(TorchProcessGroup):
    """The base: every operation is refused until a subclass brings it.

    Operations return torch's Work: `wait(timeout=None)` raises RuntimeError when the operation
    failed, timed out or was abandoned. Until it has ended, its tensors belong to it.
    """

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(rank, world_size)
        self._registered: str | None = None
        self._group_name = ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    # ------------------------------------------------------------------ members

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        group_rank: int | None = None,
        group_world_size: int | None = None,
        global_ranks: list[int] | None = None,
    ) -> None:
        """Join `world_size` members as `rank`, in place of those of before, who are not waited for.

        A manager passes the last four to a `configure` that takes them. Ours do not need them.

        Args:
            store_addr: `host:port/prefix` of a store that serves already; the prefix is the same
                for all members and has not been used before.
            replica_id: names this member in errors.
            rank: this member's.
            world_size: how many members there are.
            quorum_id: of the quorum; never repeated.
            group_rank: of this process in its replica group.
            group_world_size: how many ranks each replica group has.
            global_ranks: of all members, counted over the ranks of all groups.

        Raises:
            MeetingTimeoutError: a member did not come in time; names its rank.
            CollectiveError: the store or a member is gone. The next configure may succeed.
        """
        raise self._lacks("configure")

    def abort(self) -> None:
        """Abandon what is pending, here and at the peers. Usable again after `configure`."""
        raise self._lacks("abort")

    def shutdown(self) -> None:
        """Abandon what is pending and free everything. Calling it again does nothing."""
        raise self._lacks("shutdown")

    def errored(self) -> Exception | None:
        """Why this group cannot be used until the next `configure`; None while it can."""
        return None

    def set_timeout(self, timeout: timedelta) -> None:
        """Deadline of every configure and operation that begins from now on."""
        raise self._lacks("set_timeout")

    @property
    def device(self) -> torch.device:
        """Where it wants tensors whose place does not matter; most kinds take others too."""
        return torch.device("cpu")

    @property
    def generation(self) -> Generation | None:
        """The members among whom operations run now; None where a group never changes them."""
        return None

    def size(self) -> int:
        """How many members the process group has."""
        raise self._lacks("size")

    def getBackendName(self) -> str:
        """The name under which torch knows this kind of group."""
        raise self._lacks("getBackendName")

    # ------------------------------------------------------------------ operations

    def allreduce(self, tensors: list[Tensor], opts: AnyAllreduceOptions) -> Work:
        """Reduce the one tensor of `tensors` over all members, in place."""
        raise self._lacks("allreduce")

    def allreduce_coalesced(
        self, tensors: list[Tensor], opts: AllreduceCoalescedOptions | None = None
    ) -> Work:
        """Reduce several tensors in place, as one operation."""
        raise self._lacks("allreduce_coalesced")

    def allgather(
        self,
        output_tensors: list[list[Tensor]],
        input_tensor: list[Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        """`[x]` of each member → `[[x of rank 0, x of rank 1, …]]` at every one."""
        raise self._lacks("allgather")

    def allgather_into_tensor_coalesced(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        """Each `[k, …]` of every member → one `[n * k, …]`."""
        raise self._lacks("allgather_into_tensor_coalesced")

    def alltoall_base(
        self,
        output_buffer: Tensor,
        input_buffer: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: AllToAllOptions | None = None,
    ) -> Work:
        """Row block i of `input_buffer` goes to rank i. Empty split sizes: equal blocks."""
        raise self._lacks("alltoall_base")

    def barrier(self, opts: BarrierOptions | None = None) -> Work:
        """Ends when every member has called it."""
        raise self._lacks("barrier")

    def broadcast(self, tensor_list: list[Tensor], opts: BroadcastOptions | None = None) -> Work:
        """The tensor of `opts.rootRank` to all, in place."""
        raise self._lacks("broadcast")

    def broadcast_one(self, tensor: Tensor, root: int) -> Work:
        """The tensor of rank `root` to all, in place."""
        opts = BroadcastOptions()
        opts.rootRank = root
        return self.broadcast([tensor], opts)

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> Work:
        """One tensor to `dst_rank`, which receives it under the same tag."""
        raise self._lacks("send")

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> Work:
        """One tensor from `src_rank`, into the one given."""
        raise self._lacks("recv")

    def reduce_scatter(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[list[Tensor]],
        opts: ReduceScatterOptions | None = None,
    ) -> Work:
        """Reduce `[[x0, x1, …]]` and keep the one of one's own rank."""
        raise self._lacks("reduce_scatter")

    def reduce_scatter_tensor_coalesced(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        opts: ReduceScatterOptions | None = None,
    ) -> Work:
        """Reduce each `[n * k, …]` and keep one's own `[k, …]`."""
        raise self._lacks("reduce_scatter_tensor_coalesced")

    def _lacks(self, operation: str) -> UnsupportedError:
        return UnsupportedError(
            f"{type(self).__name__} does not support {operation}: override it, or use "
            "ProcessGroupGloo, which has every operation"
        )

    # ------------------------------------------------------------------ torch's registry

    def register(self, name: str) -> TorchProcessGroup:
        """Make this group known to torch under `name`, as a group of this process alone.

        Returns the group that torch functions take; its world size there is 1, whatever the
        members are. Needs `torch.distributed` to be initialised.

        Raises:
            PhaseError: registered already.
        """
        if self._registered is not None:
            raise PhaseError(f"registered already as {self._registered!r}: unregister first")
        backend = f"{self.getBackendName()}:{name}"
        there = torch.accelerator.current_accelerator(check_available=True)
        devices = ["cpu", *([] if there is None else [there.type])]
        dist.Backend.register_backend(backend, self._creator(), devices=devices)
        group = dist.new_group(
            ranks=[dist.get_rank()],
            backend=backend,
            group_desc=backend,
            timeout=timedelta(seconds=60),
            use_local_synchronization=True,  # no other rank has a part in it
        )
        assert isinstance(group, TorchProcessGroup)
        self._registered = backend
        # Kept: torch asks for it once more when it has already forgotten the group.
        self._group_name = dist.distributed_c10d._get_process_group_name(group)
        return group

    def _creator(self) -> Callable[..., TorchProcessGroup]:
        def create(*_: Any) -> TorchProcessGroup:
            return self

        return create

    def unregister(self) -> None:
        """Take it out of torch's registry.

        Raises:
            PhaseError: it is not registered.
        """
        if self._registered is None:
            raise PhaseError("not registered: call register first")
        dist.destroy_process_group(self)
        self._registered = None

    @property
    def group_name(self) -> str:
        """The name that torch gave it when it was registered.

        Raises:
            PhaseError: it is not registered.
        """
        if self._registered is None:
            raise PhaseError("a group has a name only between register and unregister")
        return self._group_name
