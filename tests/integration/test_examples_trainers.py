"""The examples for Lightning's and Hugging Face's Trainer, as they are: a group is killed and comes
back, and both end at the same step with equal weights, moments and schedules."""

from __future__ import annotations

import importlib
import io
import os
import re
import runpy
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from world import KILLED, Group, World

from torchft.manager import Manager

EXAMPLES = Path(__file__).parents[2] / "examples"
DIES, WAITS, STEPS = 5, 20, 30

Vote = Callable[..., bool]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("example", "loaded"),
    [
        ("lightning_module.py", ("lightning", "sklearn.datasets")),
        ("hf_trainer.py", ("transformers.trainer", "transformers.models.llama.modeling_llama")),
    ],
)
def test_a_group_of_a_trainer_is_killed_and_comes_back(
    tmp_path: Path, example: str, loaded: tuple[str, ...]
) -> None:
    for module in loaded:
        importlib.import_module(module)  # once, before the groups fork
    world = World(tmp_path, join_timeout_ms=2_000, deadline_s=200)
    stories = [lambda group, one=one: one(group, example) for one in (stays, dies, comes_back)]
    one, killed, other = world.run(*stories)
    assert killed == KILLED
    assert one == other
    assert one.startswith(f"step {STEPS}, digest ")


def stays(group: Group, example: str) -> str:
    def vote(manager: Manager, vote_as_usual: Vote) -> bool:
        if manager.current_step() >= WAITS and manager.num_participants() == 1:
            time.sleep(0.05)
            manager.report_error(RuntimeError("the test waits for the other group"))
        return vote_as_usual()

    return run(group, example, vote)


def dies(group: Group, example: str) -> str:
    def vote(manager: Manager, vote_as_usual: Vote) -> bool:
        if manager.current_step() >= DIES and manager.num_participants() == 2:
            group.world.happen("killed")
            group.dies()
        return vote_as_usual()

    return run(group, example, vote)


def comes_back(group: Group, example: str) -> str:
    group.world.wait("killed")
    return run(group, example, lambda manager, vote_as_usual: vote_as_usual())


def run(group: Group, example: str, vote: Callable[[Manager, Vote], bool]) -> str:
    """What the example says at the end; `vote` is called in place of each vote."""
    usual = Manager.should_commit

    def should_commit(manager: Manager, *given: Any) -> bool:
        return vote(manager, lambda: usual(manager, *given))

    Manager.should_commit = should_commit  # type: ignore[method-assign]
    os.environ.update(group.environment(), STEPS=str(STEPS))
    os.chdir(group.world.folder)
    with redirect_stdout(io.StringIO()) as said:
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    found = re.findall(r"step \d+, digest \w+", said.getvalue())
    return str(found[-1])
