"""Nine strategies by `Replicated`: a group is killed, comes back, and all hold equal bits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import replicated_train
from helpers.coordination import free_port, lighthouse
from helpers.documents import ROOT, blocks_of
from helpers.replicated_train import ADAMW, KILLED, STEPS, STRATEGIES, train
from helpers.torchrun import Torchrun
from world import KILLED as WAS_KILLED
from world import Group, World

from torchft.digest import digest

# torch loads its compiler when a process makes its first optimizer: once, before the groups fork.
ADAMW.build([torch.nn.Parameter(torch.zeros(1))])

UNDER_TORCHRUN = ("all-reduce", "Streaming DiLoCo")
"""The short version; the others are slow."""


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_group_is_killed_another_comes_in_its_place_and_all_are_equal(
    tmp_path: Path, name: str
) -> None:
    def survivor(group: Group) -> tuple[int, str]:
        return run(group, lambda _: None)

    def victim(group: Group) -> tuple[int, str]:
        def at_step(step: int) -> None:
            if step >= KILLED:
                group.world.happen("killed")
                group.dies()

        return run(group, at_step)

    def newcomer(group: Group) -> tuple[int, str]:
        group.world.wait("killed")
        return run(group, lambda _: None)

    def run(group: Group, at_step: Callable[[int], None]) -> tuple[int, str]:
        manager = group.manager(state_dict=None, load_state_dict=None)
        return train(name, manager, group.number, at_step)

    # The lighthouse waits for the third, or the others might be through before it is there.
    world = World(tmp_path, min_replicas=3)
    one, two, killed, back = world.run(survivor, survivor, victim, newcomer)
    assert killed == WAS_KILLED
    assert one == two == back
    assert one[0] == STEPS


def torchruns(
    folder: Path, script: Path, *arguments: str, groups: int = 2, max_restarts: int = 0
) -> list[str]:
    """Run a script in so many groups at once; what each printed."""
    with lighthouse(groups, join_timeout_ms=10_000) as server:
        env = {**os.environ, "TORCHFT_LIGHTHOUSE": server.address()}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        runs = [
            Torchrun(
                [
                    *("--nproc-per-node=1", f"--master-port={free_port()}"),
                    *(f"--max-restarts={max_restarts}", "--monitor-interval=0.2"),
                    *(str(script), *arguments, str(group)),
                ],
                env={**env, "REPLICA_GROUP_ID": str(group)},
                folder=folder,
            )
            for group in range(groups)
        ]
        try:
            ends = [run.end(within_s=150) for run in runs]
        finally:
            for run in runs:
                run.kill()
    for code, _, errors in ends:
        assert code == 0, errors[-3000:]
    return [said for _, said, _ in ends]


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "name",
    [
        name if name in UNDER_TORCHRUN else pytest.param(name, marks=pytest.mark.slow)
        for name in STRATEGIES
    ],
)
def test_torchrun_restarts_a_group_that_was_killed_and_digests_are_equal(
    tmp_path: Path, name: str
) -> None:
    script = Path(replicated_train.__file__)
    one, two = torchruns(tmp_path, script, name, str(tmp_path), max_restarts=1)
    assert (tmp_path / "killed").exists()
    assert one == two and one.startswith(f"digest {STEPS} ")


@pytest.mark.timeout(400)
def test_the_first_example_of_the_readme_goes_on_from_what_it_saved_when_it_is_started_again(
    tmp_path: Path,
) -> None:
    example = next(b.text for b in blocks_of(ROOT / "README.md") if b.kind == "python")
    assert len([line for line in example.splitlines() if line]) <= 25
    script = tmp_path / "train.py"
    script.write_text(example)
    torchruns(tmp_path, script)
    ended = saved_by_groups(tmp_path)
    assert [one["strategy"]["steps"] for one in ended] == [100, 100]
    backups = [one["strategy"]["recipes"][0]["0"]["original_parameters"] for one in ended]
    assert digest(backups[0]) == digest(backups[1])

    torchruns(tmp_path, script, groups=1)
    assert digest(saved_by_groups(tmp_path)) == digest(ended), "nothing was left to train"

    loop = "while replicated.step_count < 100:\n"
    seen = "    print(replicated.step_count, digest([model.state_dict()]))\n"
    longer = example.replace(loop, loop.replace("100", "120") + seen)
    script.write_text(f"from torchft.digest import digest\n{longer}")
    for said, before in zip(torchruns(tmp_path, script), ended, strict=True):
        first, *others = said.splitlines()
        assert first == f"100 {digest(before['models'])}"
        assert [int(line.split()[0]) for line in others] == list(range(101, 120))
    assert [one["manager"]["step"] for one in saved_by_groups(tmp_path)] == [6, 6]


def saved_by_groups(folder: Path) -> list[Any]:
    """What the two groups of the README's example have saved."""
    return [torch.load(folder / f"group_{group}.pt") for group in range(2)]
