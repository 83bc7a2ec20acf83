"""A kind of process group from outside of the package, which says only how its backend is made."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import Rank, ranks
from helpers.threads import Group, groups
from steps import step
from torch.distributed import ReduceOp, Store
from torch.distributed.distributed_c10d import AllgatherOptions
from world import Group as Process
from world import World

from torchft.errors import SharedDeviceError
from torchft.process_group import ProcessGroupWrapper
from torchft.process_group.rendezvous import Member, Seat

LONG = timedelta(seconds=30)


class _VendorGroup(ProcessGroupWrapper):
    """Torch's gloo, as a vendor would bring its own backend."""

    def _create_pg(self, store: Store, rank: int, world_size: int) -> dist.ProcessGroup:
        backend = dist.ProcessGroupGloo(store, rank, world_size, self._timeout)
        group = dist.ProcessGroup(store, rank, world_size)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        return group

    def getBackendName(self) -> str:
        return "vendor"


def _train(group: Group) -> list[float]:
    """The averages of its committed steps, of which group 0 spoils the second once."""
    pg = _VendorGroup(LONG)
    group.undo.callback(pg.shutdown)
    manager = group.manager(pg=pg)
    averages, spoilt = [], False
    while manager.current_step() < 3:
        manager.start_quorum()
        tensor = torch.full((3,), float(group.number + 1))
        if manager.current_step() == 1 and group.number == 0 and not spoilt:
            manager.wait_quorum()
            manager.report_error(RuntimeError("a fault on purpose: the group is made anew"))
            spoilt = True
        manager.allreduce(tensor).wait()
        if manager.should_commit():
            averages.append(tensor.mean().item())
    return averages


def test_a_kind_with_create_pg_only_serves_a_manager_and_is_made_anew_after_a_fault() -> None:
    assert groups(2, _train) == [[1.5] * 3] * 2


def _use_what_a_torch_group_has_and_a_backend_has_not(rank: Rank) -> None:
    group = _VendorGroup(rank.timeout)
    group.configure(f"{rank.store}/vendor", f"replica_{rank.rank}", rank.rank, 2)
    mine = torch.full((4,), float(rank.rank + 1))
    flat = torch.empty(8)
    group.allgather_into_tensor_coalesced([flat], [mine], AllgatherOptions()).wait()
    part = torch.empty(2)
    group.reduce_scatter_tensor_coalesced([part], [mine]).wait()
    group.allreduce([mine], ReduceOp.SUM).wait()
    group.barrier().wait()
    group.shutdown()
    rank.tell((flat.tolist(), part.tolist(), mine.tolist()))


def test_collectives_of_a_torch_group_are_called_as_they_are() -> None:
    with ranks(2, _use_what_a_torch_group_has_and_a_backend_has_not) as world:
        for heard in world.hear_all():
            assert heard == ([1.0] * 4 + [2.0] * 4, [3.0] * 2, [3.0] * 4)


class _OnOneDevice(_VendorGroup):
    """Each member says that it has the same device."""

    def _member(self, seat: Seat) -> Member:
        return Member.here(seat, None, "GPU-a")


def test_of_two_groups_on_one_device_the_later_leaves_and_the_other_goes_on(
    tmp_path: Path,
) -> None:
    def stays(group: Process) -> int:
        manager = group.manager(pg=_OnOneDevice(LONG))
        while not (group.world.happened("left") and step(manager, 1.0)[0]):
            step(manager, 1.0)
        return manager.num_participants()

    def leaves(group: Process) -> str:
        manager = group.manager(pg=_OnOneDevice(LONG))
        with pytest.raises(SharedDeviceError) as raised:
            step(manager, 1.0)
        manager.shutdown()
        group.world.happen("left")
        return str(raised.value)

    left, said = World(tmp_path).run(stays, leaves)
    assert left == 1
    assert "group_1" in said and "is on the same device as rank 0" in said
