"""The pictures of examples/mnist.py: MNIST as torchvision keeps it, and what is used without it."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from pictures import NotThere, digits, mnist  # noqa: E402

UNSIGNED_BYTES = 8
"""How IDX files name the type of their numbers."""


def write_idx(path: Path, numbers: Tensor) -> None:
    header = struct.pack(">BBBB", 0, 0, UNSIGNED_BYTES, numbers.dim())
    sizes = struct.pack(f">{numbers.dim()}I", *numbers.shape)
    path.write_bytes(header + sizes + numbers.to(torch.uint8).numpy().tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pictures to train on and five others; picture i is all i, and of class i."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 7), ("t10k", 5)):
        labels = torch.arange(count)
        write_idx(raw / f"{part}-labels-idx1-ubyte", labels)
        write_idx(raw / f"{part}-images-idx3-ubyte", labels[:, None, None].expand(count, 28, 28))
    return tmp_path


def test_mnist_is_read_from_the_files_that_torchvision_keeps(folder: Path) -> None:
    pictures = mnist(folder)
    train, train_labels = pictures.train.tensors
    held_out, held_out_labels = pictures.held_out.tensors
    assert (train.shape, held_out.shape) == ((7, 1, 28, 28), (5, 1, 28, 28))
    assert (train_labels.tolist(), held_out_labels.tolist()) == (list(range(7)), list(range(5)))
    assert str(folder) in pictures.name


def test_a_picture_is_scaled_by_the_mean_and_the_spread_of_mnist(folder: Path) -> None:
    third = mnist(folder).train[3][0]
    assert torch.allclose(third, torch.full((1, 28, 28), (3 / 255 - 0.1307) / 0.3081))


def test_a_folder_without_mnist_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotThere, match=f"no MNIST in {tmp_path}"):
        mnist(tmp_path)


def test_the_digits_have_the_shape_of_mnist() -> None:
    pictures = digits(64, 32)
    for part, count in ((pictures.train, 64), (pictures.held_out, 32)):
        images, labels = part.tensors
        assert (images.shape, images.dtype) == ((count, 1, 28, 28), torch.float32)
        assert labels.shape == (count,)
