"""A worker's weights against the base that it shares with the server.

    base b     what the server last sent, fp32 on the CPU: 4 bytes a parameter
    sent d     what the server understood of the delta b - w: the encoding, decoded
    adopt      w ← b' + (w - b + d)

The bracket is what the server does not know yet: the steps taken since the submission, and what the
encoding lost. It stays in the weights and so is part of the next delta; nothing is lost, and no
residual takes memory. When no step was taken and nothing was lost it is exactly zero.

With `mix` a worker keeps a share of its own: w ← mix · w + (1 - mix) · (b' + …).

A parameter of a smaller dtype sees b rounded to it; deltas are measured from there.

In a group of ranks the base is at the first one alone. Where it reads sharded parameters, and where
it writes any, the others do so along with it, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from torchft.parameter_server.chunks import Chunks, identity_of
from torchft.parameter_server.ranks import ALONE, Ranks
from torchft.parameter_server.shape import ModelShape
from torchft.parameter_server.sharded import is_sharded, named_parameters, put, whole
from torchft.parameter_server.shared import Kind
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

    @torch.no_grad()
    def row(self, fragment: int) -> Tensor:
        """The weights as they are now, fp32 `[1, n]` on the CPU."""
        if self._sharded:
            self._ranks.say("read", fragment)
        row = torch.empty(1, self.shape.size(fragment))
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
            new = torch.empty(parameter.shape)
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
    def encode(self, fragment: int, chunks: Chunks) -> list[bytes]:
        """The delta, as chunks."""
        delta = self.row(fragment)
        torch.sub(self._rounded(fragment), delta, out=delta)
        return [chunks.encode(i, delta[:, chunks.span(i)]) for i in range(chunks.count)]

    @torch.no_grad()
    def adopt(
        self,
        fragment: int,
        sent: Sequence[bytes] | None,
        news: Iterable[tuple[Kind, Path]],
        codec: Codec,
        mix: float = 0.0,
    ) -> Tensor:
        """Make the new base of files of news, and the weights of it; returns what was kept.

        `sent` None: nothing was submitted, or it was refused and is given up.
        """
        kept = self._unknown_to_server(fragment, sent, codec)
        for kind, path in news:
            self._read(fragment, kind, path, codec)
        self._write(fragment, self._bases[fragment] + kept, mix)
        return kept

    def load(self, fragment: int, news: Iterable[tuple[Kind, Path]], codec: Codec) -> None:
        """The base from nothing; the weights stay."""
        self._bases[fragment] = torch.empty(1, self.shape.size(fragment))
        for kind, path in news:
            self._read(fragment, kind, path, codec)

    @torch.no_grad()
    def settle(self, fragment: int, kept: Tensor | None = None) -> None:
        """The weights become the base, and `kept` on top."""
        base = self._bases[fragment]
        self._write(fragment, base if kept is None else base + kept, 0.0)

    # ------------------------------------------------------------------ how

    def _unknown_to_server(
        self, fragment: int, sent: Sequence[bytes] | None, codec: Codec
    ) -> Tensor:
        kept = self.row(fragment).sub_(self._rounded(fragment))
        if sent is None:
            return kept
        chunks = Chunks(self.shape.size(fragment), codec)
        for index, data in enumerate(sent):
            part = kept[:, chunks.span(index)]
            part.add_(chunks.decode(index, memoryview(data), torch.empty_like(part)))
        return kept

    def _rounded(self, fragment: int) -> Tensor:
        """The base as the parameters can hold it."""
        base = self._bases[fragment]
        if all(p.dtype == "float32" for p in self.shape.of_fragment(fragment)):
            return base
        rounded = torch.empty_like(base)
        views = self.shape.views(fragment, base)
        for name, view in self.shape.views(fragment, rounded).items():
            view.copy_(views[name].to(self._parameters[name].dtype))
        return rounded

    def _read(self, fragment: int, kind: Kind, path: Path, codec: Codec) -> None:
        base = self._bases[fragment]
        chunks = Chunks(base.shape[1], Identity() if kind is Kind.WHOLE else codec)
        for index, data in enumerate(chunks.read(path)):
            part = base[:, chunks.span(index)]
            if kind is Kind.WHOLE:
                chunks.decode(index, data, part)
            else:
                part.add_(chunks.decode(index, data, torch.empty_like(part)))

    def _write(self, fragment: int, row: Tensor, mix: float) -> None:
        self._ranks.say("write", fragment, mix)
        for name, view in self.shape.views(fragment, row).items():
            self._ranks.broadcast(view)
            put(self._parameters[name].detach(), view, mix)
