"""For all tests: one thread per operation, so that they neither compete nor differ by machine, and
no property fails because the machine is busy."""

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")
# Where the tests run in the background, SIGINT is ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test writes into its folder is gone afterwards."""
    monkeypatch.chdir(tmp_path)
