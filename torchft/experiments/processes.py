"""The same experiment on N real processes of this machine: gloo, the real manager, a lighthouse.

    result = run_processes(Experiment(…, strategy=strategy, deterministic=True, digests=True))

Each process has its own node: one model, one feed, the same strategy object bound to the manager.
`Dies` is SIGKILL, `Joins` a new process that heals from the others. What the run did is in its step
records, `result.records`, and `replay.events_of` gives a simulation the same events.

With several CUDA devices the nodes take them in turn (not tested on a machine that has any).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter
from typing import Any

from torchft.errors import SettingsError
from torchft.experiments.local_nodes import LocalNodes, Start
from torchft.experiments.real_node import RealNode, complete, warm_up
from torchft.experiments.spmd.run import run_program
from torchft.launch.guard import check_guarded
from torchft.records import StepRecord, read_step_records
from torchft.simulator.events import Dies, Event, Joins
from torchft.simulator.experiment import Experiment
from torchft.simulator.node import NodeError
from torchft.simulator.program import SPMDStrategy
from torchft.simulator.replay import events_of, heals_of, round_records_of, rounds_of
from torchft.simulator.result import Result, StepRow
from torchft.simulator.seeds import kept_rng
from torchft.strategies.checks import check_among_groups

__all__ = ["run_processes"]


def run_processes(
    experiment: Experiment,
    *,
    folder: Path | None = None,
    method: str | None = None,
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Run it to its end. The strategy object is not used up: each process has a copy.

    Args:
        folder: where the step records stay; None: nowhere.
        method: how processes start, `fork` or `forkserver`; None: fork where that is safe.
        keep: called with the result as soon as there is one, before the models are in it; of a run
            that breaks off, with its history.

    Raises:
        SettingsError: it cannot run.
        NodeError: a loss is not finite.
        NodeFailed: a process failed otherwise; with its traceback.
    """
    started = perf_counter()
    check_guarded()
    experiment.check()
    strategy = experiment.strategy
    if isinstance(strategy, SPMDStrategy):
        return run_program(experiment, method=method)
    strategy.check_unused()
    check_among_groups(strategy.recipes)
    deaths = _deaths(experiment)
    with kept_rng(experiment.torch_device):
        warm_up(experiment)
    log = _Log(experiment.num_nodes)
    with tempfile.TemporaryDirectory(prefix="torchft-") as temporary:
        records = folder or Path(temporary)
        nodes = LocalNodes(
            RealNode(experiment, deaths),
            _starts(experiment),
            records,
            may_die={death.node for death in deaths},
            method=method,
            preload=["torchft.experiments.real_node", "torchft.simulator.preloaded"],
            on_report=log.add,
            expected_errors=(NodeError, SettingsError),
        )
        try:
            ends = nodes.run()
        except BaseException:
            keep(log.result())
            raise
        told = [read_step_records(path) for path in sorted(records.glob("node_*.jsonl"))]
    result = _result(experiment, log, [record for life in told for record in life])
    keep(result)
    return complete(result, experiment, ends, began=started, compute_s=log.compute_s)


def _starts(experiment: Experiment) -> list[Start]:
    events = [e for e in experiment.all_events() if isinstance(e, Dies | Joins)]
    first: dict[int, Event] = {}
    for event in sorted(events, key=lambda e: e.step):
        first.setdefault(event.node, event)
    at_once = [n for n in range(experiment.num_nodes) if not isinstance(first.get(n), Joins)]
    return [
        *map(Start, at_once),
        *(Start(e.node, at=e.step) for e in events if isinstance(e, Joins)),
    ]


def _deaths(experiment: Experiment) -> list[Dies]:
    for event in experiment.all_events():
        if not isinstance(event, Dies | Joins):
            raise SettingsError(f"{event} is for simulations: real processes can die and join")
    return [event for event in experiment.all_events() if isinstance(event, Dies)]


class _Log:
    """What the nodes told while they ran, by step."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self._losses: dict[int, dict[int, float]] = {}
        self._rates: dict[int, float] = {}
        self._digests: dict[int, list[str | None]] = {}
        self.compute_s = 0.0
        """Of all nodes together, in forward and backward passes."""

    def add(self, node: int, rows: Iterable[dict[str, Any]]) -> None:
        """Some steps of one node."""
        for row in rows:
            step = row["step"]
            if "loss" in row:
                self._losses.setdefault(step, {})[node] = row["loss"]
                self._rates[step] = row["lr"]
                self.compute_s += row["compute_s"]
            if "digest" in row:
                self._digests.setdefault(step, [None] * self._nodes)[node] = row["digest"]

    def history(self) -> list[StepRow]:
        """A row for each step, nodes in order."""
        return [
            StepRow(step, dict(sorted(losses.items())), self._rates[step])
            for step, losses in sorted(self._losses.items())
        ]

    def result(self) -> Result:
        """What is known without the step records and models."""
        return Result(self._nodes, history=self.history(), digests=self.digests())

    def digests(self) -> list[tuple[int, list[str | None]]]:
        """Of each step in which a round committed."""
        return sorted(self._digests.items())


def _result(experiment: Experiment, log: _Log, records: list[StepRecord]) -> Result:
    rounds = rounds_of(records)
    return Result(
        experiment.num_nodes,
        events=events_of(records),
        history=log.history(),
        digests=log.digests(),
        rounds=round_records_of(rounds),
        heals=heals_of(rounds),
        records=records,
    )
