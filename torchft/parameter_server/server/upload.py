"""Uploads on their way in: each chunk is checked when it comes, and all of them before they count.

    have = 0 … count        chunks that are here and good; a broken transfer goes on there
    complete                all are here, all numbers are finite, and the norm is within the bound

Nothing here touches the shared weights: a bad upload is its sender's trouble alone. Two connections
may bring the same chunk at once, when a worker that was cut off comes back sooner than its old
connection runs dry: chunks are taken one at a time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path

from torchft.parameter_server.core.chunks import ChunkError, Chunks
from torchft.parameter_server.core.refused import Interrupted, NotFound, Unfit
from torchft.parameter_server.core.submission import Submission
from torchft.parameter_server.server.weights import ServerWeights

__all__ = ["Upload", "UploadTable", "norm_limit"]


def norm_limit(weights_norm: float, n: int, factor: float) -> float:
    """The largest L2 norm that a delta of `n` numbers may have; `factor` 0: any.

    `factor` times the weights' own norm, or that of as many numbers of size 0.1 where they are
    smaller, as new weights may be.
    """
    return factor * max(weights_norm, 0.1 * math.sqrt(n)) if factor else math.inf


class Upload:
    """One upload, written to `path` as it comes, over what is there; `limit` bounds its L2 norm."""

    def __init__(self, path: Path, chunks: Chunks, limit: float) -> None:
        self.path, self.chunks, self.limit = path, chunks, limit
        self.have = 0
        self._squares = 0.0
        self._dropped = False
        self._lock = threading.Lock()
        chunks.prepare(path)

    @property
    def is_complete(self) -> bool:
        """Whether all of it is here and good."""
        return self.have == self.chunks.count

    def take(self, index: int, data: memoryview) -> None:
        """Check and write the next chunk. One that is here already is ignored.

        Raises:
            Interrupted: it is damaged, or another was to come.
            Unfit: it has NaN or infinity, or the norm is beyond the limit.
            NotFound: the upload was given up meanwhile.
        """
        with self._lock:
            if self._dropped:
                raise NotFound("this upload was given up: offer the submission again")
            if index >= self.have:
                self._take_next(index, data)

    def _take_next(self, index: int, data: memoryview) -> None:
        if index > self.have:
            raise Interrupted(
                f"chunk {index} came, and chunk {self.have} was to come: go on from there"
            )
        try:
            norm = self.chunks.norm(index, data)
        except ChunkError as error:
            raise Interrupted(str(error)) from None
        self._judge(norm)
        self.chunks.write_one(self.path, index, data)
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
        """Give it up: delete the file and take no more chunks."""
        self._dropped = True
        self.path.unlink(missing_ok=True)


class UploadTable:
    """The submissions on their way in, one a worker and fragment, by the names of their uploads.

    `create` makes the file for an upload of a name; `norm_bound` is the factor of `norm_limit`.
    """

    def __init__(self, create: Callable[[str], Path], norm_bound: float) -> None:
        self._create, self._norm_bound = create, norm_bound
        self._found: dict[str, tuple[Submission, Upload]] = {}

    def of(self, submission: Submission, weights: ServerWeights) -> Upload:
        """The upload of a submission that is measured from `weights`, made where it is new. An
        older one of the same worker and fragment is given up then."""
        name = submission.upload
        if name not in self._found:
            mine = (submission.worker, submission.fragment)
            self._drop(lambda other, _: (other.worker, other.fragment) == mine)
            chunks = weights.chunks(submission.fragment)
            limit = norm_limit(weights.norm(submission.fragment), chunks.n, self._norm_bound)
            self._found[name] = submission, Upload(self._create(name), chunks, limit)
        return self._found[name][1]

    def named(self, name: str) -> tuple[Submission, Upload]:
        """The submission and the upload of that name.

        Raises:
            NotFound: there is none.
        """
        if name not in self._found:
            raise NotFound("there is no such upload: offer the submission again")
        return self._found[name]

    def done(self, name: str) -> None:
        """Take one out that is complete; its file is kept."""
        del self._found[name]

    def drop(self, upload: Upload) -> None:
        """Give one upload up and delete its file."""
        self._drop(lambda _, other: other is upload)

    def drop_all_of(self, worker: str) -> None:
        """Give up the uploads of a worker that is a member no more: nobody will send the rest."""
        self._drop(lambda submission, _: submission.worker == worker)

    def _drop(self, unwanted: Callable[[Submission, Upload], bool]) -> None:
        for name, (submission, upload) in list(self._found.items()):
            if unwanted(submission, upload):
                upload.drop()
                del self._found[name]
