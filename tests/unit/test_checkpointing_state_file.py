"""States in files: what was written comes back, and what was damaged is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from torchft.checkpointing.layout import LayoutError
from torchft.checkpointing.state_file import read_state, write_state
from torchft.digest import digest

STATE: dict[str, Any] = {
    "rows": [{"weights": torch.arange(7.0)[None], "sent": None, "version": 3}],
    "half": torch.ones(3, 2, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
    "words": {"codec": "int8", "exact": 0.1, "many": 1 << 60},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with (tmp_path / "state.bin").open("wb") as file:
        write_state(file, STATE, 42)
    return tmp_path / "state.bin"


def test_a_state_comes_back_as_it_was(path: Path) -> None:
    step, state = read_state(path)
    assert step == 42
    assert digest(state) == digest(STATE)


def test_a_file_that_is_cut_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(LayoutError):
            read_state(path)


def test_numbers_that_were_damaged_are_refused(path: Path) -> None:
    whole = path.read_bytes()
    at = whole.index(torch.arange(7.0).numpy().tobytes())
    for position in range(at, at + 28, 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(LayoutError, match=r"the checksum of .* does not match"):
            read_state(path)


def test_something_else_is_refused(path: Path) -> None:
    for other in (b"", b"\x00" * 4096, b"PK\x03\x04" + b"x" * 4096):
        path.write_bytes(other)
        with pytest.raises(LayoutError):
            read_state(path)
    with pytest.raises(OSError, match="No such file"):
        read_state(path.with_name("absent"))
