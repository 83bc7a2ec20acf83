"""The demo: replica groups train, one is killed, one heals, all end with equal digests.

Everything is real: a lighthouse (inside this process), a torchrun agent for each group, workers of
their own, SIGKILL. `scenario` decides what happens when, and `run` carries it out. Whatever ends
the run, no process of it is left.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from torchft import settings
from torchft.demo.final_report import read_final_reports
from torchft.demo.group_run import GroupRun
from torchft.demo.options import DemoOptions
from torchft.demo.outcome import group_result, kill_result
from torchft.demo.summary import Summary
from torchft.demo.view import View
from torchft.launch import prefork
from torchft.launch.folder import run_folder
from torchft.launch.group import Group, torchrun
from torchft.launch.monitor import GroupMonitor, RunMonitor
from torchft.launch.processes import psutil
from torchft.launch.starting import Starting
from torchft.launch.stopping import StopSignals
from torchft.toy.text import read_text

__all__ = ["run_demo"]

WORKER = "torchft.demo.train"
"""The module that each worker runs."""


def run_demo(options: DemoOptions, view: View) -> Summary:
    """Run it from start to end.

    Raises:
        CorpusError: the text cannot be read; before anything is started.
        MissingExtra: psutil is not installed.
        OSError: the folder for logs cannot be made.
    """
    psutil()
    read_text(options.corpus)
    folder = run_folder(options.keep, "torchft_demo_")
    with _forked(options, view) as forked, StopSignals() as stop, _lighthouse(options) as address:
        run = make_run(options, view, folder, address)
        for group, process in zip(run.groups, forked, strict=False):
            group.forked = process
        with view:
            run.tell(_plan(options))
            try:
                run.play(stop)
            finally:
                run.end()
    summary = summarise(options, run, folder)
    if options.keep is None and summary.good:
        shutil.rmtree(folder)
    return summary


@contextlib.contextmanager
def _forked(options: DemoOptions, view: View) -> Iterator[list[prefork.Forked]]:
    """A process for each group's first life, made before this one has threads; none where it has
    some already."""
    if not prefork.can_fork():
        yield []
        return
    view.tell(0.0, "PyTorch is imported, once for all groups: some seconds")
    prefork.import_once(WORKER)
    forked = prefork.fork_agents(options.replicas)
    try:
        yield forked
    finally:
        for process in forked:
            process.discard()


def make_run(options: DemoOptions, view: View, folder: Path, lighthouse: str) -> GroupRun:
    """Return a run with everything that it needs; nothing is started yet."""
    numbers = range(options.replicas)
    return GroupRun(
        [make_group(number, options, folder, lighthouse) for number in numbers],
        RunMonitor([GroupMonitor(number, records_of(folder, number)) for number in numbers]),
        options.scenario,
        view,
        starting=Starting(folder, groups=options.replicas, workers=options.workers),
        target=options.target,
        timeout_s=options.timeout_s,
    )


def _plan(options: DemoOptions) -> str:
    scenario = options.scenario
    kill = "nobody is killed"
    if scenario is not None:
        victim, step = scenario.victim, scenario.at_step
        kill = f"seed {options.seed} kills group {victim} soon after its step {step}"
    return f"{options.replicas} groups train by {options.strategy} to step {options.target}; {kill}"


def summarise(options: DemoOptions, run: GroupRun, folder: Path) -> Summary:
    """Return the figures of a run that has ended."""
    endings = read_final_reports(folder)
    scenario = options.scenario
    return Summary(
        groups=[
            group_result(group, monitor, [e for e in endings if e.group == group.number])
            for group, monitor in zip(run.groups, run.monitor.groups, strict=True)
        ],
        workers=options.workers,
        seed=options.seed,
        strategy=options.strategy,
        wall_s=run.elapsed_s,
        kill=kill_result(run.groups[scenario.victim], run.monitor, run.killed_id)
        if scenario
        else None,
        trouble=run.trouble,
        stopped_by=run.stopped_by,
        folder=folder,
    )


@contextlib.contextmanager
def _lighthouse(options: DemoOptions) -> Iterator[str]:
    from torchft.coordination import LighthouseServer  # the extension, only now

    server = LighthouseServer(
        bind="127.0.0.1:0",
        min_replicas=options.min_groups,
        join_timeout_ms=10_000,
        heartbeat_timeout_ms=options.heartbeat_timeout_ms,
    )
    try:
        # By number: the machine's own name need not resolve for a demo.
        yield f"http://127.0.0.1:{urlsplit(server.address()).port}"
    finally:
        server.shutdown()


def records_of(folder: Path, number: int) -> Path:
    """The step records of a group."""
    return folder / f"group_{number}.records.jsonl"


def make_group(number: int, options: DemoOptions, folder: Path, lighthouse: str) -> Group:
    """One replica group, not started yet."""
    command = ["-m", WORKER, str(folder), options.to_json()]
    environment = settings.for_child(
        REPLICA_GROUP_ID=str(number),
        NUM_REPLICA_GROUPS=str(options.replicas),
        TORCHFT_LIGHTHOUSE=lighthouse,
        TORCHFT_STEP_RECORDS=str(records_of(folder, number)),
        TORCHFT_MANAGER_PORT=None,  # one number cannot serve several groups
        OMP_NUM_THREADS="1",
        PYTHONUNBUFFERED="1",
        TORCH_CPP_LOG_LEVEL="ERROR",  # DDP's advice on unused parameters is not for the reader
        CUDA_VISIBLE_DEVICES="",  # the model is too small to gain from a device
    )
    log = folder / f"group_{number}.log"
    return Group(number, torchrun(command, workers=options.workers), environment, log)
