"""A process group of one: every operation has ended when it returns.

For code that insists on a process group (torch's DDP) while the real communication goes elsewhere,
and for tests, which read its counters.
"""
# mypy: disable-error-code="override"

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import Work
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    ReduceScatterOptions,
)
from torch.futures import Future

from torchft.errors import SettingsError
from torchft.process_group.base import AnyAllreduceOptions, ProcessGroup
from torchft.untraced import untraced
from torchft.work import _DummyWork

__all__ = ["ProcessGroupDummy"]


class _CountedWork(_DummyWork):
    def __init__(self, group: ProcessGroupDummy, result: Any) -> None:
        super().__init__(result)
        self._group = group

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._group.wait_count += 1
        return super().wait(timeout)

    def get_future(self) -> Future[Any]:
        self._group.get_future_count += 1
        return super().get_future()


class ProcessGroupDummy(ProcessGroup):
    """One member, whose inputs are its outputs. It takes only `rank` 0 and `world` 1."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        if (rank, world) != (0, 1):
            raise SettingsError(f"a dummy is rank 0 of 1, not rank {rank} of {world}")
        super().__init__(rank, world)
        self.configure_count = 0
        self.wait_count = 0
        self.get_future_count = 0

    def configure(self, *members: Any, **more: Any) -> None:
        """Counted; the members stay this one."""
        self.configure_count += 1

    def abort(self) -> None:
        """Do nothing, since no operation is ever pending."""

    def shutdown(self) -> None:
        """Do nothing, since there is nothing to free."""

    def set_timeout(self, timeout: timedelta) -> None:
        """Do nothing, since no operation ever waits."""

    def size(self) -> int:
        """1, since the process is its only member."""
        return 1

    def getBackendName(self) -> str:
        """The name of its backend, `torchft-dummy`."""
        return "torchft-dummy"

    @untraced  # by torch's DistributedDataParallel, in the backward pass
    def allreduce(self, tensors: list[Tensor], opts: AnyAllreduceOptions | None = None) -> Work:
        return self._done(tensors)

    def allreduce_coalesced(
        self, tensors: list[Tensor], opts: AllreduceCoalescedOptions | None = None
    ) -> Work:
        return self._done(tensors)

    def allgather(
        self,
        output_tensors: list[list[Tensor]],
        input_tensor: list[Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        for outputs, tensor in zip(output_tensors, input_tensor, strict=True):
            outputs[0].copy_(tensor)
        return self._done(output_tensors)

    def allgather_into_tensor_coalesced(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        opts: AllgatherOptions | None = None,
    ) -> Work:
        return self._copied(output_tensors, input_tensors)

    def alltoall_base(
        self,
        output_buffer: Tensor,
        input_buffer: Tensor,
        output_split_sizes: list[int],
        input_split_sizes: list[int],
        opts: AllToAllOptions | None = None,
    ) -> Work:
        return self._copied([output_buffer], [input_buffer])

    def barrier(self, opts: BarrierOptions | None = None) -> Work:
        return self._done(None)

    @untraced  # by torch's DistributedDataParallel, of buffers
    def broadcast(self, tensor_list: list[Tensor], opts: BroadcastOptions | None = None) -> Work:
        return self._done(tensor_list)

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int) -> Work:
        return self._done(None)

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int) -> Work:
        return self._done(tensors)

    def reduce_scatter(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[list[Tensor]],
        opts: ReduceScatterOptions | None = None,
    ) -> Work:
        return self._copied(output_tensors, [inputs[0] for inputs in input_tensors])

    def reduce_scatter_tensor_coalesced(
        self,
        output_tensors: list[Tensor],
        input_tensors: list[Tensor],
        opts: ReduceScatterOptions | None = None,
    ) -> Work:
        return self._copied(output_tensors, input_tensors)

    def _copied(self, outputs: list[Tensor], inputs: list[Tensor]) -> Work:
        for output, tensor in zip(outputs, inputs, strict=True):
            output.copy_(tensor)
        return self._done(outputs)

    def _done(self, result: Any) -> Work:
        return _CountedWork(self, result)
