"""A fragment's parameters as one flat row of fp32 that is never made: it is read and written in
spans, so a synchronisation needs memory for one chunk, whatever the model's size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["GatheredRowView", "RowView"]


class RowView:
    """Of parameters in the row's order, of any device and float dtype. `close` after writing."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        # One with gaps or permuted strides has no flat view: it is worked on in a copy.
        self._copies = [(p, p.contiguous()) for p in parameters if not p.is_contiguous()]
        copies = {id(p): copy for p, copy in self._copies}
        self._flats = [copies.get(id(p), p).view(-1) for p in parameters]
        self._starts = [0, *accumulate(flat.numel() for flat in self._flats)]
        self.is_exact = all(p.dtype == torch.float32 for p in parameters)
        """No fp32 number is rounded by writing it."""

    def read(self, span: slice, out: Tensor) -> Tensor:
        """The numbers of `span`, into `out` `[1, m]`."""
        for flat, at in self._in(span):
            out[0, at].copy_(flat)
        return out

    def write(self, span: slice, row: Tensor, mix: float = 0.0) -> None:
        """`row` `[1, m]` into `span`; a share `mix` of what was there stays."""
        for flat, at in self._in(span):
            new = row[0, at].to(flat.device, flat.dtype)
            flat.copy_(torch.lerp(new, flat, mix) if mix else new)

    def rounded(self, span: slice, row: Tensor) -> Tensor:
        """`row` `[1, m]` of `span` as the parameters can hold it."""
        if self.is_exact:
            return row
        out = torch.empty_like(row)
        for flat, at in self._in(span):
            out[0, at].copy_(row[0, at].to(flat.dtype))
        return out

    def close(self) -> None:
        """What was written into copies reaches the parameters."""
        for parameter, copy in self._copies:
            parameter.copy_(copy)

    def _in(self, span: slice) -> Iterator[tuple[Tensor, slice]]:
        """The parts of parameters within a span, and where in it they lie."""
        index = bisect_right(self._starts, span.start) - 1
        while index < len(self._flats) and self._starts[index] < span.stop:
            start, flat = self._starts[index], self._flats[index]
            begin, end = max(span.start, start), min(span.stop, start + flat.numel())
            if begin < end:
                yield flat[begin - start : end - start], slice(begin - span.start, end - span.start)
            index += 1


class GatheredRowView:
    """The same for a worker of several ranks, over the whole row `[1, n]`. `read_all` gathers it
    from them, when it is read first; `write_all` gives it back, with the share that stays. `parts`
    are the parameters' numbers and dtypes in the row's order."""

    def __init__(
        self,
        parts: Sequence[tuple[int, torch.dtype]],
        read_all: Callable[[], Tensor],
        write_all: Callable[[Tensor, float], None],
    ) -> None:
        self._parts, self._read_all, self._write_all = parts, read_all, write_all
        self._row: Tensor | None = None
        self._mix: float | None = None
        self.is_exact = all(dtype == torch.float32 for _, dtype in parts)
        """No fp32 number is rounded by writing it."""

    def read(self, span: slice, out: Tensor) -> Tensor:
        """The numbers of `span`, into `out` `[1, m]`."""
        if self._row is None:
            self._row = self._read_all()
        return out.copy_(self._row[:, span])

    def write(self, span: slice, row: Tensor, mix: float = 0.0) -> None:
        """`row` `[1, m]` into `span`, when all is written: every span has to be."""
        if self._row is None:
            self._row = torch.empty(
                1, sum(numel for numel, _ in self._parts), dtype=torch.float32, device="cpu"
            )
        self._row[:, span].copy_(row)
        self._mix = mix

    def rounded(self, span: slice, row: Tensor) -> Tensor:
        """`row` `[1, m]` of `span` as the parameters can hold it."""
        if self.is_exact:
            return row
        out, start = torch.empty_like(row), 0
        for numel, dtype in self._parts:
            begin, end = max(span.start, start), min(span.stop, start + numel)
            if begin < end:
                at = slice(begin - span.start, end - span.start)
                out[:, at].copy_(row[:, at].to(dtype))
            start += numel
        return out

    def close(self) -> None:
        """What was written reaches the parameters of all ranks."""
        if self._row is not None and self._mix is not None:
            self._write_all(self._row, self._mix)
