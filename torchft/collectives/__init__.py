"""Reductions whose bits follow from the members alone, of numbers as they are or encoded."""

from __future__ import annotations

from torchft.collectives.ordered import OrderedMean, as_bytes
from torchft.collectives.quantized import (
    QuantizedMean,
    adds,
    allreduce_quantized,
    codec_for,
)

__all__ = [
    "OrderedMean",
    "QuantizedMean",
    "adds",
    "allreduce_quantized",
    "as_bytes",
    "codec_for",
]
