"""A worker's submissions: one at a time of each fragment, from the step that made it to the update
that answers it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from torchft.parameter_server.core.chunks import Chunks
from torchft.parameter_server.worker.download_cache import DownloadedUpdate
from torchft.parameter_server.worker.weights import WorkerWeights
from torchft.quantization import Codec
from torchft.strategies.rounds_schedule import next_fragment

__all__ = ["PendingSubmission", "Submissions"]


@dataclass
class PendingSubmission:
    """One fragment's submission. The connection's thread changes its fields until `over` is set."""

    fragment: int
    base: int
    identity: str
    number: int
    steps: int
    tokens: int
    chunks: list[memoryview]
    """The encoded delta; kept until the update is applied, whatever happens to the connection."""
    is_sent: bool = False
    refused: str | None = None
    """Why the server refused it; None where it did not."""
    update: DownloadedUpdate | None = None
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def nbytes(self) -> int:
        """How many bytes it has on the wire."""
        return sum(map(len, self.chunks))


@dataclass
class _FragmentCounts:
    """What this process counts of one fragment."""

    version: int
    """Outer steps in its base."""
    number: int = 0
    """Submissions until now."""
    steps: int = 0
    """Inner steps since the last submission."""
    tokens: int = 0
    """Trained on since then, as far as they were summed up over the ranks."""


class Submissions:
    """What is pending, and what was trained since. At a rank that does not lead it stays empty."""

    def __init__(self) -> None:
        self.pending: dict[int, PendingSubmission] = {}
        """By fragment, the oldest first."""
        self._counts: list[_FragmentCounts] = []

    def begin(self, versions: Sequence[int]) -> None:
        """Count from these versions of the fragments on."""
        self._counts = [_FragmentCounts(version) for version in versions]

    @property
    def version(self) -> int:
        """How many outer steps the weights have had: the fewest of all fragments."""
        return min((of.version for of in self._counts), default=0)

    def count(self, *, steps: int = 0, tokens: int = 0) -> None:
        """Note what was trained: it is part of the next submission of every fragment."""
        for of in self._counts:
            of.steps += steps
            of.tokens += tokens

    def submit(self, weights: WorkerWeights, codec: Codec) -> PendingSubmission | None:
        """Make a submission of the fragment that is due; None where all are pending, or that one
        was not trained since its last submission."""
        at = next_fragment([of.version for of in self._counts], self.pending.keys())
        if at is None or not (of := self._counts[at]).steps:
            return None
        of.number += 1
        chunks = weights.encode(at, Chunks(weights.shape.size(at), codec))
        identity = weights.identity(at)
        made = PendingSubmission(at, of.version, identity, of.number, of.steps, of.tokens, chunks)
        of.steps = of.tokens = 0
        self.pending[at] = made
        return made

    def over(self) -> list[PendingSubmission]:
        """Those whose answer is here, or will not come."""
        return [submission for submission in self.pending.values() if submission.over.is_set()]

    def are_over(self) -> bool:
        """Whether none of them is still waited for."""
        return len(self.over()) == len(self.pending)

    def applied(self, submission: PendingSubmission, update: DownloadedUpdate) -> None:
        """Note that the update which answers a submission has become the weights."""
        self._counts[submission.fragment].version = update.version
