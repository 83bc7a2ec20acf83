"""Of each chunk the k numbers that are largest in magnitude: what sparse recipes send.

Chunks come as `[rows, m, size]`, one tensor for each size. What travels is, for each dtype, one row
of small integers (where in its chunk; int16 up to 32 768 numbers a chunk) and one of values:

    k = 1, [[[0., 3., -4.], [5., 0., 1.]]]   →   [[2, 0]] int16, [[-4., 5.]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["MEAN_OVER", "MEMBERS", "SENDERS", "largest", "mean_of", "packed"]

MEAN_OVER = MEMBERS, SENDERS = "members", "senders"
"""What a sum is divided by: all that take part, or those that sent a number for that place."""

_Kind = tuple[torch.dtype, torch.device]


def largest(chunks: Sequence[Tensor], k: int) -> list[Tensor]:
    """Where they are: int64 `[rows, m, min(k, size)]`."""
    return [c.abs().topk(min(k, c.shape[-1]), dim=-1, sorted=False).indices for c in chunks]


def packed(chunks: Sequence[Tensor], where: Sequence[Tensor]) -> list[Tensor]:
    """Indices and values to send, `[rows, n]` each, in turn for each dtype."""
    out: list[Tensor] = []
    for members in _kinds(chunks):
        rows = chunks[members[0]].shape[0]
        small = _index_type(chunks[i].shape[-1] for i in members)
        indices = [where[i].to(small).view(rows, -1) for i in members]
        values = [chunks[i].gather(-1, where[i]).view(rows, -1) for i in members]
        out += [torch.cat(indices, dim=1), torch.cat(values, dim=1)]
    return out


def mean_of(
    received: Sequence[Tensor], like: Sequence[Tensor], k: int, mean_over: str = MEMBERS
) -> list[Tensor]:
    """The mean of what was sent, zero where nothing was, `[m, size]` for each of `like`: over all
    rows, or at each place over those that sent one. Rows are added one by one in order, as in
    `ordered_sum`."""
    out = [torch.zeros(c.shape[1:], dtype=c.dtype, device=c.device) for c in like]
    pairs = iter(received)
    for members in _kinds(like):
        indices, values = next(pairs), next(pairs)
        counts = [c.shape[0] * min(k, c.shape[1]) for c in (out[i] for i in members)]
        columns = zip(indices.split(counts, 1), values.split(counts, 1), strict=True)
        for i, (where, what) in zip(members, columns, strict=True):
            _add_rows(out[i], where, what)
            if mean_over == MEMBERS:
                out[i].div_(indices.shape[0])
            else:
                senders = torch.zeros_like(out[i])
                _add_rows(senders, where, torch.ones_like(what))
                out[i].div_(senders.clamp_(min=1))
    return out


def _add_rows(total: Tensor, where: Tensor, what: Tensor) -> None:
    m = total.shape[0]
    for at, value in zip(where, what, strict=True):
        total.scatter_add_(1, at.view(m, -1).long(), value.view(m, -1))


def _kinds(chunks: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors of each dtype and device."""
    kinds: dict[_Kind, list[int]] = {}
    for position, chunk in enumerate(chunks):
        kinds.setdefault((chunk.dtype, chunk.device), []).append(position)
    return list(kinds.values())


def _index_type(sizes: Iterator[int]) -> torch.dtype:
    return torch.int16 if max(sizes) <= torch.iinfo(torch.int16).max + 1 else torch.int32
