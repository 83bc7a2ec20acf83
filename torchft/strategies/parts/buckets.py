"""Flat tensors cut into buckets, so that one collective never carries more than so many bytes.

A bucket is a slice of a flat tensor: it has one dtype, and no parameter is too large or too ragged.

    [1, 48] float32, buckets of 64 bytes   →   [1, 16], [1, 16], [1, 16]
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["cut", "join"]


def cut(flats: Sequence[Tensor], bucket_bytes: int) -> list[Tensor]:
    """Slices of at most `bucket_bytes`, at least one element, that cover `flats` in order."""
    buckets: list[Tensor] = []
    for flat in flats:
        if flat.shape[-1] == 0:
            continue
        elements = max(1, bucket_bytes // flat.element_size())
        buckets.extend(flat.split(elements, dim=-1))
    return buckets


def join(buckets: Sequence[Tensor], flats: Sequence[Tensor]) -> list[Tensor]:
    """Bring what became of the buckets back together in `flats`, which they were cut from.

    A bucket that was worked on in place is there already.
    """
    places = iter(buckets)
    for flat in flats:
        start = 0
        while start < flat.shape[-1]:
            bucket = next(places)
            place = flat[..., start : start + bucket.shape[-1]]
            if place.data_ptr() != bucket.data_ptr():
                place.copy_(bucket)
            start += bucket.shape[-1]
    return list(flats)
