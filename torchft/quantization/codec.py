"""A codec: how rows of numbers become fewer bytes, and numbers again.

    class Halves(Codec):
        name = "halves"

        def encoded_bytes(self, n):
            return 2 * n

        def encode(self, values):
            return values.half().view(torch.uint8)

        def decode(self, encoded, n, dtype=torch.float32, *, out=None):
            return into(out, encoded.view(torch.float16).to(dtype))

What every codec promises (a codec is tried out where it is given: `torchft.quantization.proof`):

- `values` are `[..., n]`, the encoded bytes `[..., encoded_bytes(n)]`. Each row is by itself: it
  carries its scales, and its bytes depend on no other row.
- The same row gives the same bytes on every call.
- NaN and infinity come out as NaN or infinity, at their place at least, so that an average of
  decoded rows is judged as the average of the rows would have been.
- All other numbers come back within `error_bound(values)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from torchft.errors import SettingsError

__all__ = ["Codec", "into", "rows_of"]

_MANY = 1 << 20


class Codec(ABC):
    """Encodes the last dimension of tensors. It has no state, and is equal at all members."""

    name: str = ""
    """Says all that a peer needs to decode: members compare it."""

    def check(self, dtype: torch.dtype) -> None:
        """Refuse what cannot be encoded, before anything is sent.

        Raises:
            SettingsError: also a ValueError.
        """
        if not dtype.is_floating_point:
            raise SettingsError(
                f"the codec {self.name} encodes floating-point numbers, not {dtype}: average these "
                "without a codec"
            )

    @abstractmethod
    def encoded_bytes(self, n: int) -> int:
        """How many bytes a row of `n` numbers takes."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Floating-point `[..., n]` → uint8 `[..., encoded_bytes(n)]`, contiguous.

        Where no bit changes it may share storage.
        """

    @abstractmethod
    def decode(
        self,
        encoded: Tensor,
        n: int,
        dtype: torch.dtype = torch.float32,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """The inverse, `[..., n]`; written into `out` where that is given, in its dtype."""

    def decode_add_(self, total: Tensor, encoded: Tensor) -> Tensor:
        """Add the decoded numbers to `total` `[..., n]`, in place."""
        return total.add_(self.decode(encoded, total.shape[-1], total.dtype))

    def error_bound(self, values: Tensor) -> Tensor:
        """The most that each finite number may change by, fp32 of the same shape."""
        raise NotImplementedError(f"{type(self).__name__} states no bound")

    @property
    def bytes_per_element(self) -> float:
        """Of a long row; numbers sent as they are take 4."""
        return self.encoded_bytes(_MANY) / _MANY

    def __repr__(self) -> str:
        return f"<codec {self.name}>"


def rows_of(tensor: Tensor) -> Tensor:
    """`[..., n]` as `[rows, n]`, sharing storage where strides allow it.

    Raises:
        ValueError: it has no dimension.
    """
    if not tensor.dim():
        raise ValueError("a codec works on rows: give a tensor with at least one dimension")
    *leading, n = tensor.shape
    return tensor.detach().reshape(math.prod(leading), n)


def numbers_of(values: Tensor) -> Tensor:
    """`rows_of`, of what can be encoded.

    Raises:
        ValueError: these are no floating-point numbers.
    """
    if not values.is_floating_point():
        raise ValueError(f"codecs encode floating-point tensors, not {values.dtype}")
    return rows_of(values)


def wire_of(encoded: Tensor, nbytes: int) -> Tensor:
    """`rows_of`, of what can be decoded.

    Raises:
        ValueError: it is not uint8, or rows have another length than `nbytes`.
    """
    if encoded.dtype != torch.uint8 or encoded.shape[-1:] != (nbytes,):
        shape = f"{encoded.dtype} {tuple(encoded.shape)}"
        raise ValueError(f"encoded rows here are uint8 [..., {nbytes}], not {shape}")
    return rows_of(encoded)


def into(out: Tensor | None, decoded: Tensor) -> Tensor:
    """`decoded`, copied into `out` where that is given."""
    return decoded if out is None else out.copy_(decoded)


def typed(encoded: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes `[rows, m]` as one flat tensor of another dtype; shares storage where it is aligned."""
    aligned = encoded.storage_offset() % dtype.itemsize == 0 and encoded.is_contiguous()
    plain = encoded if aligned else encoded.clone(memory_format=torch.contiguous_format)
    return plain.view(-1).view(dtype)
