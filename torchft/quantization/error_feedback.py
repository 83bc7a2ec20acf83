"""What an encoding loses is added to what is sent next, so that in the long run nothing is lost.

    sent = x + e        what arrives = the codec's meaning of sent        e ← sent - what arrives

    x = 0.3 each round, codes are whole numbers: 0, 1, 0, 0, 1, 0, 0, 1, …: 0.3 on average

Where a round cuts its rows, and so where blocks begin, depends on its members. So the round itself
takes what it encoded off what should have arrived (`error_feedback` of
`torchft.peers.Round.average`), to the bit. A mean is encoded once more on its way back; what that
loses, times the number of those that went into the mean, is added by the member that computed it.
Then, over any number of rounds with the same members, but for the rounding of fp32 sums and of
results to their dtype,

    sum of the averages received + mean of the residuals = sum of the means of x

Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes"; both
ways: Tang et al. 2019, "DoubleSqueeze".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ErrorFeedback"]


class ErrorFeedback:
    """The residuals of one list of tensors, each `[rows, …]` with a row for every node.

    They are fp32 (fp64 beside fp64): 4 bytes a parameter for good, and as many again for the draft
    of a round that is open. Only `commit` changes them, when a round counts.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.residuals = [torch.zeros_like(one, dtype=_precise(one)) for one in like]

    @torch.no_grad()
    def draft(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Add to `values`, in place, what is left over; returns the sums, to be the
        `error_feedback` of a round. They have the digits that a smaller dtype cannot hold."""
        drafts = [value + left for value, left in zip(values, self.residuals, strict=True)]
        for value, draft in zip(values, drafts, strict=True):
            value.copy_(draft)
        return drafts

    @torch.no_grad()
    def commit(self, draft: Sequence[Tensor]) -> None:
        """The round counts: what did not arrive is left over."""
        for residual, lost in zip(self.residuals, draft, strict=True):
            residual.copy_(lost)


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
