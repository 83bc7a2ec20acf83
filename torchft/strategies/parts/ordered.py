"""The one sum over nodes whose bits do not depend on where it is done: see `torchft.ordered`."""

from torchft.ordered import ordered_mean, ordered_sum

__all__ = ["ordered_mean", "ordered_sum"]
