"""What a mean over encoded rows is: the result that every member of a quantised all-reduce gets.

    members' rows → chunks, one for each member → encoded → decoded, summed in fp32 in the members'
    order, divided by their number → encoded → decoded

Both codings lose something: the first on each row, the second on the mean. All members decode the
same bytes, so they get equal bits. Where rows stand in one process, as in a simulator, this gives
the bits that processes get. What the codings lost can be had too, for error feedback.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchft.ordered import chunk_of, ordered_mean
from torchft.quantization.codec import Codec, rows_of

__all__ = ["add_lost", "mean_bytes", "quantized_mean", "take_said"]


@torch.no_grad()
def quantized_mean(
    rows: Tensor,
    codec: Codec,
    which: Sequence[int] | None = None,
    error_feedback: Tensor | None = None,
) -> Tensor:
    """`[members, …]` → `[1, …]`, the mean of `which` (default all), in the dtype of `rows`.

    `error_feedback`, fp32 or fp64, of the shape of `rows`. In: the exact values. Out: the
    quantisation error of each row: of its own coding, and of that of the mean of the chunk that is
    its to sum.

    Raises:
        ValueError: there is no row to average.
    """
    members, n = rows.shape[0], rows[0].numel()
    chunk = chunk_of(n, members)
    padded = pad(rows_of(rows.flatten(1)), (0, chunk * members - n)).view(members, members, chunk)
    said = codec.decode(codec.encode(padded), chunk)
    total = ordered_mean(said, which)
    mean = codec.decode(codec.encode(total), chunk)
    if error_feedback is not None:
        counted = members if which is None else len(which)
        for member in range(members):
            take_said(error_feedback[member], said[member])
            add_lost(error_feedback[member], member, total[0, member], mean[0, member], counted)
    return mean.view(1, -1)[:, :n].reshape(1, *rows.shape[1:]).to(rows.dtype)


@torch.no_grad()
def take_said(error_feedback: Tensor, said: Tensor, first: int = 0) -> None:
    """Take chunks off what one row should say: `said` `[k, chunk]`, of which the first is number
    `first` of the row. What reaches beyond its end was padding."""
    part = error_feedback.view(-1)[first * said.shape[-1] :][: said.numel()]
    part.sub_(said.reshape(-1)[: part.numel()])


@torch.no_grad()
def add_lost(error_feedback: Tensor, chunk: int, mean: Tensor, sent: Tensor, counted: int) -> None:
    """Add to one row what the mean of chunk number `chunk` lost when it was encoded to `sent`.

    All share a mean, and the next one divides by their number: whoever adds it adds it for all.
    """
    lost = (mean - sent).view(-1).mul_(counted)
    part = error_feedback.view(-1)[chunk * lost.numel() :][: lost.numel()]
    part.add_(lost[: part.numel()])


def mean_bytes(codec: Codec, elements: int, members: int) -> int:
    """What each member sends: chunks to their summers, and its own to all. Headers not counted."""
    return 2 * (members - 1) * codec.encoded_bytes(chunk_of(elements, members))
