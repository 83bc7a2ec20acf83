"""A worker's weights against the base that it shares with the server.

    base b     what the server last sent, fp32 on the CPU: 4 bytes a parameter
    sent d     what the server understood of the delta b - w: the encoding, decoded
    adopt      w ← b' + (w - b + d)

The bracket is what the server does not know yet: the steps taken since the submission, and what the
encoding lost. It stays in the weights and so is part of the next delta; nothing is lost, and no
residual takes memory. When no step was taken and nothing was lost it is exactly zero.

With `mix` a worker keeps a share of its own: w ← mix · w + (1 - mix) · (b' + …).

A parameter of a smaller dtype sees b rounded to it; deltas are measured from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from torchft.checkpointing.memory import fresh_memory
from torchft.errors import SettingsError
from torchft.parameter_server.chunks import Chunks, RowIdentity, identity_of
from torchft.parameter_server.pieces import Pieces
from torchft.parameter_server.shape import ModelShape
from torchft.parameter_server.shared import Kind
from torchft.quantization import Codec, Identity
from torchft.strategies.model_local import ModelLocal

__all__ = ["WorkerWeights", "named_parameters"]


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained: a tied weight once, no frozen ones, no buffers.

    Raises:
        SettingsError: there is nothing to train, or a parameter is sharded or no float.
    """
    local = ModelLocal([model])
    found = dict(zip(local.names, local.parameters, strict=True))
    for name, parameter in found.items():
        if hasattr(parameter, "to_local"):
            raise SettingsError(
                f"{name} is sharded: a worker of the parameter server needs it whole"
            )
    return found


class WorkerWeights:
    """The parameters of one process, by fragment."""

    def __init__(self, parameters: dict[str, nn.Parameter], shape: ModelShape) -> None:
        self.shape = shape
        self._parameters = parameters
        self._bases: dict[int, Tensor] = {}
        self._outboxes: dict[int, memoryview] = {}

    @torch.no_grad()
    def row(self, fragment: int) -> Tensor:
        """The weights as they are now, fp32 `[1, n]` on the CPU."""
        n = self.shape.size(fragment)
        return self._pieces(fragment).read(slice(0, n), torch.empty(1, n))

    def base(self, fragment: int) -> Tensor | None:
        """What the server last sent."""
        return self._bases.get(fragment)

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
            chunks.encode_into(chunks.part(index, row), index, part)
        return [chunks.part(index, row) for index in range(chunks.count)]

    @torch.no_grad()
    def adopt(
        self,
        fragment: int,
        sent: Sequence[memoryview] | None,
        news: Sequence[tuple[Kind, Path]],
        codec: Codec,
        mix: float = 0.0,
    ) -> str:
        """Make the new base of files of news, and the weights of it; returns the base's identity.

        `sent` None: nothing was submitted, or it was refused and is given up.
        """
        pieces, base = self._pieces(fragment), self._bases[fragment]
        chunks, identity = Chunks(base.shape[1], codec), RowIdentity()
        read, room = _reader(chunks, news), _room(chunks)
        for index, span in chunks.spans():
            part = base[:, span]
            kept = pieces.read(span, room[:, : part.shape[1]])
            kept.sub_(pieces.rounded(span, part))
            if sent is not None:
                chunks.add(index, sent[index], kept)
            read(index, part)
            identity.add(part)
            pieces.write(span, kept.add_(part), mix)
        pieces.close()
        return str(identity)

    def load(self, fragment: int, news: Sequence[tuple[Kind, Path]], codec: Codec) -> None:
        """The base from nothing; the weights stay."""
        n = self.shape.size(fragment)
        base = self._bases[fragment] = torch.empty(1, n)
        chunks = Chunks(n, codec)
        read = _reader(chunks, news)
        for index, span in chunks.spans():
            read(index, base[:, span])

    @torch.no_grad()
    def beyond_base(self, fragment: int) -> Tensor:
        """What the weights have that the base has not, `[1, n]`."""
        base = self._bases[fragment]
        whole = slice(0, base.shape[1])
        return self.row(fragment).sub_(self._pieces(fragment).rounded(whole, base))

    @torch.no_grad()
    def settle(self, fragment: int, kept: Tensor | None = None) -> None:
        """The weights become the base, and `kept` on top."""
        base, pieces = self._bases[fragment], self._pieces(fragment)
        pieces.write(slice(0, base.shape[1]), base if kept is None else base + kept)
        pieces.close()

    # ------------------------------------------------------------------ how

    def _outbox(self, fragment: int, nbytes: int) -> memoryview:
        """Kept: to take fresh memory and to give it back takes longer than encoding into it."""
        if fragment not in self._outboxes:
            self._outboxes[fragment] = fresh_memory(nbytes)
        return self._outboxes[fragment]

    def _pieces(self, fragment: int) -> Pieces:
        names = (parameter.name for parameter in self.shape.of_fragment(fragment))
        return Pieces([self._parameters[name].detach() for name in names])


def _room(chunks: Chunks) -> Tensor:
    """For the numbers of the longest chunk."""
    return torch.empty(1, chunks.span(0).stop)


def _reader(chunks: Chunks, news: Sequence[tuple[Kind, Path]]) -> Callable[[int, Tensor], None]:
    """Reads chunk by chunk: each file of news changes the numbers that it is given."""
    whole = Chunks(chunks.n, Identity())
    kinds = [(kind, whole if kind is Kind.WHOLE else chunks, path) for kind, path in news]
    memory = whole.memory()

    def read(index: int, part: Tensor) -> None:
        for kind, of_kind, path in kinds:
            data = of_kind.read_one(path, index, memory)
            change = of_kind.decode if kind is Kind.WHOLE else of_kind.add
            change(index, data, part)

    return read
