"""What the stories of sharded models have in common: a group whose ranks share one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # here, not in each of the groups, which are forked: it takes seconds
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from world import Group

from torchft.checkpointing import CheckpointTransport, HTTPTransport
from torchft.checkpointing.pg_transport import PGTransport
from torchft.ddp import DistributedDataParallel
from torchft.digest import digest
from torchft.optim import OptimizerWrapper

__all__ = ["RANKS", "Sharded", "mesh_of_group", "net", "shard", "transport_of"]

RANKS = 2


def mesh_of_group(
    group: Group, names: tuple[str, ...] = ("fsdp",), shape: tuple[int, ...] = (RANKS,)
) -> DeviceMesh:
    """A mesh over the ranks of this group, made as in any script."""
    if not dist.is_initialized():
        store = dist.PrefixStore("in the group", group._store)
        dist.init_process_group("gloo", store=store, rank=group.rank, world_size=RANKS)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def net() -> nn.Sequential:
    """Rows that do not divide evenly; the last layer's one row leaves a rank with nothing of it."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))


def shard(group: Group, model: nn.Module) -> nn.Module:
    """`model` with its first layer and the rest of it sharded by FSDP2, each in one piece."""
    mesh = mesh_of_group(group)
    fully_shard(next(model.children()), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


class Sharded:
    """A trainer whose model is sharded over this group's ranks. `make` is given the group, and
    returns the model, which `wrap` wraps with `options`."""

    def __init__(
        self,
        group: Group,
        make: Callable[[Group], nn.Module] = lambda group: shard(group, net()),
        *,
        wrap: Callable[..., Any] = DistributedDataParallel,
        transport: str = "http",
        asynchronous: bool = False,
        **options: Any,
    ) -> None:
        self.group = group
        mesh_of_group(group)
        torch.manual_seed(group.number)  # each begins with weights of its own
        self.model = make(group)
        self.inner = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.manager = group.manager(
            state_dict=self.state_dict,
            load_state_dict=self.load_state_dict,
            use_async_quorum=asynchronous,
            checkpoint_transport=transport_of(self, group, transport),
        )
        self.wrapped = wrap(self.manager, self.model, **options)
        self.optimizer = OptimizerWrapper(self.manager, self.inner)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.inner.load_state_dict(state["optimizer"])

    def batch(self) -> Tensor:
        """The samples of this rank in the step that runs."""
        seed = 1000 * self.manager.current_step() + RANKS * self.group.number + self.group.rank
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))

    def backward(self) -> None:
        self.wrapped(self.batch()).square().sum().backward()

    def step(self) -> bool:
        self.optimizer.zero_grad()
        self.backward()
        return self.optimizer.step()

    def until(self, step: int) -> str:
        """Train up to that step; the digest of this rank's part."""
        while self.manager.current_step() < step:
            self.step()
        return self.digest()

    def digest(self) -> str:
        return digest(self.state_dict())

    def meet(self, groups: int = 2) -> None:
        """Step until so many groups are counted; all see it in the same quorum."""
        while self.manager.num_participants() < groups:
            self.step()


def transport_of(one: Sharded, group: Group, kind: str) -> CheckpointTransport[Any]:
    """State travels over "http", a "process group", or that one "in place"."""
    if kind == "http":
        return HTTPTransport(timeout=group.pg._timeout, num_chunks=0)
    where: dict[str, Callable[[], Any]] = (
        {"state_dict": lambda: {"user": {"default": one.state_dict()}, "torchft": {}}}
        if kind == "in place"
        else {}
    )
    return PGTransport(group.pg, timeout=group.pg._timeout, device=torch.device("cpu"), **where)
