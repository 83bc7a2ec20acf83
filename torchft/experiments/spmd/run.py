"""A program on N processes of this machine, and the result that any run leaves."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from torchft.errors import SettingsError
from torchft.experiments.local_nodes import LocalNodes, Start
from torchft.experiments.real_node import complete, warm_up
from torchft.experiments.spmd.node import SPMDProcess
from torchft.experiments.validation import Validation
from torchft.peers import Place
from torchft.simulator.experiment import Experiment
from torchft.simulator.node import NodeError
from torchft.simulator.peers import RoundRecord
from torchft.simulator.program import SPMDStrategy
from torchft.simulator.result import Result, StepRow
from torchft.simulator.seeds import kept_rng

__all__ = ["run_program"]


def run_program(experiment: Experiment, *, method: str | None = None) -> Result:
    """Run the program of `experiment.strategy` to its end.

    Raises:
        SettingsError: it cannot run.
        NodeError: a loss is not finite.
        NodeFailed: a process failed otherwise; with its traceback.
    """
    assert isinstance(experiment.strategy, SPMDStrategy)
    started = perf_counter()
    _check_program(experiment)
    with kept_rng(experiment.torch_device):
        warm_up(experiment)
    log = _Log()
    with tempfile.TemporaryDirectory(prefix="torchft-") as folder:
        nodes = LocalNodes(
            SPMDProcess(experiment, experiment.strategy.program, Path(folder) / "rendezvous"),
            [Start(node) for node in range(experiment.num_nodes)],
            Path(folder),
            method=method,
            preload=["torchft.experiments.spmd.node", "torchft.simulator.preloaded"],
            on_report=log.add,
            expected_errors=(NodeError, SettingsError),
        )
        ends = nodes.run()
    result = log.result(experiment)
    return complete(result, experiment, ends, began=started, compute_s=log.compute_s)


def _check_program(experiment: Experiment) -> None:
    """Refuse what only the rounds of recipes have."""
    asked = {
        "events": bool(experiment.all_events()),
        "deterministic": experiment.deterministic,
        "digests": experiment.digests,
    }
    for name in (name for name, given in asked.items() if given):
        raise SettingsError(
            f"{name} is for strategies made of recipes: leave it out with one that calls "
            "torch.distributed itself"
        )


class _Log:
    """What the processes told, by step and node."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, dict[str, Any]]] = {}
        self._looks: dict[int, dict[int, dict[str, Any]]] = {}
        self.compute_s = 0.0

    def add(self, node: int, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            if "global_loss" in row:
                self._looks.setdefault(row["step"], {})[node] = row
                continue
            self._rows.setdefault(row["step"], {})[node] = row
            self.compute_s += row["compute_s"]

    def result(self, experiment: Experiment) -> Result:
        """A row for each step, and a round for each in which anybody sent anything."""
        result = Result(experiment.num_nodes)
        everyone = tuple(range(experiment.num_nodes))
        for step, rows in sorted(self._rows.items()):
            losses = {node: row["loss"] for node, row in sorted(rows.items())}
            result.history.append(StepRow(step, losses, rows[0]["lr"]))
            collectives = max(row["collectives"] for row in rows.values())
            if collectives:
                sent = {node: row["nbytes"] for node, row in sorted(rows.items())}
                result.rounds.append(_round(step, everyone, sent, collectives))
        for step, looks in sorted(self._looks.items()):
            local = {node: look["local_loss"] for node, look in sorted(looks.items())}
            seen = Validation(local, looks[0]["global_loss"])
            result.validations.append({"step": step, "local_loss": seen.local_loss, **asdict(seen)})
        return result


def _round(
    step: int, members: tuple[int, ...], sent: dict[int, int], collectives: int
) -> RoundRecord:
    return RoundRecord(
        step=step,
        place=Place.AFTER,
        kind="average",
        members=members,
        counted=members,
        committed=True,
        bytes_per_node=sent,
        collectives=collectives,
        restores=False,
    )
