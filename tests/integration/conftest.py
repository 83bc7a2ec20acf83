"""For all integration tests."""

from __future__ import annotations

import pytest
from torch.distributed import TCPStore


@pytest.fixture
def store() -> TCPStore:
    """A store of this process, at a free port of 127.0.0.1."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
