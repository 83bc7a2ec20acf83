"""What the server holds for all workers: weights, outer optimizer, and news of what has changed.

    weights w    fp32, the outer optimizer's own                                  4 B/param
    outer        momentum (and, delayed, the sum of a turn)                       4 or 8
    sent b       what workers hold; only under a codec that loses something       4
    the mean     while a step is taken                                            4

The news of a new version is the weights themselves where the codec loses nothing, and else the
encoded difference w - b, which all add to b: what an encoding loses stays in w - b and is sent
later. Whoever is too far behind gets all of b, fp32. Each version has an identity that follows
from its bits, so nobody adds a difference to weights that are not those it was made from.

News lie in files that never change, so a slow reader holds up nobody. All methods but `news_for`
and `published` belong to one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.parameter_server.chunks import Chunks, identity_of
from torchft.parameter_server.delayed_nesterov import DelayedNesterov
from torchft.parameter_server.rounds import Close
from torchft.parameter_server.shape import ModelShape
from torchft.quantization import Codec, Identity
from torchft.strategies.parts.outer import FlatOuter

__all__ = ["Kind", "News", "Published", "SharedState"]

_KEPT = 4
"""Versions whose news are kept."""


class Kind(StrEnum):
    """How news are to be read."""

    WHOLE = "whole"
    """fp32 weights that replace the old ones."""
    DELTAS = "deltas"
    """Encoded differences, to be added one after the other."""


@dataclass(frozen=True)
class Published:
    """The newest version that workers can have."""

    version: int
    identity: str


@dataclass(frozen=True)
class News:
    """What makes `version` of a base."""

    version: int
    identity: str
    kind: Kind
    files: tuple[str, ...]


class _Row:
    """One fragment."""

    def __init__(self, weights: Tensor, version: int, *, lossy: bool) -> None:
        self.flats = [weights]
        self.sent = weights.clone() if lossy else weights
        self.norm = float(torch.linalg.vector_norm(weights))
        self.published = Published(version, identity_of(self.sent))
        self.identities = {version: self.published.identity}
        self.deltas: dict[int, str] = {}
        """Version → file that makes it of the one before."""
        self.wholes: dict[int, str] = {}


class SharedState:
    """`weights` are one fp32 row `[1, n]` a fragment, and belong to it from now on."""

    def __init__(
        self,
        shape: ModelShape,
        codec: Codec,
        outer: FlatOuter | DelayedNesterov,
        weights: Sequence[Tensor],
        folder: Path,
        versions: Sequence[int] | None = None,
    ) -> None:
        self.shape, self.codec, self.outer, self.folder = shape, codec, outer, folder
        self.lossy = not isinstance(codec, Identity)
        folder.mkdir(parents=True, exist_ok=True)
        at = versions or [0] * len(weights)
        pairs = zip(weights, at, strict=True)
        self._rows = [_Row(row, version, lossy=self.lossy) for row, version in pairs]
        outer.bind(shape.fragments, self._rows)

    # ------------------------------------------------------------------ for every thread

    def published(self, fragment: int) -> Published:
        """The newest version."""
        return self._rows[fragment].published

    def chunks(self, fragment: int, codec: Codec | None = None) -> Chunks:
        """How this fragment travels."""
        return Chunks(self.shape.size(fragment), self.codec if codec is None else codec)

    def norm(self, fragment: int) -> float:
        """L2 norm of the weights."""
        return self._rows[fragment].norm

    def deltas_for(self, fragment: int, base: int, identity: str) -> News | None:
        """The differences since `base`; None: they are not here, or longer than the weights."""
        row = self._rows[fragment]
        newest = row.published
        steps = range(base + 1, newest.version + 1)
        known = row.identities.get(base) == identity and all(v in row.deltas for v in steps)
        if not known or len(steps) * self.chunks(fragment).nbytes > self._whole(fragment).nbytes:
            return None
        files = tuple(row.deltas[version] for version in steps)
        return News(newest.version, newest.identity, Kind.DELTAS, files)

    # ------------------------------------------------------------------ for its own thread

    def news_for(self, fragment: int, base: int, identity: str) -> News:
        """The shortest way from `base` to the newest version."""
        return self.deltas_for(fragment, base, identity) or self._all_of(fragment)

    @torch.no_grad()
    def apply(self, close: Close, upload: Callable[[str], Path]) -> Published:
        """Take the outer step of a closed round, and publish the version it makes.

        Raises:
            ChunkError, OSError: an upload cannot be read again.
        """
        row = self._rows[close.fragment]
        mean = self._mean(close, upload)
        self.outer.step(self.shape.fragments[close.fragment], [mean])
        del mean
        row.norm = float(torch.linalg.vector_norm(row.flats[0]))
        if self.lossy:
            row.deltas[close.version] = self._write_delta(close, row)
        identity = identity_of(row.sent)
        row.identities[close.version] = identity
        if not self.lossy:
            self._write_whole(close.fragment, close.version, identity)
        self._forget(row, close.version)
        row.published = Published(close.version, identity)
        return row.published

    def state_dict(self) -> dict[str, Any]:
        """Of a fragment each: what a restart needs. Shows the tensors, copies none."""
        return {
            "rows": [
                {
                    "weights": row.flats[0],
                    "sent": row.sent if self.lossy else None,
                    "version": row.published.version,
                    "outer": self.outer.state_dict(fragment),
                }
                for row, fragment in zip(self._rows, self.shape.fragments, strict=True)
            ]
        }

    def load_outer(self, state: dict[str, Any]) -> None:
        """What the constructor does not take, of the same `state_dict`."""
        for row, saved, fragment in zip(
            self._rows, state["rows"], self.shape.fragments, strict=True
        ):
            self.outer.load_state_dict(fragment, saved["outer"])
            if self.lossy and saved["sent"] is not None:
                row.sent = saved["sent"]
                version = row.published.version
                row.published = Published(version, identity_of(row.sent))
                row.identities = {version: row.published.identity}

    def weights(self) -> dict[str, Tensor]:
        """Name → fp32 weights, sharing storage."""
        found: dict[str, Tensor] = {}
        for fragment, row in enumerate(self._rows):
            found |= self.shape.views(fragment, row.flats[0])
        return found

    # ------------------------------------------------------------------ how

    def _mean(self, close: Close, upload: Callable[[str], Path]) -> Tensor:
        chunks = self.chunks(close.fragment)
        mean = torch.empty(1, chunks.n)
        scratch = torch.empty(1, min(chunks.n, chunks.span(0).stop))
        for position, share in enumerate(close.shares):
            for index, piece in enumerate(chunks.read(upload(share.submission.upload))):
                part = mean[:, chunks.span(index)]
                numbers = scratch[:, : part.shape[1]] if position else part
                chunks.decode(index, piece, numbers)
                if share.weight != 1.0:
                    numbers.mul_(share.weight)
                if position:
                    part.add_(numbers)
        return mean.div_(close.divisor) if close.divisor != 1 else mean

    def _write_delta(self, close: Close, row: _Row) -> str:
        chunks = self.chunks(close.fragment)
        name = f"f{close.fragment}-v{close.version}.delta"
        with (self.folder / name).open("wb") as file:
            for index in range(chunks.count):
                span = chunks.span(index)
                sent = row.sent[:, span]
                data = chunks.encode(index, row.flats[0][:, span] - sent)
                file.write(data)
                sent.add_(chunks.decode(index, memoryview(data), torch.empty_like(sent)))
        return name

    def _whole(self, fragment: int) -> Chunks:
        return self.chunks(fragment, Identity())

    def _all_of(self, fragment: int) -> News:
        at = self._rows[fragment].published
        name = self._write_whole(fragment, at.version, at.identity)
        return News(at.version, at.identity, Kind.WHOLE, (name,))

    def _write_whole(self, fragment: int, version: int, identity: str) -> str:
        row, chunks = self._rows[fragment], self._whole(fragment)
        name = row.wholes.get(version)
        if name is None:
            name = f"f{fragment}-v{version}-{identity}.whole"
            with (self.folder / name).open("wb") as file:
                for index in range(chunks.count):
                    file.write(chunks.encode(index, row.sent[:, chunks.span(index)]))
            row.wholes[version] = name
        return name

    def _forget(self, row: _Row, version: int) -> None:
        """Delete news that nobody is told of any more; who reads them keeps the file."""
        for old in [v for v in row.identities if v <= version - _KEPT]:
            del row.identities[old]
        for kept, names in ((_KEPT, row.deltas), (2, row.wholes)):
            for old in [v for v in names if v <= version - kept]:
                (self.folder / names.pop(old)).unlink(missing_ok=True)
