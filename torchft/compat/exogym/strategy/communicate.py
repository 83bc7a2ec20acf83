"""`exogym.strategy.communicate`: collectives among the processes of a run, on any device.

Tensors of devices that gloo cannot send (MPS) travel by way of the CPU. What is sent is counted in
`trainer.result`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from torchft.errors import SettingsError
from torchft.strategies.parts.precision import shared_dtype_of

__all__ = ["all_gather", "all_reduce", "broadcast"]


def all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """`tensor` becomes the sum (or what `op` says) over all nodes, in place."""
    _check_group("all_reduce")
    if tensor.numel():
        with _on_cpu(tensor) as travelling:
            dist.all_reduce(travelling, op=op)


def mean_over_nodes(tensor: Tensor, num_nodes: int) -> Tensor:
    """The mean of `tensor` over all nodes, added in fp32 at least; `tensor` stays as it is."""
    mean = tensor.detach().to(shared_dtype_of(tensor.dtype, torch.float32), copy=True)
    all_reduce(mean)
    return mean.div_(num_nodes)


def broadcast(tensor: Tensor, src: int = 0) -> None:
    """`tensor` becomes that of node `src`, in place."""
    _check_group("broadcast")
    if tensor.numel():
        with _on_cpu(tensor) as travelling:
            dist.broadcast(travelling, src=src)


def all_gather(
    tensor_list: list[Tensor],
    tensor: Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """`tensor_list` becomes every node's `tensor`, in the order of ranks, in place.

    Returns what to wait for if `async_op`, else None.
    """
    _check_group("all_gather")
    if tensor.device.type != "mps":
        return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)
    parts = [part.cpu() for part in tensor_list]
    dist.all_gather(parts, tensor.cpu(), group=group)
    for part, received in zip(tensor_list, parts, strict=True):
        part.copy_(received)
    return None


@contextmanager
def _on_cpu(tensor: Tensor) -> Iterator[Tensor]:
    """What travels in place of `tensor`, and is copied back."""
    direct = tensor.device.type != "mps" and tensor.is_contiguous()
    travelling = tensor.data if direct else tensor.data.cpu().contiguous()
    yield travelling
    if not direct:
        tensor.data.copy_(travelling)


def _check_group(name: str) -> None:
    if not dist.is_initialized():
        raise SettingsError(
            f"{name} talks to the other processes of a run, and this is none: call it in the "
            "strategy of a Trainer.fit(processes=True)"
        )
