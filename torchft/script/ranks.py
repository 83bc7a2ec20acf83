"""Where a process stands in the job, and the ranks of its replica group among themselves.

A group is one trainer, however many ranks it has. torchrun's store lives as long as its agent, so
after a restart of the workers it still holds the addresses of those that are gone, and torch's own
rendezvous connects to them. Here each attempt meets under a name of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed, nn

from torchft import settings
from torchft.script.command import require_torchrun, show_events, which_group
from torchft.timeouts import inside_group

__all__ = ["JobRank", "average_inside", "first_rank_says", "meet_inside"]


@dataclass(frozen=True)
class JobRank:
    """Which group of how many, and which rank of how many in it, this process is."""

    group: int
    groups: int
    rank: int
    ranks: int

    @classmethod
    def join(cls, timeout: timedelta) -> JobRank:
        """Read torchrun's variables and meet the other ranks of the group; quorums are logged.

        Exits with the lines to type where torchrun or the lighthouse's address is missing.

        Args:
            timeout: the deadline between groups; ranks of a group wait longer for each other.

        Raises:
            SettingsError: REPLICA_GROUP_ID or NUM_REPLICA_GROUPS is not such a number.
        """
        require_torchrun()
        show_events()
        group, groups = which_group()
        rank, ranks = meet_inside(timeout)
        return cls(group, groups, rank, ranks)

    @property
    def shard(self) -> int:
        """The part of the data that this rank reads, from 0 to `shards` - 1."""
        return self.group * self.ranks + self.rank

    @property
    def shards(self) -> int:
        """How many parts the data has: one for each rank of each group."""
        return self.groups * self.ranks

    def device(self) -> torch.device:
        """Return a CUDA device for each group where there is one, else the CPU with few threads."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.group % torch.cuda.device_count())
        torch.set_num_threads(settings.integer("OMP_NUM_THREADS", 1))
        return torch.device("cpu")


def meet_inside(timeout: timedelta) -> tuple[int, int]:
    """Make torch's default process group, over gloo, of a group of several ranks.

    `timeout` is the deadline between groups; that of this process group follows from it
    (`torchft.timeouts`): the ranks of a group wait longer for each other than for other groups.

    Returns the rank and their number, and does nothing more where that is 1.

    Raises:
        SettingsError: not started by torchrun.
        RuntimeError: the ranks do not meet within `timeout`.
    """
    why = "start this by torchrun"
    rank, ranks = (int(settings.required(name, why)) for name in ("RANK", "WORLD_SIZE"))
    if ranks > 1:
        address, port = (settings.required(f"MASTER_{name}", why) for name in ("ADDR", "PORT"))
        store = distributed.TCPStore(
            address, int(port), is_master=False, timeout=inside_group(timeout)
        )
        attempt = settings.integer("TORCHELASTIC_RESTART_COUNT", 0)
        distributed.init_process_group(
            "gloo",
            store=distributed.PrefixStore(f"inside/{attempt}", store),
            rank=rank,
            world_size=ranks,
            timeout=inside_group(timeout),
        )
    return rank, ranks


def average_inside(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks of this group, in one collective."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def first_rank_says(yes: bool) -> bool:
    """Return rank 0's answer on each rank of the group; all must ask, since their clocks differ."""
    if not distributed.is_initialized():
        return yes
    answer = torch.tensor([yes])
    distributed.broadcast(answer, src=0)
    return bool(answer.item())
