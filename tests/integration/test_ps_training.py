"""Workers and a server over real sockets, in threads of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.ps import Fleet, options

from torchft.parameter_server.rules import Mode
from torchft.parameter_server.server import DiLoCoServer


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "int4"])
def test_two_workers_end_with_equal_weights(tmp_path: Path, codec: str) -> None:
    with DiLoCoServer(options(tmp_path)) as server:
        fleet = Fleet(server.address, codec=codec)
        fleet.run("a", 20, seed=1)
        fleet.run("b", 20, seed=2)
        fleet.join()
    assert torch.equal(fleet.weights("a"), fleet.weights("b"))
    assert fleet.workers["a"].sync_count == 4


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("fragments", [1, 3])
def test_every_mode_whole_and_in_fragments(tmp_path: Path, mode: Mode, fragments: int) -> None:
    with DiLoCoServer(options(tmp_path, mode=mode, grace_s=1.0)) as server:
        fleet = Fleet(server.address, num_fragments=fragments, sync_every=7, codec="int8")
        fleet.run("a", 30, seed=1)
        fleet.run("b", 30, seed=2)
        fleet.join()
    for worker in fleet.workers.values():
        assert worker.sync_count >= 4 * fragments
