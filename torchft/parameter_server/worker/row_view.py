"""A fragment's parameters as one flat row of fp32 that is never made: it is read and written in
spans, so a synchronisation needs memory for one chunk, whatever the model's size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from torchft.strategies.parts.deltas import delta_into, mixed

__all__ = ["RowView"]


class RowView:
    """Parameters one after the other, of any device and float dtype. Call `close` after writing.

    Args:
        flats: where the numbers of each parameter lie, `[n]` each.
        dtypes: of the parameters, which may hold fewer digits than `flats`.
        publish: brings what was written into `flats` to the parameters, where that is elsewhere.
    """

    def __init__(
        self,
        flats: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        publish: Callable[[], None],
    ) -> None:
        self._flats, self._dtypes, self._publish = flats, dtypes, publish
        self._starts = [0, *accumulate(flat.numel() for flat in flats)]
        self._written = False
        self.is_exact = all(dtype == torch.float32 for dtype in dtypes)
        """No fp32 number is rounded by writing it."""

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> Self:
        """The row of parameters in this process, in place."""
        # One with gaps or permuted strides has no flat view: it is worked on in a copy.
        held = [parameter.contiguous() for parameter in parameters]

        def publish() -> None:
            for parameter, copy in zip(parameters, held, strict=True):
                if copy is not parameter:
                    parameter.copy_(copy)

        return cls([one.view(-1) for one in held], [p.dtype for p in parameters], publish)

    def delta(self, span: slice, base: Tensor, out: Tensor) -> Tensor:
        """`base` minus the numbers of `span`, into `out`; both fp32 `[1, m]` on the CPU."""
        for position, flat, at in self._in(span):
            delta_into(out[0, at], base[0, at], flat, self._dtypes[position])
        return out

    def write(self, span: slice, row: Tensor, mix: float = 0.0) -> None:
        """`row` `[1, m]` into `span`; a share `mix` of what was there stays."""
        self._written = True
        for _, flat, at in self._in(span):
            new = row[0, at].to(flat.device, flat.dtype)
            flat.copy_(mixed(new, flat, mix) if mix else new)

    def rounded(self, span: slice, row: Tensor) -> Tensor:
        """A copy of `row` `[1, m]` of `span`, as the parameters can hold it."""
        out = torch.empty_like(row)
        for position, _, at in self._in(span):
            out[0, at].copy_(row[0, at].to(self._dtypes[position]))
        return out

    def close(self) -> None:
        """Bring what was written to the parameters, at all ranks."""
        if self._written:
            self._publish()

    def _in(self, span: slice) -> Iterator[tuple[int, Tensor, slice]]:
        """Positions and parts of parameters within a span, and where in it they lie."""
        index = bisect_right(self._starts, span.start) - 1
        while index < len(self._flats) and self._starts[index] < span.stop:
            start, flat = self._starts[index], self._flats[index]
            begin, end = max(span.start, start), min(span.stop, start + flat.numel())
            if begin < end:
                part = flat[begin - start : end - start]
                yield index, part, slice(begin - span.start, end - span.start)
            index += 1
