"""Many runs: each strategy with each number of nodes, H, learning rate and seed.

Every run is one thread of computing, here or in a process of its own. What a finished run leaves
is a JSON file named after all that it depends on, so a sweep that is started again does only what
is missing; a run that fails is reported and costs no other one. Speeds and links are no part of
that: simulated time is computed from the files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchft.errors import SettingsError
from torchft.experiments import registry
from torchft.experiments.config import SimulateConfig, StrategyConfig
from torchft.experiments.jobs import Ended, run_jobs, said
from torchft.experiments.runs import RunReport, RunSpec, key_of, read_report, write_report
from torchft.experiments.validation import Validator
from torchft.simulator.events import Dies
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import Simulation, run_stacked
from torchft.simulator.seeds import kept_rng
from torchft.simulator.threads import one_thread

__all__ = ["Failure", "Sweep", "check_runs", "files", "plan", "run_one", "run_sweep"]

Data = tuple[Any, Any]

WARM = (__name__, "torch._dynamo")
"""Imported once for all processes: the first optimizer would import the second."""


@dataclass(frozen=True)
class Failure:
    """A run that came to no end."""

    spec: RunSpec
    error: str


@dataclass(frozen=True)
class Sweep:
    """All runs of one configuration, in the order of the plan."""

    config: SimulateConfig
    reports: list[RunReport]
    failures: list[Failure]
    skipped: int
    """Runs that an earlier sweep had finished."""


def plan(config: SimulateConfig) -> list[RunSpec]:
    """All runs.

    Raises:
        SettingsError: a run would be too short.
    """
    return [
        _spec(config, strategy, nodes, sync_every, lr, seed)
        for strategy in config.strategies
        for nodes in config.nodes
        for sync_every in (config.sync_every if registry.has_interval(strategy) else (None,))
        for lr in config.lr
        for seed in config.seeds
    ]


def _spec(
    config: SimulateConfig,
    strategy: StrategyConfig,
    nodes: int,
    sync_every: int | None,
    lr: float,
    seed: int,
) -> RunSpec:
    steps = config.steps
    if config.equal == "tokens":
        steps = steps * min(config.nodes) // nodes
    if steps < (sync_every or 1):
        raise SettingsError(
            f"{strategy.shown} on {nodes} nodes would end after {steps} steps, before the first of "
            f"its rounds, which are {sync_every or 1} steps apart: give more steps, or equal=steps"
        )
    return RunSpec(
        strategy=strategy, nodes=nodes, sync_every=sync_every, lr=lr, seed=seed, steps=steps
    )


def check_runs(config: SimulateConfig, specs: Sequence[RunSpec], data: Data) -> None:
    """Refuse what cannot run, before any of it runs.

    Raises:
        SettingsError: which run, and what would do.
    """
    with kept_rng(torch.device("cpu")):
        registry.model_of(config)()
    checked = set[str]()
    for spec in specs:
        label = spec.strategy.shown
        try:
            with _said_before() if label in checked else nullcontext():
                experiment_of(config, spec, data).check()
        except SettingsError as error:
            raise SettingsError(f"{spec}: {error}") from error
        checked.add(label)


@contextmanager
def _said_before() -> Iterator[None]:
    # Python forgets what it has shown whenever a filter changes, which imports of torch do.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torchft simulate: .* is now ", FutureWarning)
        yield


def experiment_of(config: SimulateConfig, spec: RunSpec, data: Data) -> Experiment:
    """The experiment that a specification of a run describes."""
    return Experiment(
        model=registry.model_of(config),
        train_dataset=data[0],
        val_dataset=data[1],
        strategy=registry.strategy_of(
            config, spec.strategy, sync_every=spec.sync_every, lr=spec.lr
        ),
        num_nodes=spec.nodes,
        max_steps=spec.steps,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        seed=spec.seed,
        device=config.device,
        autocast=config.autocast,
        deterministic=config.deterministic,
        network=config.network,
        faults=config.faults,
    )


def run_one(
    config: SimulateConfig,
    spec: RunSpec,
    data: Data,
    on_step: Callable[[], None] = lambda: None,
) -> RunReport:
    """One run, on one thread of this process. `on_step` is called after each of its steps.

    Raises:
        SettingsError: it cannot run.
        NodeError: a loss is not finite.
    """
    with _said_before():
        experiment = experiment_of(config, spec, data)
    looks = _Looks(experiment, config, on_step)
    with one_thread():
        result = run_stacked(experiment, on_step=looks)
    model = result.model
    assert model is not None
    return RunReport(
        spec=spec,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        losses=[row.losses for row in result.history],
        validations=looks.found,
        rounds=result.rounds,
        heals=result.heals,
        deaths=[event for event in result.events if isinstance(event, Dies)],
        final_lr=result.history[-1].lr,
        train_s=result.seconds["steps"],
        cpu_s=result.seconds["steps_cpu"],
    )


class _Looks:
    """Validates the mean model now and then."""

    def __init__(
        self, experiment: Experiment, config: SimulateConfig, on_step: Callable[[], None]
    ) -> None:
        self._validator = Validator(experiment, config.val_samples)
        self._every, self._on_step = config.validate_every, on_step
        self.found: list[tuple[int, float]] = []

    def __call__(self, run: Simulation) -> None:
        if run.step:
            self._on_step()
        if run.step % self._every == 0 or run.step == run.total_steps:
            self.found.append((run.step, self._look(run)))

    def _look(self, run: Simulation) -> float:
        nodes = [run.nodes[node] for node in run.local.alive]
        return self._validator.loss(self._validator.mean_of(nodes))


def run_sweep(
    config: SimulateConfig,
    out: Path,
    *,
    jobs: int = 1,
    on_step: Callable[[int], None] = lambda steps: None,
    on_run: Callable[[RunReport | Failure], None] = lambda ended: None,
) -> Sweep:
    """Do all runs that have not been done, `jobs` at a time, and keep what each leaves in
    `out/runs`. `on_step` is told how many steps are done anew; with several jobs, as runs end.

    Raises:
        SettingsError: a run cannot be; nothing has run then.
    """
    specs, data = plan(config), registry.data_of(config)
    check_runs(config, specs, data)
    paths = files(config, specs, out)
    (out / "runs").mkdir(parents=True, exist_ok=True)
    missing = [spec for spec in specs if not paths[spec].exists()]
    on_step(sum(spec.steps for spec in specs if spec not in missing))
    kept = [_Task(config, spec, paths[spec]) for spec in missing]
    ended = _here(kept, data, on_step) if jobs == 1 else _apart(kept, jobs, on_step)
    failures = []
    for one in ended:
        spec = one.job.spec
        if one.error is not None:
            failures.append(Failure(spec, one.error))
        on_run(failures[-1] if one.error is not None else read_report(paths[spec], spec))
    failed = {failure.spec for failure in failures}
    reports = [read_report(paths[spec], spec) for spec in specs if spec not in failed]
    return Sweep(config, reports, failures, skipped=len(specs) - len(missing))


def files(config: SimulateConfig, specs: Sequence[RunSpec], out: Path) -> dict[RunSpec, Path]:
    """Where each run leaves its report."""
    return {spec: out / "runs" / f"{_key(config, spec)}.json" for spec in specs}


def _key(config: SimulateConfig, spec: RunSpec) -> str:
    faults = config.faults
    events = [] if faults is None else faults.to_events(spec.nodes, spec.steps, config.network)
    return key_of(config, spec, events)


@dataclass(frozen=True)
class _Task:
    """A run and the file that it leaves."""

    config: SimulateConfig
    spec: RunSpec
    path: Path


def _here(
    tasks: Sequence[_Task], data: Data, on_step: Callable[[int], None]
) -> Iterator[Ended[_Task]]:
    for task in tasks:
        error = None
        try:
            report = run_one(task.config, task.spec, data, partial(on_step, 1))
            write_report(report, task.path)
        except Exception as failure:
            error = said(failure)
        yield Ended(task, error)


def _apart(
    tasks: Sequence[_Task], jobs: int, on_step: Callable[[int], None]
) -> Iterator[Ended[_Task]]:
    digits = any(registry.data_name(task.config) == "digits" for task in tasks)
    warm = (*WARM, "sklearn.datasets") if digits else WARM
    for ended in run_jobs(_run_task, tasks, jobs, warm=warm):
        on_step(ended.job.spec.steps)
        yield ended


def _run_task(task: _Task) -> None:
    """In a process of its own."""
    with one_thread():
        report = run_one(task.config, task.spec, registry.data_of(task.config))
    write_report(report, task.path)
