"""Which codec: by name, or by what a device is good at."""

from __future__ import annotations

import torch

from torchft.arguments import CODECS, check_choice
from torchft.quantization.codec import Codec
from torchft.quantization.float8 import Float8
from torchft.quantization.integers import Int4, Int8
from torchft.quantization.plain import BFloat16, Identity

__all__ = ["codec_for", "codec_names", "codec_of", "default_codec"]

_CODECS = dict[str, Codec](
    zip(CODECS, (Identity(), BFloat16(), Float8(), Int8(), Int4()), strict=True)
)


def codec_names() -> tuple[str, ...]:
    """The names of the codecs that `codec_of` knows."""
    return CODECS


def codec_of(codec: str | Codec) -> Codec:
    """The codec of that name; a codec is itself.

    Raises:
        SettingsError: there is none.
    """
    if isinstance(codec, Codec):
        return codec
    check_choice("codec", codec, _CODECS, otherwise="a Codec")
    return _CODECS[codec]


def default_codec(device: torch.device | str) -> Codec:
    """What `should_quantize=True` means: fp8 on CUDA devices from capability 9.0 on, else int8.

    All members must use the same one: where their devices differ, name the codec.
    """
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return _CODECS["fp8"]
    return _CODECS["int8"]


def codec_for(should_quantize: bool | str | Codec | None, device: torch.device) -> Codec | None:
    """What `should_quantize` asks for: True is what `default_codec` says of `device`, a name or a
    codec that one, False or None no codec.

    Raises:
        SettingsError: there is no codec of that name.
    """
    if should_quantize is None or should_quantize is False:
        return None
    return default_codec(device) if should_quantize is True else codec_of(should_quantize)
