"""What a mean over encoded rows is: the result that every member of a quantised all-reduce gets.

    members' rows → chunks, one for each member → encoded → decoded, summed in fp32 in the members'
    order, divided by their number → encoded → decoded

Both codings lose something: the first on each row, the second on the mean. All members decode the
same bytes, so they get equal bits. Where rows stand in one process, as in a simulator, this gives
the bits that processes get.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchft.ordered import chunk_of, ordered_mean
from torchft.quantization.codec import Codec, rows_of

__all__ = ["mean_bytes", "quantized_mean"]


@torch.no_grad()
def quantized_mean(rows: Tensor, codec: Codec, which: Sequence[int] | None = None) -> Tensor:
    """`[members, …]` → `[1, …]`, the mean of `which` (default all), in the dtype of `rows`.

    Raises:
        ValueError: there is no row to average.
    """
    members, n = rows.shape[0], rows[0].numel()
    chunk = chunk_of(n, members)
    padded = pad(rows_of(rows.flatten(1)), (0, chunk * members - n)).view(members, members, chunk)
    total = ordered_mean(codec.decode(codec.encode(padded), chunk), which)
    mean = codec.decode(codec.encode(total), chunk)
    return mean.view(1, -1)[:, :n].reshape(1, *rows.shape[1:]).to(rows.dtype)


def mean_bytes(codec: Codec, elements: int, members: int) -> int:
    """What each member sends: chunks to their summers, and its own to all. Headers not counted."""
    return 2 * (members - 1) * codec.encoded_bytes(chunk_of(elements, members))
