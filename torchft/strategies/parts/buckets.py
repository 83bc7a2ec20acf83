"""Flat tensors cut into buckets, so that one collective never carries more than so many bytes.

A bucket is a slice of a flat tensor: it has one dtype, and no parameter is too large or too ragged.

    [1, 48] float32, buckets of 64 bytes   →   [1, 16], [1, 16], [1, 16]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["cut", "join"]


def cut(
    flats: Sequence[Tensor], bucket_bytes: int, like: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Slices of at most `bucket_bytes`, at least one element, that cover `flats` in order; with
    `like`, as many elements in each as a slice of that one has."""
    buckets: list[Tensor] = []
    for flat, measure in zip(flats, flats if like is None else like, strict=True):
        if flat.shape[-1] == 0:
            continue
        elements = max(1, bucket_bytes // measure.element_size())
        buckets.extend(flat.split(elements, dim=-1))
    return buckets


def join(buckets: Sequence[Tensor], flats: Sequence[Tensor]) -> list[Tensor]:
    """What became of the buckets, one tensor for each of `flats`, which they were cut from.

    Where all were worked on in place that is the flat tensor itself; else it is made anew, with as
    many rows as the buckets have, and the flat tensor stands.
    """
    rest = iter(buckets)
    return [_whole(flat, rest) for flat in flats]


def _whole(flat: Tensor, rest: Iterator[Tensor]) -> Tensor:
    parts: list[Tensor] = []
    start = 0
    in_place = True
    while start < flat.shape[-1]:
        part = next(rest)
        place = flat[..., start : start + part.shape[-1]]
        in_place &= part.shape == place.shape and part.data_ptr() == place.data_ptr()
        parts.append(part)
        start += part.shape[-1]
    return flat if in_place else torch.cat(parts, dim=-1)
