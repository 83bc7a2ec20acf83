"""The same experiment on N real processes of this machine: gloo, the real manager, a lighthouse.

    result = run_processes(Experiment(…, strategy=strategy, deterministic=True, digests=True))

Each process has its own node: one model, one feed, the same strategy object bound to the manager.
`Dies` is SIGKILL, `Joins` a new process that heals from the others. What the run did is in its step
records, `result.records`, and `replay.events_of` gives a simulation the same events.

With several CUDA devices the nodes take them in turn (not tested on a machine that has any).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from torchft.errors import SettingsError
from torchft.experiments.local_node import Target
from torchft.experiments.local_nodes import LocalNodes, NodeStart
from torchft.experiments.real_node import RealNode, complete, warm_up
from torchft.experiments.spmd.node import SPMDProcess, check_program
from torchft.experiments.validation import Validation
from torchft.launch.guard import check_guarded
from torchft.peers import Place
from torchft.records import StepRecord, read_step_records
from torchft.simulator.events import Dies, Event, Joins
from torchft.simulator.experiment import Experiment
from torchft.simulator.node import NodeError
from torchft.simulator.program import SPMDStrategy
from torchft.simulator.replay import events_of, heals_of, round_records_of, rounds_of
from torchft.simulator.result import Result, StepRow
from torchft.simulator.round_records import RoundRecord
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
    began = perf_counter()
    check_guarded()
    experiment.check()
    log = _Log(experiment.num_nodes)
    with tempfile.TemporaryDirectory(prefix="torchft-") as temporary:
        target = _target(experiment, Path(temporary))
        records = folder or Path(temporary)
        try:
            ends = _run_nodes(target, experiment, records, log, method)
        except BaseException:
            keep(log.result())
            raise
        told = [read_step_records(path) for path in sorted(records.glob("node_*.jsonl"))]
    result = log.result([record for life in told for record in life])
    keep(result)
    return complete(result, experiment, ends, began=began, compute_s=log.compute_s)


def _target(experiment: Experiment, folder: Path) -> Target:
    """What each process does."""
    strategy = experiment.strategy
    if isinstance(strategy, SPMDStrategy):
        check_program(experiment)
        return SPMDProcess(experiment, strategy.program, folder / "rendezvous")
    strategy.check_unused()
    check_among_groups(strategy.recipes)
    return RealNode(experiment, _deaths(experiment))


def _run_nodes(
    target: Target, experiment: Experiment, records: Path, log: _Log, method: str | None
) -> dict[int, Any]:
    with kept_rng(experiment.torch_device):
        warm_up(experiment)
    nodes = LocalNodes(
        target,
        _starts(experiment),
        records,
        may_die={death.node for death in _deaths(experiment)},
        method=method,
        preload=[type(target).__module__, "torchft.simulator.preloaded"],
        on_report=log.add,
        expected_errors=(NodeError, SettingsError),
    )
    return nodes.run()


def _starts(experiment: Experiment) -> list[NodeStart]:
    events = [e for e in experiment.all_events() if isinstance(e, Dies | Joins)]
    first: dict[int, Event] = {}
    for event in sorted(events, key=lambda e: e.step):
        first.setdefault(event.node, event)
    at_once = [n for n in range(experiment.num_nodes) if not isinstance(first.get(n), Joins)]
    return [
        *map(NodeStart, at_once),
        *(NodeStart(e.node, at=e.step) for e in events if isinstance(e, Joins)),
    ]


def _deaths(experiment: Experiment) -> list[Dies]:
    for event in experiment.all_events():
        if not isinstance(event, Dies | Joins):
            raise SettingsError(f"{event} is for simulations: real processes can die and join")
    return [event for event in experiment.all_events() if isinstance(event, Dies)]


@dataclass
class _Log:
    """What the nodes told while they ran: by step, and then by node."""

    nodes: int
    compute_s: float = 0.0
    """Of all nodes together, in forward and backward passes."""
    _rows: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    _looks: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    """At held-out samples, after so many steps."""

    def add(self, node: int, rows: Iterable[dict[str, Any]]) -> None:
        """Some steps of one node."""
        for row in rows:
            by_step = self._looks if "global_loss" in row else self._rows
            by_step.setdefault(row["step"], {}).setdefault(node, {}).update(row)
            self.compute_s += row.get("compute_s", 0.0)

    def result(self, records: list[StepRecord] | None = None) -> Result:
        """What is known without the models. Where there are step records, the rounds are in them;
        of a program there are none."""
        rounds = rounds_of(records or [])
        return Result(
            self.nodes,
            events=events_of(records or []),
            history=list(self._history()),
            digests=list(self._digests()),
            rounds=round_records_of(rounds) or list(self._program_rounds()),
            heals=heals_of(rounds),
            validations=list(self._validations()),
            records=records or [],
        )

    def _of(self, name: str) -> Iterator[tuple[int, dict[int, Any]]]:
        """Each step in which nodes told `name`, with that, nodes in order."""
        for step, rows in sorted(self._rows.items()):
            told = {node: row[name] for node, row in sorted(rows.items()) if name in row}
            if told:
                yield step, told

    def _history(self) -> Iterator[StepRow]:
        for (step, losses), (_, rates) in zip(self._of("loss"), self._of("lr"), strict=True):
            yield StepRow(step, losses, next(iter(rates.values())))

    def _digests(self) -> Iterator[tuple[int, list[str | None]]]:
        """Of each step in which a round committed."""
        for step, digests in self._of("digest"):
            yield step, [digests.get(node) for node in range(self.nodes)]

    def _program_rounds(self) -> Iterator[RoundRecord]:
        """One for each step in which anybody sent anything."""
        everyone = tuple(range(self.nodes))
        for (step, collectives), (_, sent) in zip(
            self._of("collectives"), self._of("nbytes"), strict=True
        ):
            if most := max(collectives.values()):
                yield RoundRecord(
                    step=step,
                    place=Place.AFTER,
                    kind="average",
                    members=everyone,
                    counted=everyone,
                    committed=True,
                    bytes_per_node=sent,
                    collectives=most,
                    restores=False,
                )

    def _validations(self) -> Iterator[dict[str, Any]]:
        for step, looks in sorted(self._looks.items()):
            local = {node: look["local_loss"] for node, look in sorted(looks.items())}
            seen = Validation(local, looks[0]["global_loss"])
            yield {"step": step, "local_loss": seen.local_loss, **asdict(seen)}
