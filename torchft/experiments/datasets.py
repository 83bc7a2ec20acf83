"""Data to try a strategy on, without a download: digits from scikit-learn, text from this machine.

Each gives a pair of data sets that are cut a batch at a time: for training, and held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from torchft.errors import SettingsError
from torchft.toy.corpus import ByteCorpus, CorpusError

__all__ = ["digits", "text"]

_SIDE, _DRAWN = 28, 20
_HELD_OUT = 360
"""Of scikit-learn's 1797 digits; no image that is trained on is made from them."""


def digits(train: int = 60_000, held_out: int = 2_048) -> tuple[TensorDataset, TensorDataset]:
    """Images `[n, 1, 28, 28]` and their classes, made from scikit-learn's handwritten digits: each
    is enlarged, moved, and given another contrast and noise. The same at every call.

    Raises:
        SettingsError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise SettingsError(
            f"the digits come with scikit-learn, which is not installed ({error}): install "
            "torchft[simulate], or use --model gpt, whose text is on this machine"
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32, device="cpu").view(-1, 1, 8, 8) / 16
    labels = torch.tensor(classes, dtype=torch.int64, device="cpu")
    dice = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=dice, device="cpu")
    for_training, kept = order[_HELD_OUT:], order[:_HELD_OUT]
    return (
        _varied(images[for_training], labels[for_training], train, dice),
        _varied(images[kept], labels[kept], held_out, dice),
    )


def _varied(images: Tensor, labels: Tensor, count: int, dice: torch.Generator) -> TensorDataset:
    picked = torch.randint(len(images), (count,), generator=dice, device="cpu")
    enlarged = functional.interpolate(
        images[picked], size=(_DRAWN, _DRAWN), mode="bilinear", align_corners=False
    )
    room = _SIDE - _DRAWN + 1
    top, left = torch.randint(room, (2, count, 1, 1), generator=dice, device="cpu")
    line = torch.arange(_DRAWN, device="cpu")
    canvas = torch.zeros(count, 1, _SIDE, _SIDE, dtype=torch.float32, device="cpu")
    canvas[
        torch.arange(count, device="cpu").view(-1, 1, 1),
        0,
        top + line.view(1, -1, 1),
        left + line.view(1, 1, -1),
    ] = enlarged[:, 0]
    canvas *= 0.6 + 0.8 * torch.rand(
        count, 1, 1, 1, generator=dice, dtype=torch.float32, device="cpu"
    )
    canvas += 0.3 * torch.randn(canvas.shape, generator=dice, dtype=torch.float32, device="cpu")
    return TensorDataset((canvas - 0.2) / 0.4, labels[picked])


def text(paths: Sequence[Path] = (), *, context: int = 64) -> tuple[Tensor, Tensor]:
    """Rows of bytes, uint8 `[n, context + 1]`, of files and folders, or of the standard library's
    sources; the last tenth of the bytes is held out.

    Raises:
        SettingsError: a path cannot be read, or there is too little text.
    """
    try:
        corpus = ByteCorpus.load(paths)
    except CorpusError as error:
        raise SettingsError(str(error).replace("--corpus", "--data")) from error
    return _rows(corpus.train, context, corpus), _rows(corpus.held_out, context, corpus)


def _rows(stream: Tensor, context: int, corpus: ByteCorpus) -> Tensor:
    rows = (len(stream) - 1) // context
    if rows < 1:
        raise SettingsError(
            f"{corpus.source} is too short: {len(stream)} bytes, and one row needs {context + 1}"
        )
    starts = torch.arange(rows, device="cpu").view(-1, 1) * context
    return stream[starts + torch.arange(context + 1, device="cpu")]
