"""What goes on around the steps of a run: looking at it, keeping it, telling of it.

    before the first step and after each: figures → loggers and bar, validation, correlation, file

None of it changes what the run computes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from torchft.best_effort import BestEffort
from torchft.experiments.checkpoint import CheckpointFolder, Saved
from torchft.experiments.correlation import correlation
from torchft.experiments.loggers import Kind, Logger, Row, perplexity
from torchft.experiments.progress import ProgressBar
from torchft.experiments.validation import Validator
from torchft.simulator.loop import Simulation
from torchft.simulator.node import TrainNode
from torchft.simulator.result import Result, StepRow
from torchft.simulator.round_records import RoundRecord

__all__ = ["Callbacks", "Figures"]

_log = logging.getLogger(__name__)


class Figures:
    """Rows for loggers, out of what a run records. Steps count from 1 here: how many are done."""

    def __init__(self, num_nodes: int, batch_size: int) -> None:
        self._num_nodes, self._batch_size = num_nodes, batch_size
        self._bytes = self._examples = 0

    def train(self, row: StepRow, rounds: Iterable[RoundRecord]) -> Row:
        """Of one step, and the rounds that closed in it."""
        self._examples += len(row.losses) * self._batch_size
        self._bytes += sum(sum(record.bytes_per_node.values()) for record in rounds)
        return {
            **self._at(row.step + 1),
            "train_loss": row.loss,
            "train_perplexity": perplexity(row.loss),
            "lr": row.lr,
            "bytes_per_node": self._bytes / self._num_nodes,
        }

    def validation(self, found: dict[str, Any]) -> Row:
        """The figures of one entry of `Result.validations`."""
        return {
            **self._at(found["step"]),
            "local_loss": found["local_loss"],
            "local_perplexity": perplexity(found["local_loss"]),
            "global_loss": found["global_loss"],
            "global_perplexity": perplexity(found["global_loss"]),
        }

    def correlation(self, found: dict[str, Any]) -> Row:
        """The figures of one entry of `Result.correlations`."""
        return {**self._at(found["step"]), **{k: v for k, v in found.items() if k != "step"}}

    def past(self, result: Result) -> Iterator[tuple[Kind, Row]]:
        """All rows up to now, in the order in which they were made."""
        looks = {found["step"]: found for found in result.validations}
        pairs = {found["step"]: found for found in result.correlations}
        rounds = iter(result.rounds)
        following = next(rounds, None)
        for step in range(len(result.history) + 1):
            closed = []
            while following is not None and following.step < step:
                closed.append(following)
                following = next(rounds, None)
            if step:
                yield "train", self.train(result.history[step - 1], closed)
            if step in looks:
                yield "validation", self.validation(looks[step])
            if step in pairs:
                yield "correlation", self.correlation(pairs[step])

    def _at(self, step: int) -> Row:
        return {"step": step, "examples_trained": self._examples}


@dataclass
class Callbacks:
    """Called with the run before its first step and after each. A context, which closes files."""

    config: dict[str, Any]
    """What loggers write of the run's settings."""
    identity: dict[str, Any]
    """What a checkpoint must have in common with the run that goes on from it."""
    loggers: Sequence[Logger] = ()
    name: str | None = None
    """Shown on the bar. None: nothing is shown."""
    validator: Validator | None = None
    val_interval: int = 100
    correlation_interval: int | None = None
    checkpoints: CheckpointFolder | None = None
    checkpoint_interval: int | None = None
    resumed: Saved | None = None
    result: Result | None = field(default=None, init=False)
    """Of the run so far."""

    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _efforts: list[BestEffort] = field(default_factory=list, init=False)
    """One a logger: figures that cannot be written do not end the run."""
    _progress: ProgressBar | None = field(default=None, init=False)
    _rounds: int = field(default=0, init=False)
    _step: int = field(default=0, init=False)
    """Steps that are done."""
    _started: bool = field(default=False, init=False)
    _unsaved: bool = field(default=False, init=False)
    """A checkpoint is due, and waits until no round is in flight."""

    def __enter__(self) -> Callbacks:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        self._stack.close()
        if kind is KeyboardInterrupt and self.name is not None:
            print(f"{self.name}: {self._stopped()}", file=sys.stderr, flush=True)

    def _stopped(self) -> str:
        """Where a run is that was interrupted, and how it can go on."""
        # Of real processes it is not known here how far they came.
        stopped = f"stopped after step {self._step}" if self._started else "stopped"
        newest = None if self.checkpoints is None else self.checkpoints.newest()
        if newest is not None:
            ways = f"resume=True and run_name={newest.parent.name!r}"
        elif self.resumed is not None:
            newest, ways = self.resumed.path, f"resume={str(self.resumed.path)!r}"
        else:
            return f"{stopped}; there is no checkpoint to go on from"
        return f"{stopped}; the last checkpoint is {newest}; go on with {ways}"

    def keep(self, result: Result) -> None:
        """What there is of the run, should it break off."""
        self.result = result

    def __call__(self, run: Simulation) -> None:
        """Whatever is due after `run.step` steps."""
        self._step = run.step
        self.keep(run.result)
        if not self._started:
            self._start(run)
        else:
            self._train_row(run)
        if self.resumed is not None and run.step == self.resumed.step:
            return  # looked at and kept already
        if self._due(run, self.val_interval):
            self._validate(run)
        if run.step and self._due(run, self.correlation_interval):
            self._correlate(run)
        if run.step and self._due(run, self.checkpoint_interval):
            self._unsaved = True
        if self._unsaved and not run.strategy.in_flight:
            self._save(run)

    def _due(self, run: Simulation, interval: int | None) -> bool:
        return interval is not None and (run.step % interval == 0 or run.step == run.total_steps)

    def _start(self, run: Simulation) -> None:
        self._started = True
        if self.resumed is not None:
            run.result.validations[:] = self.resumed.state["validations"]
            run.result.correlations[:] = self.resumed.state["correlations"]
        self._figures = Figures(run.experiment.num_nodes, run.experiment.batch_size)
        past = list(self._figures.past(run.result)) if run.step else []
        self._rounds = len(run.result.rounds)
        self._start_loggers(past)
        self.show(run.total_steps, run.step)

    def _start_loggers(self, past: Sequence[tuple[Kind, Row]]) -> None:
        for logger in self.loggers:
            effort = BestEffort(f"what {type(logger).__name__} logs", _log.warning)
            self._efforts.append(effort)
            self._stack.callback(effort.last, logger.close)
            effort.first(partial(logger.start, self.config, past))

    def _train_row(self, run: Simulation) -> None:
        closed = run.result.rounds[self._rounds :]
        self._rounds += len(closed)
        self._log("train", self._figures.train(run.result.history[-1], closed))
        if self._progress is not None:
            self._progress.now_and_then()

    def _validate(self, run: Simulation) -> None:
        if self.validator is None:
            return
        found = self.look([run.nodes[node] for node in run.local.alive], run.step)
        run.result.validations.append(found)
        self._log("validation", self._figures.validation(found))
        if self._progress is not None:
            self._progress.say()

    def show(self, total: int, done: int = 0) -> None:
        """Begin to show how far the run is."""
        if self.name is not None:
            self._progress = ProgressBar(self.name, total, done)
            self._stack.callback(self._progress.close)

    def look(self, nodes: Sequence[TrainNode], step: int) -> dict[str, Any]:
        """Validate the nodes now; returns an entry of `Result.validations`."""
        assert self.validator is not None
        seen = self.validator(nodes)
        return {"step": step, "local_loss": seen.local_loss, **asdict(seen)}

    def tell(self, result: Result, batch_size: int) -> None:
        """All rows of a run that could not be watched."""
        self._start_loggers([])
        for kind, row in Figures(result.num_nodes, batch_size).past(result):
            self._log(kind, row)

    def _correlate(self, run: Simulation) -> None:
        flats, alive = run.local.weights(run.local.whole), run.local.alive
        whole = len(alive) == run.local.rows
        found = correlation(flats if whole else [flat[alive] for flat in flats])
        row = {
            "step": run.step,
            "nodes": found.nodes,
            "correlation": found.pearson,
            "variance": found.variance,
        }
        run.result.correlations.append(row)
        self._log("correlation", self._figures.correlation(row))

    def _save(self, run: Simulation) -> None:
        assert self.checkpoints is not None
        state = {
            "run": run.state_dict(),
            "validations": run.result.validations,
            "correlations": run.result.correlations,
        }
        self.checkpoints.save(run.step, self.identity, state)
        self._unsaved = False

    def _log(self, kind: Kind, row: Row) -> None:
        for logger, effort in zip(self.loggers, self._efforts, strict=True):
            effort(partial(logger.log, kind, row))
        if self._progress is None:
            return
        if kind == "train":
            self._progress.step(row["train_loss"])
        elif kind == "validation":
            self._progress.show(local=row["local_loss"], **{"global": row["global_loss"]})
