"""Reductions whose bits follow from the members alone, of numbers as they are or encoded."""

from __future__ import annotations

from torchft.collectives.ordered import AsIs, Codec, OrderedMean, as_bytes
from torchft.collectives.quantized import QuantizedMean, allreduce_quantized

__all__ = [
    "AsIs",
    "Codec",
    "OrderedMean",
    "QuantizedMean",
    "allreduce_quantized",
    "as_bytes",
]
