"""The first worker's weights, where the server was started without a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.core.refused import NotFound, NotReady
from torchft.parameter_server.core.requests import WorkerSession
from torchft.parameter_server.server.training_run import TrainingRun
from torchft.parameter_server.server.upload import Upload
from torchft.quantization import Identity

__all__ = ["FirstWeights"]


class FirstWeights:
    """fp32 rows from one worker, until it is silent or gone; then from another, from the start."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._folder, self._clock = folder, clock
        self._sender: WorkerSession | None = None
        self._uploads: list[Upload] = []
        """One a fragment, of the sender."""

    def are_wanted_of(self, who: WorkerSession, run: TrainingRun) -> bool:
        """Whether `who` should send the first weights; if nobody else does, it is the sender."""
        if run.weights_or_none is not None:
            return False
        if self._sender not in (None, who) and self._sender_is_heard(run):
            return False
        if self._sender != who:
            self.drop()
            self._sender = who
            self._uploads = [
                Upload(
                    self._folder / f"initial-{fragment.index}.row",
                    Chunks(run.shape.size(fragment.index), Identity()),
                    math.inf,
                )
                for fragment in run.shape.fragments
            ]
        return True

    def upload(self, who: WorkerSession, fragment: int, run: TrainingRun) -> Upload:
        """The upload that takes a fragment of them.

        Raises:
            NotFound: the run has weights, or no such fragment.
            NotReady: another worker sends them.
        """
        if run.weights_or_none is not None:
            raise NotFound("the run has weights already")
        if self._sender is None or not self.are_wanted_of(who, run):
            raise NotReady("another worker sends the first weights")
        if not 0 <= fragment < len(run.shape.fragments):
            raise NotFound(f"there is no fragment {fragment}")
        return self._uploads[fragment]

    @property
    def are_complete(self) -> bool:
        """Whether all fragments of them are here."""
        return bool(self._uploads) and all(upload.is_complete for upload in self._uploads)

    def rows(self) -> list[Tensor]:
        """The weights, fp32 `[1, n]` a fragment."""
        return [_row(upload) for upload in self._uploads]

    def drop(self) -> None:
        """Delete what was sent: it is taken, or will not be."""
        for upload in self._uploads:
            upload.drop()
        self._sender, self._uploads = None, []

    def _sender_is_heard(self, run: TrainingRun) -> bool:
        assert self._sender is not None
        member = run.rounds.member(self._sender.worker, self._sender.session)
        return member is not None and not member.is_silent(self._clock(), run.rounds.rules)


def _row(upload: Upload) -> Tensor:
    chunks, row = upload.chunks, torch.empty(1, upload.chunks.n, dtype=torch.float32, device="cpu")
    for index, piece in enumerate(chunks.read(upload.path)):
        chunks.decode(index, piece, row[:, chunks.span(index)])
    return row
