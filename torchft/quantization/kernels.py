"""Whether Triton kernels compute a tensor's codes. They are loaded when the first one needs them.

They give the same bytes as the torch operations in `blockwise`, and faster; so where Triton is not
installed nothing but time is lost.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

__all__ = ["decode", "encode", "serve"]


def serve(rows: Tensor) -> bool:
    """Whether `encode` and `decode` take this tensor."""
    return rows.is_cuda and rows.numel() > 0 and _has_triton()


def encode(kind: str, block: int, rows: Tensor, scales: Tensor, codes: Tensor) -> None:
    """Write the scales `[rows, blocks]` and codes of `rows` `[rows, n]`."""
    from torchft.quantization.triton_kernels import encode as on_gpu

    with torch.cuda.device(rows.device):
        on_gpu(kind, block, rows, scales, codes)


def decode(
    kind: str, block: int, scales: Tensor, codes: Tensor, rows: Tensor, *, add: bool
) -> None:
    """Write codes times scales into `rows`, or add them to it."""
    from torchft.quantization.triton_kernels import decode as on_gpu

    with torch.cuda.device(rows.device):
        on_gpu(kind, block, scales, codes, rows, add=add)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
