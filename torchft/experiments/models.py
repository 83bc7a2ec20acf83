"""Small models to try a strategy on. Each takes a batch and returns its loss.

mlp   784-256-128-10, 235 146 parameters                    images and their classes
cnn   two convolutions and two layers, 206 922 parameters   images and their classes
gpt   a byte-level transformer, 136 448 parameters          rows of bytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchft.arguments import check_integer
from torchft.toy.byte_model import ByteTransformer, Shape, next_byte_loss

__all__ = ["MODELS", "Cnn", "Gpt", "Mlp"]

CLASSES = 10


class Mlp(nn.Module):
    """Of images `[batch, …]` of `inputs` numbers each."""

    def __init__(
        self, inputs: int = 784, hidden: Sequence[int] = (256, 128), classes: int = CLASSES
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden]
        for size in (*sizes, classes):
            check_integer("size", size, least=1)
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], classes))

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.layers(images), labels)


class Cnn(nn.Module):
    """Of images `[batch, 1, 28, 28]`."""

    def __init__(self, channels: int = 16, classes: int = CLASSES) -> None:
        super().__init__()
        check_integer("channels", channels, least=1)
        check_integer("classes", classes, least=1)
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * channels * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, batch: Sequence[Tensor]) -> Tensor:
        images, labels = batch
        return functional.cross_entropy(self.layers(images), labels)


class Gpt(nn.Module):
    """Of rows of bytes, uint8 `[batch, context + 1]`: each byte is to be told from those before."""

    def __init__(self, context: int = 64, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        shape = Shape(context=context, width=width, heads=heads, layers=layers)
        self.transformer = ByteTransformer(shape)

    def forward(self, batch: Tensor) -> Tensor:
        tokens = batch.to(torch.int64)
        return next_byte_loss(self.transformer, tokens[:, :-1], tokens[:, 1:])


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": Mlp, "cnn": Cnn, "gpt": Gpt}
