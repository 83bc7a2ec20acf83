"""Nodes as processes of this machine: how they start, fail, die, come back, and leave nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from torchft.errors import SettingsError
from torchft.experiments.local_nodes import LocalNode, LocalNodes, NodeFailed, NodeStart
from torchft.experiments.processes import run_processes
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.ordered import ordered_mean
from torchft.peers import Place
from torchft.records import read_step_records
from torchft.simulator.events import Dies, Discards, Joins
from torchft.simulator.loop import run_stacked
from torchft.simulator.node import NodeError, TrainNode
from torchft.strategies import DiLoCoStrategy, FedAvgStrategy
from torchft.verify.digests import OddModel, experiment_of

DEADLINE_S = 30.0


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    """What the first optimizer imports is imported before any process forks."""
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)


def _run(story: Callable[[LocalNode], Any], folder: Path, nodes: int = 3, **options: Any) -> Any:
    starts = options.pop("starts", [NodeStart(node) for node in range(nodes)])
    return LocalNodes(story, starts, folder, method="fork", **options).run()


def _gather_everything(node: LocalNode) -> list[Any]:
    node.connect(lambda _: None, dict)
    peers = node.peers()
    while (opened := peers.open(Place.AFTER)).bootstrap:
        pass
    mine = node.number + 1
    sent = [
        torch.tensor([[True, False, mine == 2]]),
        torch.full((1, 3), -mine, dtype=torch.int16),
        torch.full((1, 2, 2), mine / 3, dtype=torch.bfloat16),
        torch.full((1, 1), mine, dtype=torch.int64),
    ]
    before = node.pg.bytes_sent
    received = opened.gather(sent).wait()
    none = opened.gather([]).wait()
    moved = node.pg.bytes_sent - before
    assert opened.close()
    node.manager.final_sync()
    return [none, moved, [(t.dtype, t.tolist()) for t in received]]


def test_any_dtype_is_gathered_in_the_order_of_the_names(tmp_path: Path) -> None:
    thirds = torch.tensor([1 / 3, 2 / 3, 1.0], dtype=torch.bfloat16).tolist()
    expected = [
        (torch.bool, [[True, False, False], [True, False, True], [True, False, False]]),
        (torch.int16, [[-1] * 3, [-2] * 3, [-3] * 3]),
        (torch.bfloat16, [[[third] * 2] * 2 for third in thirds]),
        (torch.int64, [[1], [2], [3]]),
    ]
    results = _run(_gather_everything, tmp_path)
    assert results == {node: [[], 2 * (3 + 6 + 8 + 8), expected] for node in range(3)}
    for node in range(3):
        (record,) = read_step_records(tmp_path / f"node_000{node}.0.jsonl")
        assert [name.partition(":")[0] for name in record.members] == [
            f"node_000{member}" for member in range(3)
        ]


def _moved(node: int) -> torch.Tensor:
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(node)) * 10.0**node


def _through_a_door(door: str, node: LocalNode) -> bool:
    model = torch.nn.Linear(7, 5, bias=False)
    inner, outer = (torch.optim.SGD(model.parameters(), lr=1.0) for _ in range(2))
    manager = node.connect()
    entered: Any = (
        LocalSGD(manager, model, inner, sync_every=1, deterministic=True)
        if door == "LocalSGD"
        else DiLoCo(manager, [model], inner, outer, sync_every=1, deterministic=True)
    )
    with entered:
        start = model.weight.detach().clone()
        model.weight.grad = _moved(node.number)
        inner.step()
    rows = torch.stack([start - _moved(n) for n in range(5)])
    expected = ordered_mean(rows) if door == "LocalSGD" else start - ordered_mean(start - rows)
    assert not torch.equal(ordered_mean(rows, range(4, -1, -1)), ordered_mean(rows))
    return torch.equal(model.weight, expected[0])


@pytest.mark.parametrize("door", ["LocalSGD", "DiLoCo"])
def test_a_door_averages_in_the_order_of_the_names(tmp_path: Path, door: str) -> None:
    results = _run(partial(_through_a_door, door), tmp_path, nodes=5)
    assert results == dict.fromkeys(range(5), True)


def _fail(node: LocalNode) -> None:
    node.connect(lambda _: None, dict)
    if node.number == 1:
        raise ValueError("the data are gone")
    node.peers().open(Place.AFTER)


def test_a_node_that_fails_ends_the_run_with_its_traceback(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    with pytest.raises(NodeFailed, match=r"node 1 failed:\n(.|\n)*data are gone"):
        _run(_fail, tmp_path)
    assert set(psutil.Process().children()) <= before


def _die(node: LocalNode) -> None:
    if node.number == 2:
        node.kill_self()
    node.connect(lambda _: None, dict)


def test_a_death_that_was_not_planned_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(NodeFailed, match=r"node 2 died \(exit code -9\)"):
        _run(_die, tmp_path)


def _return(value: Any, node: LocalNode) -> Any:
    node.report(f"{value} {node.number}")
    return value


def test_news_outlive_their_process(tmp_path: Path) -> None:
    heard: list[tuple[int, str]] = []
    results = _run(partial(_return, "hello"), tmp_path, on_report=lambda *news: heard.append(news))
    assert results == dict.fromkeys(range(3), "hello")
    assert sorted(heard) == [(node, f"hello {node}") for node in range(3)]


def test_a_node_starts_once_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="once"):
        LocalNodes(_die, [NodeStart(0), NodeStart(0)], tmp_path)
    with pytest.raises(SettingsError, match="start with the run"):
        LocalNodes(_die, [NodeStart(0, at=3)], tmp_path)


PARENT = """
import sys, time
from pathlib import Path
from torchft.experiments.local_nodes import LocalNodes, NodeStart

def story(node):
    node.connect(lambda _: None, dict)
    node.report("met")
    time.sleep(600)

starts = [NodeStart(0), NodeStart(1)]
tell = lambda node, news: print(news, flush=True)
LocalNodes(story, starts, Path(sys.argv[1]), method="fork", on_report=tell).run()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_the_parent_ends(tmp_path: Path, end: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert [parent.stdout.readline() for _ in range(2)] == ["met\n"] * 2
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) == 3  # and the lighthouse
    parent.send_signal(end)
    parent.wait(DEADLINE_S)
    _, alive = psutil.wait_procs(children, timeout=DEADLINE_S)
    assert not alive


# ---------------------------------------------------------------------- experiments


class FailsAtStep3(TrainNode):
    """The forward pass of node 1 gives NaN."""

    passes = 0

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return super().loss(batch) * (float("nan") if self.node == self.passes - 3 == 1 else 1.0)


def test_a_loss_that_is_not_finite_names_node_and_step() -> None:
    experiment = experiment_of("DiLoCo", steps=20, nodes=2)
    experiment.node_cls = FailsAtStep3
    with pytest.raises(NodeError, match=r"^the loss of node 1 in step 4 is nan") as found:
        run_processes(experiment, method="fork")
    assert "\n" not in str(found.value)
    assert isinstance(found.value.__cause__, NodeFailed)


def test_nodes_that_never_talk_are_warned_of() -> None:
    experiment = experiment_of("DiLoCo", steps=3, nodes=2)
    experiment.strategy = DiLoCoStrategy(H=100)
    with pytest.warns(UserWarning, match="opened no round in 3 steps, so the 2 nodes trained"):
        run_processes(experiment, method="fork")


def test_what_a_real_run_cannot_do_is_refused() -> None:
    experiment = experiment_of("DiLoCo", steps=20, events=[Discards(3)])
    with pytest.raises(SettingsError, match="is for simulations"):
        run_processes(experiment)


def test_islands_are_refused_before_a_process_starts() -> None:
    experiment = experiment_of("LocalSGD", steps=20)
    experiment.strategy = FedAvgStrategy(H=5, island_size=2)
    with pytest.raises(SettingsError, match="FedAvgRecipe averages within islands"):
        run_processes(experiment)


def test_a_strategy_that_ran_already_is_refused() -> None:
    experiment = experiment_of("LocalSGD", steps=10, nodes=2)
    run_processes(experiment, method="fork")
    run_processes(experiment, method="fork")  # each process had its own copy
    run_stacked(experiment)
    with pytest.raises(SettingsError, match="LocalSGDStrategy is in use"):
        run_processes(experiment, method="fork")


def test_a_node_that_starts_later_takes_part_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing of a run goes through it
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # made once, of an environment before
    experiment = experiment_of("LocalSGD", steps=40, nodes=3, events=[Joins(1, 15)])
    result = run_processes(experiment, method="fork")
    first = min(row.step for row in result.history if 1 in row.losses)
    assert first == result.heals[0].step + 1 == 20
    assert result.heals[0].nbytes > 3 * 4 * sum(p.numel() for p in result.models[0].parameters())
    assert [one.members for one in result.rounds] == [(0, 2), (0, 1, 2), (0, 1, 2), (0, 1, 2)]
    assert [one.counted for one in result.rounds[:2]] == [(0, 2), (0, 2)]
    assert len(set(result.digests[-1][1])) == 1


def test_a_node_that_is_gone_for_good_is_not_waited_for(tmp_path: Path) -> None:
    experiment = experiment_of("LocalSGD", steps=30, nodes=3, events=[Dies(0, 15)])
    result = run_processes(experiment, method="fork", folder=tmp_path)
    assert result.alive == [1, 2]
    assert [one.members for one in result.rounds] == [(0, 1, 2), (1, 2), (1, 2)]
    assert [0 in row.losses for row in result.history] == [True] * 15 + [False] * 15
    assert len(read_step_records(tmp_path / "node_0000.0.jsonl")) == 1


@pytest.mark.slow
def test_what_does_not_pickle_is_named_with_the_way_out() -> None:
    experiment = experiment_of("DiLoCo", steps=20, nodes=2)
    experiment.model = lambda: OddModel()
    with pytest.raises(SettingsError, match=r"<lambda>(.|\n)*top of a module"):
        run_processes(experiment, method="forkserver")


@pytest.mark.slow
def test_processes_of_a_fork_server_do_the_same() -> None:
    experiment = experiment_of("DiLoCo", steps=20, nodes=2)
    forked = run_processes(experiment, method="fork")
    served = run_processes(experiment, method="forkserver")
    assert forked.digests == served.digests


SCRIPT = """
import threading
import torch
from torchft.experiments import Trainer
from torchft.strategies import DiLoCoStrategy

class Model(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 1)

    def forward(self, batch):
        return super().forward(batch[0]).square().mean()

def main():
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # so it cannot fork
    Trainer(Model(), torch.utils.data.TensorDataset(torch.ones(32, 3)), device="cpu").fit(
        1, DiLoCoStrategy(H=2), 2, max_steps=4, batch_size=4, processes=True, disable_logging=True
    )
    print("trained")

"""
GUARD = "if __name__ == '__main__':"


def _script(folder: Path, end: str) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(SCRIPT + end)
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=4 * DEADLINE_S
    )


def test_a_script_without_a_guard_is_told_where_to_put_it(tmp_path: Path) -> None:
    ended = _script(tmp_path, "main()\n")
    assert (ended.returncode, ended.stdout) == (1, "")
    child, parent = (line for line in ended.stderr.splitlines() if GUARD in line)
    assert child.startswith("torchft.errors.SettingsError: a process of this script imports it")
    assert parent.startswith("torchft.errors.SettingsError: a process of this run failed before")
    assert f"{tmp_path / 'script.py'}" in parent
    assert "lighthouse" not in ended.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_script_with_a_guard_trains(tmp_path: Path) -> None:
    ended = _script(tmp_path, f"{GUARD}\n    main()\n")
    assert (ended.returncode, ended.stdout) == (0, "trained\n"), ended.stderr
