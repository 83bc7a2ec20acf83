"""How many bits: codecs that make averages and pseudogradients smaller on the wire.

| codec | bytes each | of fp32 | a number changes by at most |
|---|---|---|---|
| fp32 | 4 | 1 | 0 |
| bf16 | 2 | 0.5 | 2⁻⁸ of itself |
| fp8 | 1.016 | 0.254 | 1/16 of itself, or 1/458 000 of the largest of 256 neighbours |
| int8 | 1.016 | 0.254 | 1/253 of the largest of 256 neighbours |
| int4 | 0.563 | 0.141 | 1/13.9 of the largest of 64 neighbours |
"""

from __future__ import annotations

from torchft.quantization.choice import codec_for, codec_names, codec_of, default_codec
from torchft.quantization.codec import Codec
from torchft.quantization.error_feedback import ErrorFeedback
from torchft.quantization.float8 import Float8
from torchft.quantization.integers import Int4, Int8
from torchft.quantization.mean import mean_bytes, quantized_mean
from torchft.quantization.plain import BFloat16, Identity

__all__ = [
    "BFloat16",
    "Codec",
    "ErrorFeedback",
    "Float8",
    "Identity",
    "Int4",
    "Int8",
    "codec_for",
    "codec_names",
    "codec_of",
    "default_codec",
    "mean_bytes",
    "quantized_mean",
]
