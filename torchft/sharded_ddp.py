"""Gradients of a sharded model, averaged among replica groups in buckets.

FSDP2 (or tensor parallelism) cuts the parameters over the ranks of a group, and reduces gradients
inside of it. What each rank holds of them then is averaged with the same rank of the other groups:
post-accumulate-grad hooks, which FSDP2 calls after its reduce-scatter, fill buckets in the order in
which gradients most likely come. A bucket travels as soon as it and those before it are full, so
that communication overlaps the rest of the backward pass; the rest of them when that pass ends,
which waits for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import Work

from torchft.arguments import check_number
from torchft.errors import SettingsError
from torchft.gradients import GradientAverager
from torchft.pure_ddp import PureDistributedDataParallel
from torchft.quantization import Codec
from torchft.sharded import gradient_part, local_part
from torchft.trained import Named

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["ShardedDataParallel"]

_MIB = 2**20
_WITHOUT_EFFECT = {
    "broadcast_buffers",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
}
"""torch's keywords that say how its reducer works, which is not used here."""


class ShardedDataParallel(PureDistributedDataParallel):
    """What `DistributedDataParallel` makes of a module whose parameters are DTensors: of FSDP2, of
    tensor parallelism, or of both. Some of them may be plain tensors.

    Shard first, then wrap, then make the optimizer of the module's parameters. All groups shard in
    the same way, over as many ranks, which they compare by name before anything is averaged. A
    parameter whose gradient is reduced twice in one backward pass, as where FSDP2 shards a module
    that is called twice, travels once more when the pass ends.

    Args:
        manager: of this rank; `use_async_quorum=False`, so that state is read and written between
            two steps alone.
        module: sharded already.
        bucket_cap_mb: MiB that travel in one collective, of this rank's parts.
        should_quantize: as in `DistributedDataParallel`.

    Raises:
        SettingsError: a keyword that does nothing here, gradients that are sparse, or a codec that
            does not exist or cannot hold a parameter's dtype.
    """

    def __init__(
        self,
        manager: Manager,
        module: nn.Module,
        *,
        should_quantize: bool | str | Codec = False,
        bucket_cap_mb: float | None = None,
        **without_effect: Any,
    ) -> None:
        nn.Module.__init__(self)
        for name in without_effect.keys() - _WITHOUT_EFFECT:
            raise SettingsError(f"{name} cannot be given with a sharded module: leave it out")
        cap_mb = 25.0 if bucket_cap_mb is None else bucket_cap_mb
        check_number("bucket_cap_mb", cap_mb, above=0)
        self._shards = _Shards(manager, module, should_quantize, cap_mb)
        self._serve(self._shards)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without averaging them among groups. FSDP2 reduces them inside the
        group all the same; its `set_requires_gradient_sync(False)` spares that, too, and then the
        last backward pass of a step must be made with True."""
        before, self._shards.averages = self._shards.averages, False
        try:
            yield
        finally:
            self._shards.averages = before


class _Shards(GradientAverager):
    """The averages of one backward pass, bucket by bucket.

    Attributes:
        averages: whether the backward pass that runs, or comes next, averages.
    """

    def __init__(
        self,
        manager: Manager,
        module: nn.Module,
        should_quantize: bool | str | Codec,
        cap_mb: float,
    ) -> None:
        # The name of what a group with plain parameters compares, so that it names the parameter.
        super().__init__("DistributedDataParallel", manager, module, should_quantize)
        self.averages = True
        self._cap_mb = cap_mb

    def follow(self) -> None:
        """As `GradientAverager`, and cut buckets."""
        super().follow()
        self._buckets = _cut(self.trained.named, self._cap_mb * _MIB)
        self._bucket_of = {
            id(parameter): at for at, bucket in enumerate(self._buckets) for _, parameter in bucket
        }
        self.description = {
            "bucket_cap_mb": self._cap_mb,
            "parameters": self.trained.description(),
        }
        self._begin_pass()

    def _begin_pass(self) -> None:
        self._missing = [{id(parameter) for _, parameter in bucket} for bucket in self._buckets]
        self._sent: list[tuple[Work, Tensor]] = []
        """The average and the memory of each bucket that travels, in their order."""
        self._once_more: set[int] = set()
        """Buckets that got another gradient after they had been sent."""

    def before_forward(self) -> None:
        """As `GradientAverager`; what a backward pass sent that raised is forgotten."""
        super().before_forward()
        if self.backward.unfinished:
            self._begin_pass()

    def gradient_arrives(self, parameter: Tensor) -> None:
        """As `GradientAverager`, and send the buckets that are full now."""
        super().gradient_arrives(parameter)
        if not self.averages:
            return
        at = self._bucket_of[id(parameter)]
        if at < len(self._sent):
            self._once_more.add(at)
            return
        self._missing[at].discard(id(parameter))
        while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
            self._send_next()

    def backward_ends(self, arrived: set[int]) -> None:
        """As `GradientAverager`: send the rest, and wait."""
        if arrived and self.averages:
            self.average_all()

    @torch.no_grad()
    def average_all(self) -> None:
        """As `GradientAverager`, without those of this backward pass that travel already."""
        self.has_local, self.has_averaged = False, True
        while len(self._sent) < len(self._buckets):
            self._send_next()
        for at, bucket in enumerate(self._buckets):
            work, flat = self._sent[at]
            work.wait()
            if at in self._once_more:
                work, flat = self._send(bucket)
                work.wait()
            for (_, parameter), mean in zip(bucket, _split(bucket, flat), strict=True):
                gradient_part(parameter).copy_(mean)
        self._begin_pass()

    def _send_next(self) -> None:
        self._sent.append(self._send(self._buckets[len(self._sent)]))

    @torch.no_grad()
    def _send(self, bucket: Sequence[Named]) -> tuple[Work, Tensor]:
        flat = torch.cat([gradient_part(parameter).reshape(-1) for _, parameter in bucket])
        return self.reduce(flat, partial(_named, bucket)), flat


def _cut(named: Sequence[Named], cap: float) -> list[list[Named]]:
    """The parameters in buckets of one dtype and device, each closed when this rank's parts in it
    have `cap` bytes. Gradients most likely come in the opposite order of the parameters."""
    buckets: list[list[Named]] = []
    opened: dict[object, tuple[list[Named], int]] = {}
    for name, parameter in reversed(named):
        part = local_part(parameter)
        kind = part.dtype, part.device
        bucket, size = opened.pop(kind, ([], 0))
        if not bucket:
            buckets.append(bucket)
        bucket.append((name, parameter))
        if size + part.nbytes < cap:
            opened[kind] = bucket, size + part.nbytes
    return buckets


def _split(bucket: Sequence[Named], flat: Tensor) -> list[Tensor]:
    parts = [local_part(parameter) for _, parameter in bucket]
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _named(bucket: Sequence[Named], flat: Tensor) -> dict[str, Tensor]:
    pieces = _split(bucket, flat)
    return {name: piece for (name, _), piece in zip(bucket, pieces, strict=True)}
