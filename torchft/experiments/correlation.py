"""How alike the nodes are: the Pearson coefficient of their weights, and how far these spread.

    correlation   mean over all pairs of nodes of Pearson(weights of one, weights of the other)
    variance      mean over all weights of their variance among the nodes

Both take the weights that are trained, as one long vector per node. Nodes that have just
synchronised have correlation 1 and variance 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Correlation", "correlation"]

_CHUNK = 1 << 18
"""Weights of a node at a time, so that the copies in double precision stay small."""


@dataclass(frozen=True)
class Correlation:
    """One comparison of the nodes' weights at one step."""

    nodes: int
    pearson: float | None
    """None where it is not defined: fewer than two nodes, or a node whose weights are all equal."""
    variance: float | None
    """None for fewer than two nodes."""

    def __str__(self) -> str:
        if self.variance is None:
            return f"{self.nodes} node: nothing to correlate with"
        pearson = "not defined" if self.pearson is None else f"{self.pearson:.6f}"
        return f"{self.nodes} nodes: correlation {pearson}, variance {self.variance:.3g}"


@torch.no_grad()
def correlation(flats: Sequence[Tensor]) -> Correlation:
    """Of the rows of `flats`, each `[nodes, n]`: together they are the weights of the nodes."""
    nodes = flats[0].shape[0]
    if nodes < 2:
        return Correlation(nodes, None, None)
    count = sum(flat.shape[1] for flat in flats)
    means = torch.stack([rows.sum(1) for rows in _chunks(flats)]).sum(0) / count
    products = torch.zeros(nodes, nodes, dtype=torch.float64, device="cpu")
    spread = 0.0
    for rows in _chunks(flats):
        spread += (rows - rows.mean(0)).square().sum().item()
        centred = rows - means[:, None]
        products += centred @ centred.T
    return Correlation(nodes, _mean_pearson(products), spread / (count * (nodes - 1)))


def _chunks(flats: Sequence[Tensor]) -> Iterator[Tensor]:
    for flat in flats:
        for chunk in flat.split(_CHUNK, dim=1):
            yield chunk.to("cpu", torch.float64)


def _mean_pearson(products: Tensor) -> float | None:
    """The mean above the diagonal, each product divided by the two lengths."""
    lengths = products.diagonal().sqrt()
    if not bool((lengths > 0).all()):
        return None
    nodes = len(products)
    above = torch.triu_indices(nodes, nodes, offset=1)
    pairs = (products / torch.outer(lengths, lengths))[above[0], above[1]]
    return pairs.clamp(-1, 1).mean().item()
