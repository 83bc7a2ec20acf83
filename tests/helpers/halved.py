"""The model of the digests in half the digits."""

from __future__ import annotations

import torch

from torchft.verify.digests import OddModel

__all__ = ["Halved"]


class Halved(OddModel):
    """Its parameters are bf16; what all share, or a server holds, is fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)
