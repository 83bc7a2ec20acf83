"""The first worker's weights, where the server was started without a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.refused import NotFound, NotReady
from torchft.parameter_server.core.requests import WorkerSession
from torchft.parameter_server.core.shape import ModelShape
from torchft.parameter_server.server.run import TrainingRun
from torchft.parameter_server.server.upload import Upload
from torchft.quantization import Identity

__all__ = ["FirstWeights", "InitialWeights"]


class FirstWeights:
    """Who sends them: one worker, until it is silent or gone; then another, from the start."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self.sent: InitialWeights | None = None
        self._folder, self._clock = folder, clock

    def are_wanted_of(self, who: WorkerSession, run: TrainingRun) -> bool:
        """If nobody else sends them, `who` is the one from now on."""
        if run.weights is not None:
            return False
        if self.sent is not None and self.sent.who != who:
            if self._is_heard(self.sent.who, run):
                return False
            self.drop()
        if self.sent is None:
            self.sent = InitialWeights(who, run.shape, self._folder)
        return True

    def upload(self, who: WorkerSession, fragment: int, run: TrainingRun) -> Upload:
        """Where a fragment of them goes. Raises NotReady, NotFound."""
        if run.weights is not None:
            raise NotFound("the run has weights already")
        if self.sent is None or not self.are_wanted_of(who, run):
            raise NotReady("another worker sends the first weights")
        if not 0 <= fragment < len(run.shape.fragments):
            raise NotFound(f"there is no fragment {fragment}")
        return self.sent.uploads[fragment]

    def drop(self) -> None:
        """They are taken, or will not be."""
        if self.sent is not None:
            self.sent.drop()
            self.sent = None

    def _is_heard(self, who: WorkerSession, run: TrainingRun) -> bool:
        member = run.rounds.members.get(who.worker)
        return (
            member is not None
            and member.session == who.session
            and not member.is_silent(self._clock(), run.rounds.rules)
        )


class InitialWeights:
    """fp32 rows on their way in, of the one worker that sends them."""

    def __init__(self, who: WorkerSession, shape: ModelShape, folder: Path) -> None:
        self.who = who
        self.uploads = [
            Upload(
                folder / f"initial-{fragment.index}.row",
                Chunks(shape.size(fragment.index), Identity()),
                float("inf"),
            )
            for fragment in shape.fragments
        ]

    @property
    def is_whole(self) -> bool:
        """All fragments are here."""
        return all(upload.is_whole for upload in self.uploads)

    def rows(self) -> list[Tensor]:
        """One `[1, n]` a fragment."""
        return [_row(upload) for upload in self.uploads]

    def drop(self) -> None:
        """Delete the files."""
        for upload in self.uploads:
            upload.drop()


def _row(upload: Upload) -> Tensor:
    chunks, row = upload.chunks, torch.empty(1, upload.chunks.n, dtype=torch.float32, device="cpu")
    for index, piece in enumerate(chunks.read(upload.path)):
        chunks.decode(index, piece, row[:, chunks.span(index)])
    return row
