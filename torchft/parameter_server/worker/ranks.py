"""The ranks of one worker: the first one speaks with the server, and the others do as it does.

    ranks.together(lead, {"write": write_along, …})

The first rank runs `lead`, which is what a worker alone would do. Wherever that needs the other
ranks it says so first (`say`), and they do their part of it until it is over. So whether, when and
with what a group synchronises is decided in one place, and no rank waits for what another does not
do. An error of the first rank is raised at all of them.

Words are JSON over a gloo group of these ranks' own, so that they work beside any backend, and
nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torchft.errors import MismatchError, SettingsError, TorchftError, UnreachableError
from torchft.parameter_server.core import refused

__all__ = ["ALONE", "Ranks"]

_OVER, _FAILED = "over", "failed"
_KINDS: list[type[TorchftError]] = [
    MismatchError,
    SettingsError,
    UnreachableError,
    refused.Refused,
    *refused.Refused.__subclasses__(),
]
_ERRORS = {kind.__name__: kind for kind in _KINDS}


class Ranks:
    """The ranks of one worker. `group` None: this process is alone, and nothing is communicated.

    `members` are the global ranks.
    """

    def __init__(self, group: Any, members: list[int]) -> None:
        self._group, self.members = group, members
        self.leads = group is None or dist.get_rank() == members[0]

    @classmethod
    def of(cls, group: Any, timeout_s: float) -> Ranks:
        """Those of `group`; None: of all, where torch.distributed is initialised.

        All ranks call this together. `timeout_s`: how long one of them may keep the others waiting.

        Raises:
            SettingsError: if this process is not in the group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise SettingsError("process_group: torch.distributed is not initialised")
            return ALONE
        members = sorted(dist.get_process_group_ranks(group))
        if dist.get_rank() not in members:
            raise SettingsError(
                f"rank {dist.get_rank()} is not in the process_group, which has {members}: make "
                "the worker only at its members"
            )
        if len(members) == 1:
            return cls(None, members)
        own = dist.new_group(
            members,
            timeout=timedelta(seconds=timeout_s),
            backend="gloo",
            use_local_synchronization=True,
        )
        return cls(own, members)

    @property
    def alone(self) -> bool:
        """Whether this process is the only rank."""
        return self._group is None

    def together(self, lead: Callable[[], Any], along: Mapping[str, Callable[..., None]]) -> None:
        """Run `lead` at the first rank, and at the others what it says.

        Raises:
            TorchftError: the error of the first rank, at all ranks.
        """
        if self.alone:
            lead()
        elif self.leads:
            self._lead(lead)
        else:
            self._follow(along)

    def say(self, what: str, *arguments: Any) -> None:
        """Tell the other ranks to do `what`; the first rank calls this in `lead`."""
        if self.alone:
            return
        data = json.dumps([what, *arguments]).encode()
        self.broadcast(torch.tensor([len(data)], device="cpu"))
        self.broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def broadcast(self, tensor: Tensor) -> None:
        """Send the first rank's `tensor`, contiguous and on the CPU, to all others."""
        if not self.alone and tensor.numel():
            dist.broadcast(tensor, self.members[0], self._group)

    def total(self, number: int) -> int:
        """Return the sum of `number` over all ranks."""
        if self.alone:
            return number
        sums = torch.tensor([number], device="cpu")
        dist.all_reduce(sums, group=self._group)
        return int(sums)

    def close(self) -> None:
        """Destroy the group of these ranks; all call this together."""
        if not self.alone:
            dist.destroy_process_group(self._group)

    def _lead(self, lead: Callable[[], Any]) -> None:
        try:
            lead()
        except BaseException as error:
            # If the others cannot be reached either, theirs is that error.
            with contextlib.suppress(RuntimeError):
                self.say(_FAILED, type(error).__name__, str(error))
            raise
        self.say(_OVER)

    def _follow(self, along: Mapping[str, Callable[..., None]]) -> None:
        while True:
            what, *arguments = self._hear()
            if what == _OVER:
                return
            if what == _FAILED:
                raise _error(*arguments)
            along[what](*arguments)

    def _hear(self) -> list[Any]:
        size = torch.tensor([0], device="cpu")
        self.broadcast(size)
        data = torch.empty(int(size), dtype=torch.uint8, device="cpu")
        self.broadcast(data)
        return list(json.loads(data.numpy().tobytes()))


def _error(name: str, text: str) -> TorchftError:
    kind = _ERRORS.get(name)
    return TorchftError(f"the first rank failed: {name}: {text}") if kind is None else kind(text)


ALONE = Ranks(None, [0])
"""A process that is a worker by itself."""
