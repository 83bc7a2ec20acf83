"""A delta that a worker has handed in, and what it counts for when its round closes.

    mean = Σ weight · delta / divisor
    weight = tokens / mean tokens · 1 / √(1 + staleness)

Staleness is how many rounds have closed since the weights that the delta was measured from. The
divisor is the number of submissions, so stale work damps the step instead of taking the place of
fresh work. Synchronous rounds take the plain mean: with equal tokens and no stale work all weights
are exactly 1 in both. An asynchronous round has one submission, divided by 1; there a round passes
for every member's submission, so staleness is counted in turns of all members.
(Liu et al., arXiv 2401.09135, for 1 / √(1 + staleness).)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torchft.parameter_server.core.rules import Mode

__all__ = ["Share", "Submission", "shares", "staleness_weight"]


@dataclass(frozen=True)
class Submission:
    """A delta that was handed in. `number` counts a session's submissions of a fragment, from 1.

    With the session it makes repeats harmless. The base version alone would not: after a restart
    from an older checkpoint versions come again.
    """

    worker: str
    session: str
    fragment: int
    base: int
    """The version that the delta was measured from."""
    number: int
    steps: int
    tokens: int
    upload: str
    """Where the encoded numbers lie."""
    kind: ClassVar[str] = "take"


@dataclass(frozen=True)
class Share:
    """One term of the mean: a submission and what it counts for."""

    submission: Submission
    weight: float
    staleness: int


def staleness_weight(staleness: int) -> float:
    """The factor 1 / √(1 + staleness) that damps late work; 1 for fresh work."""
    return 1 / math.sqrt(1 + staleness)


def shares(
    mode: Mode, submissions: Sequence[Submission], staleness: Sequence[int]
) -> tuple[Share, ...]:
    """The terms of a round's mean: each submission with its weight.

    They come in an order that does not depend on the network: by worker, session and number.
    """
    tokens = [submission.tokens for submission in submissions]
    by_tokens = mode is Mode.DECOUPLED and min(tokens) != max(tokens)
    mean = sum(tokens) / len(tokens) if by_tokens else 1.0
    found = [
        Share(s, (s.tokens / mean if by_tokens else 1.0) * staleness_weight(stale), stale)
        for s, stale in zip(submissions, staleness, strict=True)
    ]
    return tuple(sorted(found, key=_order))


def _order(share: Share) -> tuple[str, str, int]:
    return share.submission.worker, share.submission.session, share.submission.number
