"""The demo of the parameter server: workers come and go, the server dies, nothing is lost.

Everything is real: `diloco server` and `diloco worker` as processes, a Trainer in each worker,
SIGKILL. What happens when is decided in `server_story`; here it is carried out. Whatever ends the
run, no process of it is left.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from torchft.demo import server_scenario as scenario
from torchft.demo.server_monitor import ServerMonitor, WorkerMonitor
from torchft.demo.server_options import ServerDemoOptions, free_port, names
from torchft.demo.server_summary import (
    ServerSummary,
    WorkerResult,
    held_by_workers,
    read_result,
)
from torchft.demo.server_view import ServerFrame, WorkerRow
from torchft.demo.view import View
from torchft.errors import SettingsError, UnreachableError
from torchft.launch.group import Group
from torchft.launch.logs import last_error
from torchft.launch.processes import psutil
from torchft.launch.stopping import StopSignals
from torchft.parameter_server.auth import Scope, read_token
from torchft.parameter_server.worker.client import DiLoCoClient

__all__ = ["ServerDemo", "run_server_demo"]

LOOK_EVERY_S = 0.05
SERVER_ENDS_S = 60.0
"""So long it may take to save and end."""


def run_server_demo(options: ServerDemoOptions, view: View) -> ServerSummary:
    """Run it from start to end.

    Raises:
        MissingExtra: psutil is not installed.
        OSError: the folder cannot be written to.
    """
    psutil()
    demo = ServerDemo(options, view)
    with StopSignals() as stop, view:
        try:
            demo.play(stop)
        finally:
            demo.end()
    return demo.summary()


class ServerDemo:
    """One run; `play`, then `end`, then `summary`."""

    def __init__(self, options: ServerDemoOptions, view: View) -> None:
        port = free_port()
        self.options = options
        self.server = options.server(port)
        self.workers = {n: options.worker(i, n, port) for i, n in enumerate(names())}
        self.logs = {n: WorkerMonitor(options.output_of(n) / "log.jsonl") for n in names()}
        self.watch = ServerMonitor(self._ask)
        self.controller = scenario.Controller()
        self.trouble: str | None = None
        """Why the run was given up, if it was."""
        self.stopped_by: int | None = None
        self.rounds_at_kill = self.rounds_after_restart = 0
        self.back_at: float | None = None
        """When the new server was first heard."""
        self._port, self._view = port, view
        self._client: DiLoCoClient | None = None
        self._began = time.monotonic()
        self._wall_s = 0.0
        self._known: frozenset[str] = frozenset()
        self._ended: set[str] = set()

    def play(self, stop: StopSignals) -> None:
        """From the first process until all workers have ended, or the run has to be given up."""
        for name in names():
            self.options.output_of(name).mkdir(parents=True)
        self.server.start()
        for name in (scenario.FIRST, scenario.VICTIM):
            self.workers[name].start()
        self._tell("a server is started, and the workers a and b")
        while not self._over(stop):
            self._look()
            self._act()
            self._view.show(self._frame())
            time.sleep(LOOK_EVERY_S)
        if self.trouble is None:
            self._end_server()

    def end(self) -> None:
        """End what still runs."""
        self._wall_s = time.monotonic() - self._began
        everybody = [*self.workers.values(), self.server]
        for process in everybody:
            process.ask_to_stop()  # all at once, so that their graces pass together
        for process in everybody:
            process.stop()
        if self._client is not None:
            self._client.close()

    # ------------------------------------------------------------------ look

    def _ask(self) -> dict[str, Any]:
        if self._client is None:
            if not self.options.tokens.exists():
                raise UnreachableError("the server has not made its tokens yet")
            token = read_token(self.options.tokens, Scope.READ)
            self._client = DiLoCoClient(f"127.0.0.1:{self._port}", token=token, timeout_s=5.0)
        return self._client.get("/v1/status")

    def _look(self) -> None:
        for log in self.logs.values():
            log.poll()
        if self.server.alive:
            self.watch.poll()
        self._note_members()
        if len(self.server.lives) > 1 and self.watch.status and self.back_at is None:
            self.back_at, self.rounds_after_restart = time.monotonic(), self.watch.version
            self._tell(f"the server is back, with round {self.watch.version}")
        for name, process in self.workers.items():
            self._look_for_end(name, process)
        if self.server.poll() is not None and self.server.life.killed is None:
            self._give_up("the server", self.server)

    def _note_members(self) -> None:
        if not self.watch.status:
            return
        members = self.watch.members
        for name in sorted(members - self._known):
            self._tell(f"{name} is a member, at round {self.watch.version}")
        self._known = members

    def _look_for_end(self, name: str, process: Group) -> None:
        code = process.poll()
        if code is None or name in self._ended or process.life.killed is not None:
            return
        self._ended.add(name)
        self._tell(f"{name} ended with exit code {code}")
        if code != 0 or self.controller.stage is not scenario.Stage.ENDING:
            self._give_up(name, process)

    def _give_up(self, name: str, process: Group) -> None:
        if self.trouble is None:
            self.trouble = f"{name} ended with exit code {process.life.code}"
            if error := last_error(process.log):
                self.trouble += f" after {error}"

    def _over(self, stop: StopSignals) -> bool:
        if stop.received is not None:
            self.stopped_by = stop.received
            self.trouble = f"stopped by {signal.Signals(stop.received).name}"
        elif time.monotonic() - self._began > self.options.timeout_s:
            part = self.controller.stage.value
            self.trouble = f"not over after {self.options.timeout_s:g} s; it waited {part}"
        return self.trouble is not None or set(scenario.SURVIVORS) <= self._ended

    # ------------------------------------------------------------------ act

    def _act(self) -> None:
        match self.controller.decide(self._snapshot()):
            case scenario.KillWorker(worker=name):
                self.workers[name].kill()
                self._tell(f"{name} is killed: SIGKILL, in round {self.watch.version + 1}")
            case scenario.StartWorker(worker=name):
                self._tell(f"a went on alone; {name} is started, and joins when it is up")
                self.workers[name].start()
            case scenario.KillServer():
                self._kill_server()
            case scenario.StartServer():
                self._tell("both have trained on without it; the server is started again")
                self.watch.begin_life()
                self.server.start()
            case scenario.EndAt(version=version):
                self._tell(f"rounds close again; all are to end at round {version}")
                draft = self.options.end_file.with_suffix(".draft")
                draft.write_text(str(version))
                os.replace(draft, self.options.end_file)

    def _kill_server(self) -> None:
        self.rounds_at_kill = self.watch.version
        self.server.kill()
        self.watch.status = {}
        self._tell(f"the server is killed: SIGKILL, after round {self.rounds_at_kill}")

    def _end_server(self) -> None:
        """It saves what its workers hold."""
        self.watch.poll()
        self.server.ask_to_stop()
        until = time.monotonic() + SERVER_ENDS_S
        while self.server.poll() is None:
            if time.monotonic() > until:
                self.trouble = f"the server did not end within {SERVER_ENDS_S:g} s of SIGTERM"
                return
            time.sleep(LOOK_EVERY_S)

    def _snapshot(self) -> scenario.Snapshot:
        last = {name: log.last for name, log in self.logs.items()}
        return scenario.Snapshot(
            version=self.watch.version,
            members=self.watch.members,
            steps={name: step.step for name, step in last.items() if step is not None},
            syncs={name: step.syncs for name, step in last.items() if step is not None},
        )

    # ------------------------------------------------------------------ show

    def _tell(self, news: str) -> None:
        self._view.tell(time.monotonic() - self._began, news)

    def _frame(self) -> ServerFrame:
        fragments = self.watch.status.get("fragments", [])
        return ServerFrame(
            elapsed_s=time.monotonic() - self._began,
            server=self._server_state(),
            version=self.watch.version,
            waiting=fragments[0]["waiting"] if fragments else "",
            megabytes=(self.watch.bytes_in + self.watch.bytes_out) / 1e6,
            rows=[self._row(name) for name, process in self.workers.items() if process.lives],
        )

    def _server_state(self) -> str:
        if not self.server.alive:
            return "killed" if self.server.life.killed is not None else "ended"
        return "up" if self.watch.status else "starting"

    def _row(self, name: str) -> WorkerRow:
        process, last = self.workers[name], self.logs[name].last
        state = "starting" if last is None else "training"
        if state == "training" and not self.server.alive:
            state = "alone"
        if not process.alive:
            state = "killed" if process.life.killed is not None else "ended"
        return WorkerRow(
            name=name,
            state=state,
            step=last.step if last else 0,
            rounds=last.syncs if last else 0,
            loss=last.loss if last else None,
        )

    # ------------------------------------------------------------------ the end

    def summary(self) -> ServerSummary:
        """After `end`."""
        killed = self.server.lives[0].killed if self.server.lives else None
        came_back = killed is not None and self.back_at is not None
        return ServerSummary(
            workers=[self._result(name) for name, p in self.workers.items() if p.lives],
            told=self.controller.stage is scenario.Stage.ENDING,
            rounds=self.watch.version,
            rounds_at_kill=self.rounds_at_kill,
            rounds_after_restart=self.rounds_after_restart,
            bytes_in=self.watch.bytes_in,
            bytes_out=self.watch.bytes_out,
            away_s=self.back_at - killed if came_back else None,  # type: ignore[operator]
            server_code=self.server.lives[-1].code if self.server.lives else None,
            server_digest=self._server_digest(),
            wall_s=self._wall_s,
            trouble=self.trouble,
            stopped_by=self.stopped_by,
            folder=self.options.folder,
        )

    def _server_digest(self) -> str | None:
        if self.trouble is not None:
            return None
        try:
            return held_by_workers(self.options.output)
        except SettingsError as error:
            self.trouble = str(error)
            return None

    def _result(self, name: str) -> WorkerResult:
        process, log = self.workers[name], self.logs[name]
        told = read_result(self.options.output_of(name) / "result.json")
        return WorkerResult(
            name=name,
            killed=process.life.killed is not None,
            code=process.life.code,
            steps=log.last.step if log.last else 0,
            rounds=log.last.syncs if log.last else 0,
            paused_at_kill_s=self._paused(log, self.workers[scenario.VICTIM]),
            paused_without_server_s=self._paused(log, self.server),
            held_out=(told["held_out_before"], told["held_out_after"]) if told else None,
            digest=told.get("digest"),
        )

    def _paused(self, log: WorkerMonitor, victim: Group) -> float:
        killed = next((life.killed for life in victim.lives if life.killed is not None), None)
        until = None if killed is None else self.watch.moved_on(killed)
        return 0.0 if killed is None or until is None else log.longest_pause(killed, until)
