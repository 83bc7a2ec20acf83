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
from torchft.parameter_server.core.chunks import Chunks, RowIdentity, identity_of
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.core.weight_update import UpdateKind
from torchft.parameter_server.worker.ranks import ALONE, Ranks
from torchft.parameter_server.worker.row_view import GatheredRowView, RowView
from torchft.parameter_server.worker.sharded import is_sharded, named_parameters, put, whole
from torchft.quantization import Codec, Identity

__all__ = ["WorkerWeights", "named_parameters"]


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
        """The weights as they are now, fp32 `[1, n]` on the CPU."""
        if self._sharded:
            self._ranks.say("read", fragment)
        row = torch.empty(1, self.shape.size(fragment), dtype=torch.float32, device="cpu")
        for name, view in self.shape.views(fragment, row).items():
            view.copy_(whole(self._parameters[name].detach()))
        return row

    @torch.no_grad()
    def read_along(self, fragment: int) -> None:
        """The other ranks' part of `row`."""
        for parameter in self.shape.of_fragment(fragment):
            whole(self._parameters[parameter.name].detach())

    @torch.no_grad()
    def write_along(self, fragment: int, mix: float) -> None:
        """The other ranks' part of every writing."""
        for parameter in self.shape.of_fragment(fragment):
            new = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            self._ranks.broadcast(new)
            put(self._parameters[parameter.name].detach(), new, mix)

    def base(self, fragment: int) -> Tensor | None:
        """What the server last sent."""
        return self._bases.get(fragment)

    def held(self, fragment: int) -> Tensor:
        """The same, where there is one."""
        return self._bases[fragment]

    def identity(self, fragment: int) -> str:
        """Of the base."""
        return identity_of(self._bases[fragment])

    @torch.no_grad()
    def encode(self, fragment: int, chunks: Chunks) -> list[memoryview]:
        """The delta, as chunks, which last until the next one of this fragment is encoded."""
        pieces, base = self._pieces(fragment), self._bases[fragment]
        row, delta = self._outbox(fragment, chunks.nbytes), _room(chunks)
        for index, span in chunks.spans():
            part = pieces.read(span, delta[:, : span.stop - span.start])
            torch.sub(pieces.rounded(span, base[:, span]), part, out=part)
            if fragment in self._hidden:
                part.sub_(self._hidden[fragment][:, span])
            chunks.encode_into(chunks.part(index, row), index, part)
        return [chunks.part(index, row) for index in range(chunks.count)]

    @torch.no_grad()
    def adopt(
        self,
        fragment: int,
        sent: Sequence[memoryview] | None,
        update: Sequence[tuple[UpdateKind, Path]],
        codec: Codec,
        mix: float = 0.0,
    ) -> str:
        """Make the new base of files of news, and the weights of it; returns the base's identity.

        `sent` None: nothing was submitted, or it was refused and is given up.
        """
        pieces, base = self._pieces(fragment), self._bases[fragment]
        chunks, identity = Chunks(base.shape[1], codec), RowIdentity()
        read, room = _reader(chunks, update), _room(chunks)
        for index, span in chunks.spans():
            part = base[:, span]
            kept = pieces.read(span, room[:, : part.shape[1]])
            before = None if pieces.is_exact or not mix else kept.clone()
            kept.sub_(pieces.rounded(span, part))
            if fragment in self._hidden:
                kept.add_(self._hidden[fragment][:, span])
            if sent is not None:
                chunks.add(index, sent[index], kept)
            read(index, part)
            identity.add(part)
            if pieces.is_exact:
                pieces.write(span, kept.add_(part), mix)
                continue
            if before is not None:
                kept.lerp_(before.sub_(pieces.rounded(span, part)), mix)
            self._write_rounded(fragment, pieces, span, kept)
        pieces.close()
        return str(identity)

    def load(self, fragment: int, update: Sequence[tuple[UpdateKind, Path]], codec: Codec) -> None:
        """The base from nothing; the weights stay."""
        n = self.shape.size(fragment)
        base = self._bases[fragment] = torch.empty(1, n, dtype=torch.float32, device="cpu")
        chunks = Chunks(n, codec)
        read = _reader(chunks, update)
        for index, span in chunks.spans():
            read(index, base[:, span])

    @torch.no_grad()
    def beyond_base(self, fragment: int) -> Tensor:
        """What the weights have that the base has not, `[1, n]`."""
        pieces, base = self._pieces(fragment), self._bases[fragment]
        everything = slice(0, base.shape[1])
        beyond = pieces.read(everything, torch.empty_like(base))
        beyond.sub_(pieces.rounded(everything, base))
        return beyond.add_(self._hidden[fragment]) if fragment in self._hidden else beyond

    @torch.no_grad()
    def settle(self, fragment: int, kept: Tensor | None = None) -> None:
        """The weights become the base, and `kept` on top."""
        base, pieces = self._bases[fragment], self._pieces(fragment)
        everything = slice(0, base.shape[1])
        self._hidden.pop(fragment, None)
        if kept is None or pieces.is_exact:
            pieces.write(everything, base if kept is None else base + kept)
        else:
            self._write_rounded(fragment, pieces, everything, kept)
        pieces.close()

    # ------------------------------------------------------------------ how

    def _write_rounded(
        self, fragment: int, pieces: RowView | GatheredRowView, span: slice, kept: Tensor
    ) -> None:
        """The base and `kept` become the weights, rounded once; what that hides is remembered."""
        base = self._bases[fragment][:, span]
        new = base + kept
        pieces.write(span, new)
        held = pieces.rounded(span, new).sub_(pieces.rounded(span, base))
        hidden = kept - held
        if fragment not in self._hidden and hidden.any():
            shape = self._bases[fragment].shape
            self._hidden[fragment] = torch.zeros(shape, dtype=torch.bfloat16, device="cpu")
        if fragment in self._hidden:
            self._hidden[fragment][:, span] = hidden

    def _outbox(self, fragment: int, nbytes: int) -> memoryview:
        """Kept: to take fresh memory and to give it back takes longer than encoding into it."""
        if fragment not in self._outboxes:
            self._outboxes[fragment] = fresh_memory(nbytes)
        return self._outboxes[fragment]

    def _pieces(self, fragment: int) -> RowView | GatheredRowView:
        parameters = [
            self._parameters[one.name].detach() for one in self.shape.of_fragment(fragment)
        ]
        if self._ranks.alone and not self._sharded:
            return RowView(parameters)
        return GatheredRowView(
            [(parameter.numel(), parameter.dtype) for parameter in parameters],
            partial(self.row, fragment),
            partial(self._write, fragment),
        )

    def _write(self, fragment: int, row: Tensor, mix: float) -> None:
        self._ranks.say("write", fragment, mix)
        for name, view in self.shape.views(fragment, row).items():
            self._ranks.broadcast(view)
            put(self._parameters[name].detach(), view, mix)


def _room(chunks: Chunks) -> Tensor:
    """For the numbers of the longest chunk."""
    return torch.empty(1, chunks.span(0).stop, dtype=torch.float32, device="cpu")


def _reader(
    chunks: Chunks, update: Sequence[tuple[UpdateKind, Path]]
) -> Callable[[int, Tensor], None]:
    """Reads chunk by chunk: each file of news changes the numbers that it is given."""
    whole = Chunks(chunks.n, Identity())
    kinds = [(kind, whole if kind is UpdateKind.FULL else chunks, path) for kind, path in update]
    memory = whole.memory()

    def read(index: int, part: Tensor) -> None:
        for kind, of_kind, path in kinds:
            data = of_kind.read_one(path, index, memory)
            change = of_kind.decode if kind is UpdateKind.FULL else of_kind.add
            change(index, data, part)

    return read
