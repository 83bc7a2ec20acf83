"""What an encoding loses is added to what is sent next, so that in the long run nothing is lost.

    sent = x + e        encoded = encode(sent)        e ← sent - decode(encoded)

    x = 0.3 each round, codes are whole numbers: 0, 1, 0, 0, 1, 0, 0, 1, …: 0.3 on average

Karimireddy et al. 2019, "Error Feedback Fixes SignSGD and other Gradient Compression Schemes".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchft.quantization.choice import codec_of
from torchft.quantization.codec import Codec

__all__ = ["Draft", "ErrorFeedback"]


@dataclass(frozen=True)
class Draft:
    """One round's encoding, before it is known whether the round counts."""

    encoded: list[Tensor]
    """What to send: uint8 `[rows, bytes]`."""
    residuals: list[Tensor]
    """What is left over if it counts."""


class ErrorFeedback:
    """Residuals of one list of tensors, each with a row for every node.

    It holds no state: `residuals` belong to the caller, who keeps them with its own state and
    changes them by `commit` when the round counts. A round that does not leaves them as they were.
    """

    def __init__(self, codec: str | Codec) -> None:
        self.codec = codec_of(codec)

    def start(self, like: Sequence[Tensor]) -> list[Tensor]:
        """Residuals of zero, fp32."""
        return [torch.zeros_like(tensor, dtype=torch.float32) for tensor in like]

    @torch.no_grad()
    def draft(self, values: Sequence[Tensor], residuals: Sequence[Tensor]) -> Draft:
        """Encode `[rows, …]` values plus their residuals; changes neither."""
        pairs = zip(values, residuals, strict=True)
        both = [self._one(value, residual) for value, residual in pairs]
        return Draft([encoded for encoded, _ in both], [left for _, left in both])

    @torch.no_grad()
    def decode(self, encoded: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """What the encoded rows mean, fp32, shaped like `like` after the leading dimension."""
        return [self._decode(wire, one) for wire, one in zip(encoded, like, strict=True)]

    @torch.no_grad()
    def commit(self, residuals: Sequence[Tensor], draft: Draft) -> None:
        """The round counts: write what is left over."""
        for residual, left in zip(residuals, draft.residuals, strict=True):
            residual.copy_(left)

    def _one(self, value: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        sent = residual + value
        encoded = self.codec.encode(sent.flatten(1))
        left = sent - self._decode(encoded, sent)  # not in place: `encoded` may share its storage
        # NaN and infinity were sent, to be judged there. Kept, they would be sent for ever.
        return encoded, left.nan_to_num_(0.0, 0.0, 0.0)

    def _decode(self, encoded: Tensor, like: Tensor) -> Tensor:
        n = like[0].numel()
        return self.codec.decode(encoded, n).view(encoded.shape[0], *like.shape[1:])
