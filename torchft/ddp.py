"""Gradients averaged over the replica groups that are there, whoever comes and goes.

`DistributedDataParallel` is torch's own, which packs gradients into buckets during the backward
pass, with the manager's all-reduce in place of a fixed process group's. The average of a bucket
completes by itself, so communication overlaps the rest of the backward pass.
`PureDistributedDataParallel` does the same without torch's: one all-reduce per parameter at the end
of each backward pass.

With `should_quantize` gradients travel encoded. The first half of such an average, in which members
exchange chunks, overlaps the backward pass as well. The second half is done by who waits, in one
order everywhere, and so at the end of that pass.

Neither sends initial weights: a group that is new gets them by healing.
"""

# No postponed annotations in this file: torch reads those of the hook.

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed import GradBucket, Work
from torch.futures import Future
from torch.nn import parallel

from torchft.errors import SettingsError
from torchft.futures import future_on
from torchft.process_group import ProcessGroupDummy
from torchft.quantization import Codec, codec_for
from torchft.quantization.proof import prove
from torchft.uncopied import Uncopied
from torchft.untraced import untraced

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["DistributedDataParallel", "PureDistributedDataParallel"]


class DistributedDataParallel(Uncopied, parallel.DistributedDataParallel):
    """torch's DistributedDataParallel among replica groups. `kwargs` are torch's.

    `should_quantize` is that of `Manager.allreduce`: False, True, or a codec or its name. Groups
    compare its name when they meet.

    Raises:
        SettingsError: a keyword that cannot hold while groups come and go; no such codec, or one
            that cannot hold a parameter's dtype.
    """

    copy_instead = "copy its .module, and wrap the copy if it is to be trained"

    def __init__(
        self,
        manager: "Manager",
        module: nn.Module,
        *,
        should_quantize: bool | str | Codec = False,
        **kwargs: Any,
    ) -> None:
        _refuse(kwargs)
        kwargs["find_unused_parameters"] = True
        codec = _codec(manager, module, should_quantize)
        manager.describe_model("DistributedDataParallel", list(module.named_parameters()))
        super().__init__(module, process_group=ProcessGroupDummy(0, 1), **kwargs)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.register_comm_hook(_Buckets(manager, codec, names), _average)


class _Buckets:
    """The averages of one backward pass. They are waited for at its end, before torch does, so
    that the wait is booked as communication."""

    def __init__(self, manager: "Manager", codec: Codec | None, names: dict[int, str]) -> None:
        self._manager = manager
        self._codec = codec
        self._names = names
        """Of the parameters, by their id."""
        self._works: list[tuple[Work, Future[Tensor], Tensor]] = []
        self._backward = -1

    def average(self, buffer: Tensor, parameters: Sequence[Tensor]) -> Future[Tensor]:
        """`buffer` holds the gradients of `parameters`, one after the other."""
        backward = torch._C._current_graph_task_id()
        if self._backward != backward:
            self._backward = backward
            self._works = []
            Variable._execution_engine.queue_callback(self._wait)
        work = self._manager.allreduce(
            buffer, should_quantize=self._codec or False, name=partial(self._parts, parameters)
        )
        # An encoded average is finished by who waits: its future is ours to complete.
        future = work.get_future() if self._codec is None else future_on(buffer)
        self._works.append((work, future, buffer))
        return future

    def _parts(self, parameters: Sequence[Tensor], buffer: Tensor) -> dict[str, Tensor]:
        names = [self._names.get(id(parameter), "a parameter") for parameter in parameters]
        pieces = buffer.split([parameter.numel() for parameter in parameters])
        return dict(zip(names, pieces, strict=True))

    @untraced
    def _wait(self) -> None:
        works, self._works = self._works, []
        for work, future, buffer in works:
            work.wait()
            if self._codec is not None:
                future.set_result(buffer)


@untraced
def _average(state: _Buckets, bucket: GradBucket) -> Future[Tensor]:
    """A bucket's average. torch requires these argument names."""
    return state.average(bucket.buffer(), bucket.parameters())


def _codec(
    manager: "Manager", module: nn.Module, should_quantize: bool | str | Codec
) -> Codec | None:
    """What gradients are encoded with. The other groups are told, before anything is mixed."""
    trained = [p for p in module.parameters() if p.requires_grad]
    codec = codec_for(should_quantize, trained[0].device) if trained else None
    if codec is not None:
        for dtype, device in {(parameter.dtype, parameter.device) for parameter in trained}:
            prove(codec, dtype, device)
        manager.describe_setting("codec", codec.name)
    return codec


def _refuse(kwargs: dict[str, Any]) -> None:
    if "process_group" in kwargs:
        raise SettingsError("the process group is the manager's: leave process_group out")
    if kwargs.get("find_unused_parameters") is False:
        # Otherwise torch rebuilds its buckets after the first step of a process, so that a group
        # that was restarted would average other buckets than those that kept running.
        raise SettingsError("find_unused_parameters must stay True: it keeps the buckets fixed")


class PureDistributedDataParallel(Uncopied, nn.Module):
    """Averages each parameter's gradient when a backward pass ends; one all-reduce per parameter.

    A parameter that got no gradient here sends zeros, since another group may have used it. Weights
    that several calls of backward accumulate into are averaged each time: the sum of averages is
    the average of sums. `should_quantize` is that of `DistributedDataParallel`.
    """

    copy_instead = "copy its .module, and wrap the copy if it is to be trained"

    def __init__(
        self,
        manager: "Manager",
        module: nn.Module,
        *,
        should_quantize: bool | str | Codec = False,
    ) -> None:
        super().__init__()
        self.module = module
        self._manager = manager
        self._codec = _codec(manager, module, should_quantize)
        self._queued_in = -1
        manager.describe_model("PureDistributedDataParallel", list(module.named_parameters()))
        for _, parameter in self._trained():
            parameter.register_post_accumulate_grad_hook(self._when_backward_ends)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
        return self.module(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's, without a prefix."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Into the module."""
        return self.module.load_state_dict(*args, **kwargs)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    @untraced
    def _when_backward_ends(self, _: Tensor) -> None:
        backward = torch._C._current_graph_task_id()
        if self._queued_in != backward:
            self._queued_in = backward
            Variable._execution_engine.queue_callback(self._average)

    @untraced
    @torch.no_grad()
    def _average(self) -> None:
        """In the order of the parameters, which is the same in every group."""
        works = []
        for name, parameter in self._trained():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            works.append(
                self._manager.allreduce(
                    parameter.grad, should_quantize=self._codec or False, name=name
                )
            )
        for work in works:
            work.wait()
