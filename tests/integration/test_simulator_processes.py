"""What the simulator starts beside itself: processes that load data, and those of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.datasets import Fails, Samples
from helpers.small_runs import bits, fit, odd, pairs
from helpers.sweeps import TINY

from torchft.experiments.config import SimulateConfig, from_mapping
from torchft.experiments.sweep import run_sweep
from torchft.simulator import NodeError
from torchft.simulator.feed import Feed

LOADED_APART = {"num_workers": 1}


pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


def test_worker_processes_load_the_same_batches() -> None:
    def feed(**settings: Any) -> Feed:
        return Feed(Samples(), num_nodes=3, batch_size=2, seed=1, **settings)

    one = feed(dataloader_kwargs=LOADED_APART)
    for step in (2, 3, 0):
        mine, here = one.batch(1, step), feed().batch(1, step)
        assert torch.equal(mine["i"], here["i"])
        assert torch.equal(mine["noise"], here["noise"])
    one.close()


def test_loading_in_other_processes_gives_the_same_run() -> None:
    here = fit(val=pairs(20)).result
    there = fit(val=pairs(20), dataloader_kwargs=LOADED_APART, run_name="there").result
    assert here is not None and there is not None
    assert bits(here) == bits(there)


def test_a_process_whose_data_fail_says_at_which_node_and_step() -> None:
    with pytest.raises(NodeError, match=r"batch of node 1 in step 1: KeyError: .*image") as found:
        fit(
            odd(),
            Fails(*pairs()[0]),
            shuffle=False,
            minibatch_size=8,
            dataloader_kwargs=LOADED_APART,
        )
    assert isinstance(found.value.__cause__, KeyError)


def test_processes_find_what_one_finds_and_survive_a_killed_one(tmp_path: Path) -> None:
    def tiny(**changes: Any) -> SimulateConfig:
        return from_mapping({**TINY, **changes})

    killed = f"{TINY['model'].partition(':')[0]}:killed"
    apart = run_sweep(tiny(strategies=["all_reduce", killed, "diloco"]), tmp_path / "apart", jobs=2)
    (failure,) = apart.failures
    assert failure.spec.strategy.name == killed
    assert failure.error == "its process was killed by SIGKILL"
    here = run_sweep(tiny(), tmp_path / "here")
    for one, other in zip(apart.reports, here.reports, strict=True):
        assert one.losses == other.losses
        assert one.validations == other.validations
