"""What the server holds for all workers: weights, outer optimizer, and updates of them.

    weights w    fp32, the outer optimizer's own                                  4 B/param
    outer        momentum (and, delayed, the sum of a turn)                       4 or 8
    sent b       what workers hold; only under a codec that loses something       4

A step goes through a row chunk by chunk, from the mean to what is published, so that nothing else
takes memory (`OuterStep`). The update to a new version is the weights themselves where the codec
loses nothing, and else the encoded difference w - b, which all add to b: what an encoding loses
stays in w - b and is sent later. Whoever is too far behind gets all of b, fp32. Each version has an
identity that follows from its bits, so nobody adds a difference to weights that are not those it
was made from.

Updates lie in files that never change, so a slow reader holds up nobody. A step that fails leaves
the weights half stepped: from then on none of them is stepped, saved or told. All methods but
`update_for` and `published` belong to one thread.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.parameter_server.core.chunks import Chunks, identity_of
from torchft.parameter_server.core.delayed_nesterov import DelayedNesterov
from torchft.parameter_server.core.events import RoundClosed
from torchft.parameter_server.core.outer_step import OuterStep
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.core.weight_update import UpdateKind, WeightUpdate
from torchft.parameter_server.file_pool import FilePool
from torchft.quantization import Codec, Identity
from torchft.strategies.local import Fragment
from torchft.strategies.parts.outer import FlatOuter

__all__ = ["FlatRow", "Published", "ServerWeights"]

_FREE_FILES = 4
_KEPT = 4
"""Versions whose updates are kept."""


@dataclass(frozen=True)
class Published:
    """The newest version that workers can have."""

    version: int
    identity: str


class _Row:
    """One fragment."""

    def __init__(self, weights: Tensor, version: int, first: int, *, lossy: bool) -> None:
        self.weights = weights
        self.sent = weights.clone() if lossy else weights
        self.first = first
        """Among all chunks of the model, its first one's number."""
        self.norm = float(torch.linalg.vector_norm(weights))
        self.deltas: dict[int, str] = {}
        """Version → file that makes it of the one before."""
        self.full: dict[int, str] = {}
        self.hold(version)

    def hold(self, version: int) -> None:
        """`sent` is what workers are to hold at `version`, and no update leads there."""
        self.published = Published(version, identity_of(self.sent))
        self.identities = {version: self.published.identity}


class ServerWeights:
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
        self._pool = FilePool(folder, _FREE_FILES)
        at = versions or [0] * len(weights)
        counts = [self.chunks(fragment).count for fragment in range(len(weights))]
        firsts = [0, *accumulate(counts)]
        self._rows = [
            _Row(row, version, first, lossy=self.lossy)
            for row, version, first in zip(weights, at, firsts[:-1], strict=True)
        ]
        self._steps = [Fragment(chunk, (chunk,)) for chunk in range(firsts[-1])]
        """What the outer optimizer takes for fragments: chunks of the rows."""
        flats = [
            FlatRow([row.weights[:, span]])
            for fragment, row in enumerate(self._rows)
            for _, span in self.chunks(fragment).spans()
        ]
        outer.bind(self._steps, flats)
        self._stepping = False
        """Also after a step that failed."""

    # ------------------------------------------------------------------ for every thread

    def published(self, fragment: int) -> Published:
        """The newest version of a fragment that workers can have."""
        return self._rows[fragment].published

    def chunks(self, fragment: int, codec: Codec | None = None) -> Chunks:
        """How the row of a fragment is cut to travel; `codec` None: the run's own."""
        return Chunks(self.shape.size(fragment), self.codec if codec is None else codec)

    def norm(self, fragment: int) -> float:
        """L2 norm of the newest weights of a fragment."""
        return self._rows[fragment].norm

    def deltas_for(self, fragment: int, base: int, identity: str) -> WeightUpdate | None:
        """The differences since `base`; None: they are not here, or longer than the weights."""
        row = self._rows[fragment]
        newest = row.published
        steps = range(base + 1, newest.version + 1)
        known = row.identities.get(base) == identity and all(v in row.deltas for v in steps)
        if (
            not known
            or len(steps) * self.chunks(fragment).nbytes > self.chunks(fragment, Identity()).nbytes
        ):
            return None
        files = tuple(row.deltas[version] for version in steps)
        return WeightUpdate(newest.version, newest.identity, UpdateKind.DELTAS, files)

    # ------------------------------------------------------------------ for its own thread

    def update_for(self, fragment: int, base: int, identity: str) -> WeightUpdate:
        """The shortest update from version `base` to the newest one.

        Raises:
            OSError: a step failed, or the file cannot be written.
        """
        self._check_usable()
        return self.deltas_for(fragment, base, identity) or self._all_of(fragment)

    def apply(self, close: RoundClosed, upload: Callable[[str], Path]) -> Published:
        """Take the outer step of a closed round, and publish the version it makes.

        Raises:
            ChunkError, OSError: an upload cannot be read again, or the update cannot be written.
        """
        self._check_usable()
        self._stepping = True
        row, chunks = self._rows[close.fragment], self.chunks(close.fragment)
        paths = [(upload(share.submission.upload), share.weight) for share in close.shares]
        path = self._pool.create(self.folder / "next")
        step = OuterStep(chunks, paths, partial(self._step_chunk, row), row.weights, row.sent, path)
        row.norm, identity = step.take()
        self._publish(close, row, path, identity)
        self._stepping = False
        return row.published

    def reading(self, name: str) -> AbstractContextManager[Path]:
        """A file of an update, which stays as it is within the block. For every thread."""
        return self._pool.reading(self.folder / name)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs, of each fragment; the tensors are not copied.

        Raises:
            OSError: a step failed.
        """
        self._check_usable()
        return {
            "rows": [
                {
                    "weights": row.weights,
                    "sent": row.sent if self.lossy else None,
                    "version": row.published.version,
                    "outer": [self.outer.state_dict(step) for step in self._steps_of(fragment)],
                }
                for fragment, row in enumerate(self._rows)
            ]
        }

    def pieces(self, fragment: int) -> Iterator[dict[str, Any]]:
        """What a restart needs of one fragment, chunk by chunk; the tensors are not copied.

        Raises:
            OSError: a step failed.
        """
        self._check_usable()
        row = self._rows[fragment]
        for step, (_, span) in zip(
            self._steps_of(fragment), self.chunks(fragment).spans(), strict=True
        ):
            yield {
                "weights": row.weights[:, span],
                "sent": row.sent[:, span] if self.lossy else None,
                "outer": self.outer.state_dict(step),
            }

    def load_pieces(self, fragment: int, version: int, pieces: Iterable[dict[str, Any]]) -> None:
        """Take over what `pieces` gave: the fragment is at `version` from now on."""
        row = self._rows[fragment]
        spans = (span for _, span in self.chunks(fragment).spans())
        for step, span, piece in zip(self._steps_of(fragment), spans, pieces, strict=True):
            row.weights[:, span] = piece["weights"]
            if self.lossy:
                row.sent[:, span] = piece["sent"]
            self.outer.load_state_dict(step, piece["outer"])
        row.norm = float(torch.linalg.vector_norm(row.weights))
        row.hold(version)

    def load_outer(self, state: dict[str, Any]) -> None:
        """Take over what the constructor does not take of a `state_dict`."""
        for fragment, (row, saved) in enumerate(zip(self._rows, state["rows"], strict=True)):
            for step, outer in zip(self._steps_of(fragment), saved["outer"], strict=True):
                self.outer.load_state_dict(step, outer)
            if self.lossy and saved["sent"] is not None:
                row.sent = saved["sent"]
                row.hold(row.published.version)

    def by_name(self) -> dict[str, Tensor]:
        """The weights by name, fp32, sharing storage with the rows."""
        found: dict[str, Tensor] = {}
        for fragment, row in enumerate(self._rows):
            found |= self.shape.views(fragment, row.weights)
        return found

    # ------------------------------------------------------------------ how

    def _check_usable(self) -> None:
        if self._stepping:
            raise OSError(errno.EIO, "an outer step failed, and the server ends")

    def _steps_of(self, fragment: int) -> list[Fragment]:
        first = self._rows[fragment].first
        return self._steps[first : first + self.chunks(fragment).count]

    def _step_chunk(self, row: _Row, index: int, mean: Tensor) -> None:
        self.outer.step(self._steps[row.first + index], [mean])

    def _publish(self, close: RoundClosed, row: _Row, update: Path, identity: str) -> None:
        if self.lossy:
            name = f"f{close.fragment}-v{close.version}.delta"
            row.deltas[close.version] = name
        else:
            name = _full_name(close.fragment, close.version, identity)
            row.full[close.version] = name
        update.replace(self.folder / name)
        row.identities[close.version] = identity
        self._forget(row, close.version)
        row.published = Published(close.version, identity)

    def _all_of(self, fragment: int) -> WeightUpdate:
        row, chunks = self._rows[fragment], self.chunks(fragment, Identity())
        at = row.published
        if at.version not in row.full:
            name = _full_name(fragment, at.version, at.identity)
            with (self.folder / name).open("wb") as file:
                for index, span in chunks.spans():
                    file.write(chunks.encode(index, row.sent[:, span]))
            row.full[at.version] = name
        files = (row.full[at.version],)
        return WeightUpdate(at.version, at.identity, UpdateKind.FULL, files)

    def _forget(self, row: _Row, version: int) -> None:
        """Delete updates that nobody is told of any more; who reads one keeps the file."""
        for old in [v for v in row.identities if v <= version - _KEPT]:
            del row.identities[old]
        for kept, names in ((_KEPT, row.deltas), (2, row.full)):
            for old in [v for v in names if v <= version - kept]:
                self._pool.retire(self.folder / names.pop(old))


@dataclass(frozen=True)
class FlatRow:
    """What an outer optimizer steps of the server's weights."""

    flats: list[Tensor]

    def in_shape(self, flats: Sequence[Tensor]) -> Sequence[Tensor]:
        """Raises SettingsError always: a chunk is a part of a row and has no parameters."""
        raise SettingsError(
            "the server steps flat chunks of the weights, so its outer optimizer must step number "
            "by number, as SGD does"
        )


def _full_name(fragment: int, version: int, identity: str) -> str:
    return f"f{fragment}-v{version}-{identity}.whole"
