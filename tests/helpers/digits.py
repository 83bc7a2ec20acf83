"""Pictures to learn from, without a download: scikit-learn's small digits, made large and varied.

Each of the 1 797 digits of 8 by 8 dots is drawn many times on 28 by 28: enlarged to 20 by 20, at a
random place, with random contrast and noise. Digits that validation shows are in no training
picture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["digits"]

TRAINING_DIGITS = 1437


def digits(train: int, validation: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures `[n, 1, 28, 28]` and classes, to train on and to validate with; always the same."""
    from sklearn.datasets import load_digits

    small, classes = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    large = interpolate(small.float().view(-1, 1, 8, 8) / 16, size=(20, 20), mode="bilinear")
    draw = torch.Generator().manual_seed(0)
    order = torch.randperm(len(large), generator=draw)
    parts = (order[:TRAINING_DIGITS], train), (order[TRAINING_DIGITS:], validation)
    made: list[Tensor] = []
    for which, count in parts:
        chosen = which[torch.randint(len(which), (count,), generator=draw)]
        made += [_placed(large[chosen], draw), classes[chosen]]
    return made[0], made[1], made[2], made[3]


def _placed(pictures: Tensor, draw: torch.Generator) -> Tensor:
    count = len(pictures)
    canvas = torch.zeros(count, 1, 28, 28)
    lefts, tops = (torch.randint(0, 9, (count,), generator=draw).tolist() for _ in range(2))
    for picture, top, left, into in zip(pictures, tops, lefts, canvas, strict=True):
        into[:, top : top + 20, left : left + 20] = picture
    contrast = 0.6 + 0.8 * torch.rand(count, 1, 1, 1, generator=draw)
    noise = 0.3 * torch.randn(canvas.shape, generator=draw)
    return (canvas * contrast + noise - 0.2) / 0.4
