"""Workers and a server over real sockets, in threads of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.defaults import other_defaults
from helpers.ps import Fleet, Net, options, train
from helpers.voices import TOKENS, Voice

from torchft.parameter_server import DiLoCoWorker
from torchft.parameter_server.core.rules import Mode
from torchft.parameter_server.server.server import Address, DiLoCoServer


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


class Telling(DiLoCoWorker):
    """Notes after which step what happens to which fragment."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.told: list[str] = []

    def _submit(self) -> Any:
        submission = super()._submit()
        if submission is not None:
            self.told.append(f"{self.local_step}: submit {submission.fragment}")
        return submission

    def _apply(self, submission: Any, update: Any) -> None:
        super()._apply(submission, update)
        self.told.append(f"{self.local_step}: apply {submission.fragment}")


def test_four_fragments_in_five_hundred_steps_as_users_know_it(tmp_path: Path) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with DiLoCoServer(options(tmp_path, 1)) as server:
        worker = Telling(model, optimizer, server.address, sync_every=500, num_fragments=4)
        with worker:
            train(model, optimizer, seed=1, steps=1000)
            told = list(worker.told)
    assert told == [
        "125: submit 0",
        *("250: apply 0", "250: submit 1"),
        *("375: apply 1", "375: submit 2"),
        *("500: apply 2", "500: submit 3"),
        *("625: apply 3", "625: submit 0"),
        *("750: apply 0", "750: submit 1"),
        *("875: apply 1", "875: submit 2"),
        *("1000: apply 2", "1000: submit 3"),
    ]


@pytest.mark.parametrize(
    ("codec", "dtype"), [("fp32", torch.float32), ("int8", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_scripts_own_defaults_change_nothing(
    tmp_path: Path, codec: str, dtype: torch.dtype
) -> None:
    dice = torch.Generator().manual_seed(0)
    inputs = [torch.randn(8, 6, generator=dice).to(dtype) for _ in range(8)]
    opts = options(tmp_path, workers=1, save_every=2, codec=codec, fragments=2, sync_every=4)
    model = Net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with DiLoCoServer(opts, Address(port=0, tokens=TOKENS)) as server:
        token = Voice(server.address).token
        with (
            other_defaults(),
            DiLoCoWorker(model, optimizer, server.address, auth_token=token) as worker,
        ):
            for x in inputs:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        assert worker.sync_count >= 2
    assert all(
        p.dtype == dtype and bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad
    )
