"""A codec of one's own, tried out before it can spoil an average.

A mistake in one shows up far from where it was made: as a failed round, every time, or as an
average that lacks somebody's numbers. So whoever takes a codec for a model tries it once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.quantization.codec import Codec

__all__ = ["prove"]

_ROWS, _N = 2, 7


@torch.no_grad()
def prove(codec: Codec, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Encode and decode a few numbers of `dtype`, one of them NaN.

    Raises:
        SettingsError: also a ValueError; which promise of `torchft.quantization.codec` it breaks.
    """
    if not codec.name or not isinstance(codec.name, str):
        _refuse(codec, "has no name: set name to a string, by which groups compare their codecs")
    codec.check(dtype)
    values = (
        torch.linspace(-1, 1, _ROWS * _N, dtype=torch.float32, device=device)
        .view(_ROWS, _N)
        .to(dtype)
    )
    values[0, 0] = torch.nan
    out = values.new_zeros(_ROWS, _N, dtype=torch.float32)
    try:
        encoded = codec.encode(values)
        _check_wire(codec, encoded)
        decoded = codec.decode(encoded, _N, out=out)
    except SettingsError:
        raise
    except Exception as error:
        _refuse(codec, f"cannot encode and decode {dtype} [{_ROWS}, {_N}]: {error}", error)
    if not isinstance(decoded, Tensor) or decoded.shape != out.shape:
        _refuse(codec, f"decode must return the {_N} numbers of each row, in the shape of out")
    if not bool(out.any()):
        _refuse(codec, "decode leaves out as it was: write into it, as torchft's into(out, …) does")
    if bool(decoded[0, 0].isfinite()):
        _refuse(
            codec, "NaN comes back as a number: let it come back as NaN, so that all discard it"
        )


def _check_wire(codec: Codec, encoded: Tensor) -> None:
    due = (_ROWS, codec.encoded_bytes(_N))
    if encoded.dtype != torch.uint8 or encoded.shape != due:
        found = f"{encoded.dtype} {list(encoded.shape)}"
        _refuse(codec, f"encode gives {found}, and encoded_bytes says torch.uint8 {list(due)}")


def _refuse(codec: Codec, why: str, cause: Exception | None = None) -> None:
    name = codec.name or "without a name"
    raise SettingsError(f"the codec {name} ({type(codec).__name__}) {why}") from cause
