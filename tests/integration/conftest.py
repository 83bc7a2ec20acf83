"""For all integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from helpers.members import Pair
from torch.distributed import TCPStore

from torchft.process_group import ProcessGroupBabyGloo

CHILDREN_HAVE = timedelta(seconds=60)
"""The timeout of the groups in child processes."""


@pytest.fixture
def store() -> TCPStore:
    """A store of this process, at a free port of 127.0.0.1."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(scope="session")
def two_children() -> Iterator[Pair[ProcessGroupBabyGloo]]:
    """Two groups in child processes, which take seconds to start: all tests share them."""
    pair = Pair(lambda: ProcessGroupBabyGloo(CHILDREN_HAVE, max_active_work=16))
    yield pair
    pair.shutdown()


@pytest.fixture
def baby_pair(
    two_children: Pair[ProcessGroupBabyGloo],
) -> Iterator[Pair[ProcessGroupBabyGloo]]:
    """The two groups with their long timeout, configured among each other."""
    two_children.configure()
    yield two_children
    for member in two_children.members:
        member.set_timeout(CHILDREN_HAVE)
