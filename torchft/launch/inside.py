"""The ranks of one replica group among themselves: a group is one trainer, however many it has.

torchrun's store lives as long as its agent, so after a restart of the workers it still holds the
addresses of those that are gone, and torch's own rendezvous connects to them. Here each attempt
meets under a name of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import distributed, nn

from torchft import settings
from torchft.timeouts import inside_group

__all__ = ["average_inside", "first_rank_says", "meet_inside"]


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
    """Mean of the gradients over the ranks of this group, in place, as one flat tensor."""
    if not distributed.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def first_rank_says(yes: bool) -> bool:
    """What rank 0 of this group answers, on each rank; all must ask, for their clocks differ."""
    if not distributed.is_initialized():
        return yes
    answer = torch.tensor([yes])
    distributed.broadcast(answer, src=0)
    return bool(answer.item())
