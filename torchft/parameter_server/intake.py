"""An upload on its way in: each chunk is checked when it comes, the whole before it counts.

    have = 0 … count        whole chunks that are here and good; a broken transfer goes on there
    ok                      all are here, all numbers are finite, and the norm is within the bound

Nothing here touches the shared weights: a bad upload is its sender's trouble alone.
"""

from __future__ import annotations

import math
from pathlib import Path

from torchft.parameter_server.chunks import ChunkError, Chunks
from torchft.parameter_server.refused import Interrupted, Unfit

__all__ = ["Intake", "norm_limit"]


def norm_limit(weights_norm: float, n: int, factor: float) -> float:
    """The largest L2 norm that a delta of `n` numbers may have; `factor` 0: any.

    `factor` times the weights' own norm, or that of as many numbers of size 0.1 where they are
    smaller, as new weights may be.
    """
    return factor * max(weights_norm, 0.1 * math.sqrt(n)) if factor else math.inf


class Intake:
    """One upload, written to `path` as it comes, over what is there."""

    def __init__(self, path: Path, chunks: Chunks, limit: float) -> None:
        self.path, self.chunks, self.limit = path, chunks, limit
        self.have = 0
        self._squares = 0.0
        chunks.room(path)

    @property
    def is_whole(self) -> bool:
        """All of it is here, and good."""
        return self.have == self.chunks.count

    def take(self, index: int, data: memoryview) -> None:
        """The next chunk. One that is here already is ignored.

        Raises:
            Interrupted: it is damaged, or another was to come.
            Unfit: it has NaN or infinity, or the norm is beyond the limit.
        """
        if index < self.have:
            return
        if index > self.have:
            raise Interrupted(
                f"chunk {index} came, and chunk {self.have} was to come: go on from there"
            )
        try:
            norm = self.chunks.norm(index, data)
        except ChunkError as error:
            raise Interrupted(str(error)) from None
        self._judge(norm)
        with self.path.open("r+b", buffering=0) as file:
            file.seek(self.chunks.offset(index))
            file.write(data)
        self.have += 1

    def _judge(self, norm: float) -> None:
        if not math.isfinite(norm):
            raise Unfit(
                "the delta has NaN, infinity or numbers near it: this worker's training has "
                "diverged, and nothing of it was taken"
            )
        self._squares += norm * norm
        if math.sqrt(self._squares) > self.limit:
            raise Unfit(
                f"the delta's norm is above {self.limit:.3g}, the bound for this fragment: this "
                "worker's training has diverged, or the server's --norm-bound is too small"
            )

    def drop(self) -> None:
        """It will not be needed."""
        self.path.unlink(missing_ok=True)
