"""The first worker's weights, where the server was started without a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from torchft.parameter_server.chunks import Chunks
from torchft.parameter_server.intake import Intake
from torchft.parameter_server.requests import Speaker
from torchft.parameter_server.shape import ModelShape
from torchft.quantization import Identity

__all__ = ["InitialWeights"]


class InitialWeights:
    """fp32 rows on their way in, of the one worker that sends them."""

    def __init__(self, who: Speaker, shape: ModelShape, folder: Path) -> None:
        self.who = who
        self.intakes = [
            Intake(
                folder / f"initial-{fragment.index}.row",
                Chunks(shape.size(fragment.index), Identity()),
                float("inf"),
            )
            for fragment in shape.fragments
        ]

    @property
    def is_whole(self) -> bool:
        """All fragments are here."""
        return all(intake.is_whole for intake in self.intakes)

    def rows(self) -> list[Tensor]:
        """One `[1, n]` a fragment."""
        return [_row(intake) for intake in self.intakes]

    def drop(self) -> None:
        """Delete the files."""
        for intake in self.intakes:
            intake.drop()


def _row(intake: Intake) -> Tensor:
    chunks, row = intake.chunks, torch.empty(1, intake.chunks.n)
    for index, piece in enumerate(chunks.read(intake.path)):
        chunks.decode(index, piece, row[:, chunks.span(index)])
    return row
