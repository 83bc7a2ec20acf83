"""Gradients averaged over the replica groups that are there, whoever comes and goes.

`DistributedDataParallel` is torch's own, which packs gradients into buckets during the backward
pass, with the manager's all-reduce in place of a fixed process group's. The average of a bucket
completes by itself, so communication overlaps the rest of the backward pass.
`PureDistributedDataParallel` does the same without torch's: one all-reduce per parameter at the end
of each backward pass. Over a module that FSDP2 or tensor parallelism has sharded, the first of them
is `torchft.sharded_ddp`.

A parameter that got no gradient here sends zeros, and gets the average like any other: another
group may have used it. So all groups hold equal gradients after a backward pass, and a parameter
that nobody used has a gradient of zeros.

With `should_quantize` gradients travel encoded. The first half of such an average, in which members
exchange chunks, overlaps the backward pass as well. The second half is done by who waits, in one
order everywhere, and so at the end of that pass.

Neither sends initial weights: a group that is new gets them by healing.
"""

# No postponed annotations in this file: torch reads those of the hook.

import hashlib
import weakref
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
from torchft.gradients import GradientAverager
from torchft.process_group import ProcessGroupDummy
from torchft.process_group.base import AnyAllreduceOptions
from torchft.pure_ddp import PureDistributedDataParallel
from torchft.quantization import Codec
from torchft.sharded import is_sharded
from torchft.sharded_ddp import ShardedDataParallel
from torchft.uncopied import Uncopied
from torchft.untraced import untraced

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["DistributedDataParallel", "PureDistributedDataParallel"]

_REFUSED = {
    "process_group": "the process group is the manager's",
    "device_mesh": "the process group is the manager's",
    "mixed_precision": "it averages by itself: use torch.autocast, or should_quantize",
    "delay_all_reduce_named_params": "it averages inside the group alone",
    "param_to_hook_all_reduce": "it averages inside the group alone",
    "skip_all_reduce_unused_params": "what is unused here may be used in another group",
}
"""torch's keywords that cannot hold among replica groups, and why."""


class DistributedDataParallel(Uncopied, parallel.DistributedDataParallel):
    """torch's DistributedDataParallel among replica groups. `kwargs` are torch's.

    Parameters that a backward pass did not use are found when it ends. With
    `find_unused_parameters=True` torch looks for them before it, which takes a walk through the
    graph, and lets communication overlap the rest of the pass although some are unused. Buckets are
    cut once, so that a group that joins has those of the others; groups compare them.

    What is trained may change between two steps, in all groups alike: parameters that are
    unfrozen, frozen, added, replaced or resized are followed from the next step on.

    Of a module whose parameters are DTensors it makes a `ShardedDataParallel`, which is no instance
    of this class: torch's reducer knows plain tensors alone.

    `should_quantize` is that of `Manager.allreduce`: False, True, or a codec or its name. Groups
    compare its name when they meet.

    Raises:
        SettingsError: a keyword that cannot hold while groups come and go; a module whose
            gradients are sparse; no such codec, or one that cannot hold a parameter's dtype.
    """

    copy_instead = "copy its .module, and wrap the copy if it is to be trained"

    def __new__(cls, manager: "Manager", module: nn.Module, **kwargs: Any) -> Any:
        if not any(map(is_sharded, module.parameters())):
            return super().__new__(cls)
        if cls is not DistributedDataParallel:
            raise SettingsError(f"{cls.__name__} cannot wrap DTensors: use ShardedDataParallel")
        return ShardedDataParallel(manager, module, **kwargs)

    def __init__(
        self,
        manager: "Manager",
        module: nn.Module,
        *,
        should_quantize: bool | str | Codec = False,
        **kwargs: Any,
    ) -> None:
        for name in kwargs.keys() & _REFUSED.keys():
            raise SettingsError(f"{name} cannot be given: {_REFUSED[name]}")
        self._torch_finds_unused = bool(kwargs.get("find_unused_parameters", False))
        self._is_static = bool(kwargs.get("static_graph", False))
        averager = _Buckets(manager, module, should_quantize)
        super().__init__(module, process_group=_EverythingUsed(), **kwargs)
        self._averager = averager
        averager.serve(self)
        self.register_forward_pre_hook(_before_forward)
        self.register_forward_hook(_after_forward)
        manager.listeners.add(averager)
        averager.leave_with(self)

    def rebuild(self) -> None:
        """Have torch's reducer pack the gradients of the parameters that are trained now."""
        self._module_parameters = [
            p for n, p in self.module.named_parameters() if n not in self.parameters_to_ignore
        ]
        self.device = self._module_parameters[0].device
        # Before the next one is made: it holds what autograd knows of the parameters' shapes.
        del self.reducer
        self.logger = None
        parameters, sparse = self._build_params_for_reducer()
        names = self._build_debug_param_to_name_mapping(parameters)
        self._ddp_init_helper(parameters, sparse, names, self._is_static)
        if self._is_static:
            self._set_static_graph()
        self._comm_hooks.clear()
        self._averager.serve(self)

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        parameters, sparse = super()._build_params_for_reducer()
        if self.cuts_buckets_again:
            # Torch cuts buckets anew from the order in which gradients came in the first backward
            # pass. They most likely come in the opposite order of the parameters.
            parameters, sparse = parameters[::-1], sparse[::-1]
        self.reduced: list[nn.Parameter] = parameters
        return parameters, sparse

    @property
    def cuts_buckets_again(self) -> bool:
        """Whether torch would cut other buckets after the first backward pass of a process, so that
        a group that was restarted would average other ones than those that kept running."""
        return self._is_static or not self._torch_finds_unused

    @property
    def finds_unused(self) -> bool:
        """Whether torch sees by itself which parameters a backward pass does not use."""
        return self._is_static or self._torch_finds_unused


@untraced
def _before_forward(wrapped: DistributedDataParallel, _: Any) -> None:
    wrapped._averager.before_forward()


@untraced
def _after_forward(wrapped: DistributedDataParallel, _: Any, output: Any) -> None:
    wrapped._averager.backward.expect(output)


class _EverythingUsed(ProcessGroupDummy):
    """Says to torch's reducer, which sums up how many members used each parameter, that all are:
    it then hands out the average of those too that were not used here."""

    def allreduce(  # type: ignore[override]
        self, tensors: list[Tensor], opts: AnyAllreduceOptions | None = None
    ) -> Work:
        for tensor in tensors:
            tensor.fill_(1)
        return super().allreduce(tensors, opts)


class _Buckets(GradientAverager):
    """The averages of torch's buckets. They are waited for at the end of the backward pass, before
    torch does, so that the wait is booked as communication."""

    def __init__(
        self, manager: "Manager", module: nn.Module, should_quantize: bool | str | Codec
    ) -> None:
        ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
        kind = DistributedDataParallel.__name__
        super().__init__(kind, manager, module, should_quantize, ignored)
        self._works: list[tuple[Work, Future[Tensor], Tensor]] = []
        self._waits_in = -1
        self._count = self._reduced = 0
        self._torch_waits_now = False
        """In the first backward pass of a static graph nothing of ours runs before torch waits."""

    def serve(self, wrapped: DistributedDataParallel) -> None:
        """Average the buckets of `wrapped`, whose reducer is new."""
        self._wrapped = weakref.ref(wrapped)
        super().follow()
        if wrapped.cuts_buckets_again:
            wrapped.reducer._push_all_rebuilt_params()
            assert wrapped.reducer._rebuild_buckets(), "torch keeps the buckets it cut first"
        wrapped.register_comm_hook(weakref.ref(self), _average)
        buckets = wrapped.reducer._get_zeros_like_grad_buckets()
        self._count, self._reduced = len(buckets), 0
        self._names = {id(parameter): name for name, parameter in self.trained.named}
        self._works = []
        self._torch_waits_now = wrapped._is_static
        self.description = {
            "bucket_cap_mb": wrapped.bucket_bytes_cap / 2**20,
            "parameters": self.trained.description(),
            "sizes of the buckets": self._sizes(buckets),
        }

    def follow(self) -> None:
        """Have the wrapper made anew for the parameters that are trained now."""
        wrapped = self._wrapped()
        assert wrapped is not None, "a listener that nobody holds is not called"
        wrapped.rebuild()

    def before_forward(self) -> None:
        """As `GradientAverager`; after a backward pass that raised, torch would refuse it."""
        super().before_forward()
        if self.backward.unfinished:
            self.follow()

    def average(self, buffer: Tensor, parameters: Sequence[Tensor]) -> Future[Tensor]:
        """The average, to come, of a bucket: the gradients of `parameters`, one after the other."""
        self._reduced = (self._reduced + 1) % self._count
        self.has_local, self.has_averaged = self._reduced != 0, True
        work = self._reduce(buffer, parameters)
        # An encoded average is finished by who waits: its future is ours to complete.
        future = work.get_future() if self.codec is None else future_on(buffer)
        self._works.append((work, future, buffer))
        if self._torch_waits_now:
            self._wait()
            self._torch_waits_now = self.has_local
        else:
            self._wait_at_the_end()
        return future

    def _reduce(self, buffer: Tensor, parameters: Sequence[Tensor]) -> Work:
        return self.reduce(buffer, partial(self._parts, parameters))

    def _parts(self, parameters: Sequence[Tensor], buffer: Tensor) -> dict[str, Tensor]:
        pieces = buffer.split([parameter.numel() for parameter in parameters])
        return {self._names[id(p)]: piece for p, piece in zip(parameters, pieces, strict=True)}

    def _wait_at_the_end(self) -> None:
        """Of the pass that runs, which may be inside another: there torch waits as well."""
        task = torch._C._current_graph_task_id()
        if task != self._waits_in:
            self._waits_in = task
            Variable._execution_engine.queue_callback(self._wait)

    @untraced
    def _wait(self) -> None:
        works, self._works = self._works, []
        for work, future, buffer in works:
            work.wait()
            if self.codec is not None:
                future.set_result(buffer)

    def backward_ends(self, arrived: set[int]) -> None:
        """As `GradientAverager`: tell torch of those that were not used."""
        wrapped = self._wrapped()
        if wrapped is None or wrapped.finds_unused or len(arrived) == len(wrapped.reduced):
            return
        if any(parameter.requires_grad for parameter in wrapped.reduced):
            for index, parameter in enumerate(wrapped.reduced):
                if id(parameter) not in arrived:
                    wrapped.reducer._autograd_hook(index)  # type: ignore[attr-defined]

    @torch.no_grad()
    def average_all(self) -> None:
        """As `GradientAverager`, in the buckets of a backward pass."""
        wrapped = self._wrapped()
        assert wrapped is not None, "a listener that nobody holds is not called"
        buckets = wrapped.reducer._get_zeros_like_grad_buckets()
        works = []
        for bucket in buckets:
            for parameter, sent in zip(bucket.parameters(), bucket.gradients(), strict=True):
                if parameter.grad is not None:
                    sent.copy_(parameter.grad)
            works.append(self._reduce(bucket.buffer(), bucket.parameters()))
        for work, bucket in zip(works, buckets, strict=True):
            work.wait()
            for parameter, mean in zip(bucket.parameters(), bucket.gradients(), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(mean)

    def _sizes(self, buckets: list[GradBucket]) -> str:
        order = [[self._names[id(p)] for p in bucket.parameters()] for bucket in buckets]
        sizes = ", ".join(str(bucket.buffer().numel()) for bucket in buckets[:8])
        more = ", …" if len(buckets) > 8 else ""
        digest = hashlib.sha256(repr(order).encode()).hexdigest()[:8]
        return f"{len(buckets)} of {sizes}{more} elements, order {digest}"


@untraced
def _average(state: "weakref.ref[_Buckets]", bucket: GradBucket) -> Future[Tensor]:
    """A bucket's average. torch requires these argument names."""
    buckets = state()
    assert buckets is not None, "torch's reducer outlived its wrapper"
    return buckets.average(bucket.buffer(), bucket.parameters())
