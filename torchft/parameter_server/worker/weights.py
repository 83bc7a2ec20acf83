"""A worker's weights against the base that it shares with the server.

    base b     what the server last sent, fp32 on the CPU: 4 bytes a parameter
    sent d     what the server understood of the delta b - w: the encoding, decoded
    adopt      w ← b' + (w - b + d)

The bracket is what the server does not know yet: the steps taken since the submission, and what the
encoding lost. It stays in the weights and so is part of the next delta; nothing is lost, and no
residual takes memory. When no step was taken and nothing was lost it is exactly zero.

With `mix` a worker keeps a share of its own: w ← mix · w + (1 - mix) · (b' + …).

A parameter of a smaller dtype, bf16 or fp16, sees b rounded to it, and deltas are measured from
there. What of the bracket its dtype cannot hold is kept beside it, in bf16, and is part of the next
delta too. That takes 2 bytes a parameter, from the first time on that there is any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from torchft.checkpointing.memory import fresh_memory
from torchft.parameter_server.core.chunks import Chunks, checksum_of, identity_from, identity_of
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.core.weight_update import UpdateKind
from torchft.parameter_server.worker.ranks import ALONE, Ranks
from torchft.parameter_server.worker.row_view import RowView
from torchft.parameter_server.worker.sharded import complete, write_shard
from torchft.quantization import Codec, Identity
from torchft.sharded import is_sharded
from torchft.strategies.parts.deltas import rounding_lost

__all__ = ["WorkerWeights"]


class WorkerWeights:
    """The parameters of one worker, by fragment."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], shape: ModelShape, ranks: Ranks = ALONE
    ) -> None:
        self.shape = shape
        self._parameters, self._ranks = parameters, ranks
        self._sharded = any(map(is_sharded, parameters.values()))
        self._bases: dict[int, Tensor] = {}
        self._hidden: dict[int, Tensor] = {}
        """By fragment, `[1, n]`: what the parameters' dtype cannot hold of what the server does not
        know yet. A fragment that is not there has none."""
        self._outboxes: dict[int, memoryview] = {}

    @torch.no_grad()
    def row(self, fragment: int) -> Tensor:
        """The weights of a fragment as they are now, fp32 `[1, n]` on the CPU."""
        if self._sharded:
            self._ranks.say("read", fragment)
        row = self.shape.new_row(fragment)
        for name, view in self.shape.views(fragment, row).items():
            view.copy_(complete(self._parameters[name].detach()))
        return row

    @torch.no_grad()
    def read_along(self, fragment: int) -> None:
        """The other ranks' part of `row`."""
        for parameter in self.shape.of_fragment(fragment):
            complete(self._parameters[parameter.name].detach())

    @torch.no_grad()
    def write_along(self, fragment: int) -> None:
        """The other ranks' part of every writing."""
        for parameter in self.shape.of_fragment(fragment):
            new = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            self._ranks.broadcast(new)
            write_shard(self._parameters[parameter.name].detach(), new)

    @property
    def bases(self) -> dict[int, Tensor]:
        """Fragment → what the server last sent of it, fp32 `[1, n]`: not a copy."""
        return dict(self._bases)

    def identity(self, fragment: int) -> str:
        """The identity of the fragment's base, as the server computes it."""
        return identity_of(self._bases[fragment])

    @torch.no_grad()
    def encode(self, fragment: int, chunks: Chunks) -> list[memoryview]:
        """The delta, as chunks, which last until the next one of this fragment is encoded."""
        view, room = self._view(fragment), chunks.numbers()
        row = self._outbox(fragment, chunks.nbytes)
        for index, span in chunks.spans():
            delta = self._delta(fragment, view, span, room)
            chunks.encode_into(chunks.part(index, row), index, delta)
        return [chunks.part(index, row) for index in range(chunks.count)]

    @torch.no_grad()
    def apply(
        self,
        fragment: int,
        sent: Sequence[memoryview],
        update: Sequence[tuple[UpdateKind, Path]],
        codec: Codec,
        mix: float = 0.0,
    ) -> str:
        """Make the new base of the files of an update, and the weights of it.

        Args:
            sent: the chunks that `encode` gave for the submission which the update answers.
            mix: the share of its own weights that the worker keeps.

        Returns:
            The identity of the new base; another one than the server's if something was damaged.
        """
        view, base = self._view(fragment), self._bases[fragment]
        chunks, checksums = Chunks(base.shape[1], codec), []
        read, room = _reader(chunks, update), chunks.numbers()
        for index, span in chunks.spans():
            beyond = self._delta(fragment, view, span, room).neg_()
            chunks.add(index, sent[index], beyond)
            read(index, base[:, span])
            checksums.append(checksum_of(index, base[:, span]))
            self._write_beyond(fragment, view, span, beyond, mix)
        view.close()
        return identity_from(checksums)

    def load(self, fragment: int, update: Sequence[tuple[UpdateKind, Path]], codec: Codec) -> None:
        """Read a complete base from the files of an update; the weights stay as they are."""
        base = self._bases[fragment] = self.shape.new_row(fragment)
        chunks = Chunks(base.shape[1], codec)
        read = _reader(chunks, update)
        for index, span in chunks.spans():
            read(index, base[:, span])

    @torch.no_grad()
    def beyond_base(self, fragment: int) -> Tensor:
        """What the weights have that the base has not, `[1, n]`."""
        base = self._bases[fragment]
        room = torch.empty_like(base)
        return self._delta(fragment, self._view(fragment), _all_of(base), room).neg_()

    @torch.no_grad()
    def restore(self, fragment: int, beyond: Tensor | None = None) -> None:
        """Set the weights to the base, and add `beyond`, `[1, n]`, where it is given."""
        base, view = self._bases[fragment], self._view(fragment, read=False)
        self._hidden.pop(fragment, None)
        if beyond is None:
            view.write(_all_of(base), base)
        else:
            self._write_beyond(fragment, view, _all_of(base), beyond)
        view.close()

    # ------------------------------------------------------------------ how

    def _delta(self, fragment: int, view: RowView, span: slice, room: Tensor) -> Tensor:
        """What the server does not know yet, negated: base - weights - hidden, in `room`."""
        base = self._bases[fragment][:, span]
        delta = view.delta(span, base, room[:, : base.shape[1]])
        if fragment in self._hidden:
            delta.sub_(self._hidden[fragment][:, span])
        return delta

    def _write_beyond(
        self, fragment: int, view: RowView, span: slice, beyond: Tensor, mix: float = 0.0
    ) -> None:
        """Base and `beyond` become the weights, rounded once; what that hides is remembered."""
        base = self._bases[fragment][:, span]
        if view.is_exact:
            view.write(span, base + beyond, mix)
            return
        if mix:
            beyond.lerp_(view.delta(span, base, torch.empty_like(base)).neg_(), mix)
        view.write(span, base + beyond)
        hidden = rounding_lost(base, beyond, partial(view.rounded, span))
        if fragment not in self._hidden and hidden.any():
            shape = self._bases[fragment].shape
            self._hidden[fragment] = torch.zeros(shape, dtype=torch.bfloat16, device="cpu")
        if fragment in self._hidden:
            self._hidden[fragment][:, span] = hidden

    def _outbox(self, fragment: int, nbytes: int) -> memoryview:
        """Kept, since to take fresh memory takes longer than to encode into it."""
        if fragment not in self._outboxes:
            self._outboxes[fragment] = fresh_memory(nbytes)
        return self._outboxes[fragment]

    def _view(self, fragment: int, *, read: bool = True) -> RowView:
        """The parameters as a row; of several ranks it is gathered, unless it is only written."""
        parameters = [
            self._parameters[one.name].detach() for one in self.shape.of_fragment(fragment)
        ]
        if self._ranks.alone and not self._sharded:
            return RowView.of(parameters)
        row = self.row(fragment) if read else self.shape.new_row(fragment)
        flats = [view.view(-1) for view in self.shape.views(fragment, row).values()]
        return RowView(flats, [p.dtype for p in parameters], partial(self._write, fragment, row))

    @torch.no_grad()
    def _write(self, fragment: int, row: Tensor) -> None:
        self._ranks.say("write", fragment)
        for name, view in self.shape.views(fragment, row).items():
            self._ranks.broadcast(view)
            write_shard(self._parameters[name].detach(), view)


def _all_of(row: Tensor) -> slice:
    return slice(0, row.shape[1])


def _reader(
    chunks: Chunks, update: Sequence[tuple[UpdateKind, Path]]
) -> Callable[[int, Tensor], None]:
    """A function that reads chunk by chunk: each file of an update changes the numbers."""
    full = Chunks(chunks.n, Identity())
    kinds = [(kind, full if kind is UpdateKind.FULL else chunks, path) for kind, path in update]
    memory = full.memory()

    def read(index: int, part: Tensor) -> None:
        for kind, of_kind, path in kinds:
            data = of_kind.read_one(path, index, memory)
            change = of_kind.decode if kind is UpdateKind.FULL else of_kind.add
            change(index, data, part)

    return read
