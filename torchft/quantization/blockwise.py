"""Codecs that share a scale among a block of neighbours. This file is what they mean.

    row of n numbers → [ fp32 scale of each block | codes of all numbers ]
    block of numbers → scale = largest size / limit,  codes = numbers / scale, rounded to even

The last block of a row may be short. The rules that make the bytes equal on all machines:

- Every step is one correctly rounded operation: scale = peak / limit, inverse = 1 / scale, code =
  round(number · inverse), number = code · scale. What was decoded is encoded to the same again.
- A scale is at most what `limit` can be multiplied with.
- A block whose scale would be below 2⁻¹¹⁶ has scale 0: it decodes to zeros. So no number below
  fp32's normal range changes a byte, and machines that flush those to zero agree.
- A block with a NaN or an infinity has the scale NaN: all of it decodes to NaN.

On a CPU a row is worked off in tiles that stay in the cache. On a GPU Triton kernels compute the
same bytes; without Triton the same torch operations run there, over the whole tensor at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.quantization import kernels
from torchft.quantization.codec import Codec, into, numbers_of, rows_of, wire_of
from torchft.quantization.scale import LEAST_SCALE, largest_scale

__all__ = ["Blockwise"]

SCALE_BYTES = 4
WIDEST = 4096
"""The longest block: one program of a GPU holds it whole."""
TILE = 1 << 18
"""Numbers worked on at a time on a CPU: 1 MiB of fp32. With fewer the calls themselves take longer
than a smaller cache saves."""


class Tile(NamedTuple):
    """Numbers `start` to `stop` of some rows, in blocks of `width`."""

    rows: slice
    start: int
    stop: int
    width: int

    def of(self, rows: Tensor) -> Tensor:
        """`[rows, n]` → `[r, blocks, width]`, a view."""
        return rows[self.rows, self.start : self.stop].unflatten(-1, (-1, self.width))


class Blockwise(Codec):
    """What integers and small floats have in common: blocks, scales, tiles."""

    kind: str
    """Of the codes."""
    limit: float
    """The largest code."""
    usual_block: int
    relative: float = 0.0
    step: float
    """A number changes by at most `relative`·|x| + `step`·(largest size in its block)."""

    def __init__(self, block: int | None = None) -> None:
        self.block = self.usual_block if block is None else block
        if not 16 <= self.block <= WIDEST or self.block & (self.block - 1):
            raise SettingsError(f"block is {block}, but must be a power of two, 16 to {WIDEST}")
        own = "" if self.block == self.usual_block else f"/{self.block}"
        self.name = self.kind + own

    # ------------------------------------------------------------------ what kinds differ in

    @abstractmethod
    def code_bytes(self, n: int) -> int:
        """How many bytes `n` codes take, without scales."""

    @abstractmethod
    def pack(self, scaled: Tensor, codes: Tensor) -> None:
        """Round `[r, m]` numbers within ±limit to uint8 codes; `scaled` may be overwritten."""

    @abstractmethod
    def unpack(self, codes: Tensor, numbers: Tensor) -> None:
        """Codes to fp32 `[r, m]`, still to be multiplied with `unit` and the scale."""

    unit: float = 1.0
    """What `unpack` leaves out; a power of two."""

    # ------------------------------------------------------------------ what they share

    def encoded_bytes(self, n: int) -> int:
        """How many bytes the scales and codes of `n` numbers take."""
        return SCALE_BYTES * self._blocks(n) + self.code_bytes(n)

    @torch.no_grad()
    def encode(self, values: Tensor) -> Tensor:
        """Two passes over each tile: the largest sizes, then the codes."""
        rows = numbers_of(values)
        count, n = rows.shape
        edge = SCALE_BYTES * self._blocks(n)
        scales = rows.new_empty((count, self._blocks(n)), dtype=torch.float32)
        encoded = rows.new_empty((count, self.encoded_bytes(n)), dtype=torch.uint8)
        codes = encoded[:, edge:]
        if kernels.serve(rows):
            kernels.encode(self.kind, self.block, rows, scales, codes)
        else:
            self._encode_tiles(rows, scales, codes)
        encoded[:, :edge] = scales.view(-1).view(torch.uint8).view(count, edge)
        return encoded.view(*values.shape[:-1], encoded.shape[1])

    def decode(
        self,
        encoded: Tensor,
        n: int,
        dtype: torch.dtype = torch.float32,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Codes times scales, in fp32, cast to `dtype`."""
        if out is None:
            out = encoded.new_empty((*encoded.shape[:-1], n), dtype=dtype)
        return self._decode(encoded, out, add=False)

    def decode_add_(self, total: Tensor, encoded: Tensor) -> Tensor:
        """Decode and add tile by tile, so that no second row is in memory."""
        return self._decode(encoded, total, add=True)

    @torch.no_grad()
    def error_bound(self, values: Tensor) -> Tensor:
        """relative·|x| + step·(largest of the block) + limit·2⁻¹¹⁵."""
        rows = numbers_of(values).to(torch.float32)
        bound = rows.abs()
        for tile in _tiles(rows, self.block):
            sizes = tile.of(bound)
            peak = sizes.amax(-1, keepdim=True)
            sizes.mul_(self.relative).add_(self.step * peak)
        return bound.add_(2 * self.limit * LEAST_SCALE).view(values.shape)

    def _blocks(self, n: int) -> int:
        return -(-n // self.block)

    def _encode_tiles(self, rows: Tensor, scales: Tensor, codes: Tensor) -> None:
        work = _workspace(rows)
        for tile in _tiles(rows, self.block):
            source = tile.of(rows).to(torch.float32)
            scaled = work[: source.numel()].view(source.shape)
            scale, inverse = self._scales(torch.abs(source, out=scaled).amax(-1))
            torch.mul(source, inverse.unsqueeze(-1), out=scaled)
            broken = scale.isnan()
            if rows.device.type != "cpu" or bool(broken.any()):
                scaled.masked_fill_(broken.unsqueeze(-1), 0.0)
            self._blocks_in(scales, tile).copy_(scale)
            self.pack(scaled.flatten(1), self._codes_in(codes, tile))

    def _scales(self, peak: Tensor) -> tuple[Tensor, Tensor]:
        """What to multiply codes with, and numbers."""
        broken = ~peak.isfinite()
        # By a tensor: some devices multiply with the inverse of a number.
        scale = (peak / peak.new_full((), self.limit)).clamp_max_(largest_scale(self.limit))
        scale.masked_fill_(scale < LEAST_SCALE, 0.0)
        inverse = scale.reciprocal().masked_fill_(scale == 0.0, 0.0)
        return scale.masked_fill_(broken, torch.nan), inverse

    def _decode(self, encoded: Tensor, out: Tensor, *, add: bool) -> Tensor:
        n = out.shape[-1]
        wire = wire_of(encoded, self.encoded_bytes(n))
        rows = rows_of(out)
        if rows.shape[0] != wire.shape[0]:
            raise ValueError(f"{wire.shape[0]} encoded rows do not fit into {tuple(out.shape)}")
        edge = SCALE_BYTES * self._blocks(n)
        scales = wire[:, :edge].reshape(-1).clone().view(torch.float32)
        scales = scales.view(rows.shape[0], self._blocks(n))
        if kernels.serve(rows):
            kernels.decode(self.kind, self.block, scales, wire[:, edge:], rows, add=add)
        else:
            self._decode_tiles(scales.mul_(self.unit), wire[:, edge:], rows, add=add)
        # Where `out` could not be seen as rows, they are a copy of it.
        return out if rows.data_ptr() == out.data_ptr() else into(out, rows.view(out.shape))

    @torch.no_grad()
    def _decode_tiles(self, scales: Tensor, codes: Tensor, rows: Tensor, *, add: bool) -> None:
        work = _workspace(rows)
        for tile in _tiles(rows, self.block):
            target = tile.of(rows)
            numbers = work[: target.numel()].view(target.shape)
            self.unpack(self._codes_in(codes, tile), numbers.flatten(1))
            scale = self._blocks_in(scales, tile).unsqueeze(-1)
            if add:
                target.add_(numbers.mul_(scale))
            elif target.dtype == torch.float32:
                torch.mul(numbers, scale, out=target)
            else:
                target.copy_(numbers.mul_(scale))

    def _blocks_in(self, scales: Tensor, tile: Tile) -> Tensor:
        return scales[tile.rows, tile.start // self.block : self._blocks(tile.stop)]

    def _codes_in(self, codes: Tensor, tile: Tile) -> Tensor:
        return codes[tile.rows, self.code_bytes(tile.start) : self.code_bytes(tile.stop)]


def _workspace(rows: Tensor) -> Tensor:
    numbers = min(rows.numel(), TILE) if rows.device.type == "cpu" else rows.numel()
    return torch.empty(numbers, dtype=torch.float32, device=rows.device)


def _tiles(rows: Tensor, block: int) -> Iterator[Tile]:
    """Whole blocks first, then the short ones at the rows' ends."""
    n = rows.shape[1]
    whole = n - n % block
    yield from _part(rows, 0, whole, block)
    yield from _part(rows, whole, n, n - whole)


def _part(rows: Tensor, start: int, stop: int, width: int) -> Iterator[Tile]:
    """Pieces of long rows, or several short rows at a time."""
    count, length = rows.shape[0], stop - start
    if not count or not length:
        return
    if rows.device.type != "cpu":
        yield Tile(slice(0, count), start, stop, width)
    elif length > TILE:
        for row in range(count):
            for at in range(start, stop, TILE):
                yield Tile(slice(row, row + 1), at, min(at + TILE, stop), width)
    else:
        together = TILE // length
        for row in range(0, count, together):
            yield Tile(slice(row, min(row + together, count)), start, stop, width)
