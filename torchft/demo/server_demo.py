"""The demo of the parameter server: workers come and go, the server dies, nothing is lost.

Everything is real: `diloco server` and `diloco worker` as processes, a training script in each
worker, SIGKILL. `server_scenario` decides what happens when; here it is carried out.
"""

from __future__ import annotations

import time
from typing import Any

from torchft.atomic import replacing
from torchft.demo.run import Run
from torchft.demo.scenario import Action, Controller, EndIn, KillProcess, RunSnapshot, StartProcess
from torchft.demo.server_monitor import ServerMonitor, WorkerMonitor
from torchft.demo.server_options import ServerDemoOptions, free_port
from torchft.demo.server_scenario import FIRST, SERVER, STAGES, SURVIVORS, VICTIM, WORKERS
from torchft.demo.server_summary import ServerSummary, WorkerResult, held_by_workers, read_result
from torchft.demo.view import Frame, View, loss_text
from torchft.errors import SettingsError, UnreachableError
from torchft.launch.group import Group
from torchft.launch.processes import psutil
from torchft.launch.stopping import StopSignals
from torchft.parameter_server.auth import Scope, read_token
from torchft.parameter_server.worker.client import DiLoCoClient
from torchft.retry import wait_until

__all__ = ["ServerRun", "run_server_demo"]

SERVER_ENDS_S = 60.0
"""How long the server may take to save and end."""


def run_server_demo(options: ServerDemoOptions, view: View) -> ServerSummary:
    """Run it from start to end.

    Raises:
        MissingExtra: psutil is not installed.
        OSError: the folder cannot be written to.
    """
    psutil()
    run = ServerRun(options, view)
    with StopSignals() as stop, view:
        try:
            run.play(stop)
        finally:
            run.end()
    return run.summary()


class ServerRun(Run):
    """A parameter server and its workers, on the engine of `run.py`."""

    look_every_s = 0.05

    def __init__(self, options: ServerDemoOptions, view: View) -> None:
        port = free_port()
        self.options = options
        self.server = options.server(port)
        self.workers = {n: options.worker(i, n, port) for i, n in enumerate(WORKERS)}
        self.logs = {n: WorkerMonitor(options.output_of(n) / "log.jsonl") for n in WORKERS}
        self.monitor = ServerMonitor(self._ask)
        self.rounds_at_kill = self.rounds_after_restart = 0
        self.back_at: float | None = None
        """When the new server was first heard."""
        self._port = port
        self._client: DiLoCoClient | None = None
        self._wall_s = 0.0
        self._known: frozenset[str] = frozenset()
        everybody = {**self.workers, SERVER: self.server}
        super().__init__(everybody, Controller(STAGES), view, timeout_s=options.timeout_s)

    def begin(self) -> None:
        for name in WORKERS:
            self.options.output_of(name).mkdir(parents=True)
        for name in (SERVER, FIRST, VICTIM):
            self.processes[name].start()
        self.tell("a server is started, and the workers a and b")

    def end(self) -> None:
        self._wall_s = self.elapsed_s
        super().end()
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

    def look(self) -> None:
        for log in self.logs.values():
            log.poll()
        if self.server.alive:
            self.monitor.poll()
        self._note_members()
        if len(self.server.lives) > 1 and self.monitor.status and self.back_at is None:
            self.back_at, self.rounds_after_restart = time.monotonic(), self.monitor.version
            self.tell(f"the server is back, with round {self.monitor.version}")

    def _note_members(self) -> None:
        if not self.monitor.status:
            return
        members = self.monitor.members
        for name in sorted(members - self._known):
            self.tell(f"{name} is a member, at round {self.monitor.version}")
        self._known = members

    def snapshot(self) -> RunSnapshot:
        last = {name: log.last for name, log in self.logs.items() if log.last is not None}
        return RunSnapshot(
            version=self.monitor.version,
            members=self.monitor.members,
            steps={name: step.step for name, step in last.items()},
            rounds={name: step.syncs for name, step in last.items()},
        )

    def is_over(self) -> bool:
        return set(SURVIVORS) <= self.ended

    def why_too_early(self, name: str, code: int) -> str | None:
        good = code == 0 and self.controller.done and name != SERVER
        return None if good else self.failure(name)

    # ------------------------------------------------------------------ act

    def carry_out(self, action: Action) -> None:
        match action:
            case KillProcess(name) if name == SERVER:
                self._kill_server()
            case KillProcess(name):
                self.workers[name].kill()
                self.tell(f"{name} is killed: SIGKILL, in round {self.monitor.version + 1}")
            case StartProcess(name) if name == SERVER:
                self.tell("both have trained on without it; the server is started again")
                self.monitor.begin_life()
                self.server.start()
            case StartProcess(name):
                self.tell(f"a went on alone; {name} is started, and joins when it is up")
                self.workers[name].start()
            case EndIn(rounds):
                self._end_at(self.monitor.version + rounds)

    def _kill_server(self) -> None:
        self.rounds_at_kill = self.monitor.version
        self.server.kill()
        self.monitor.status = {}
        self.tell(f"the server is killed: SIGKILL, after round {self.rounds_at_kill}")

    def _end_at(self, version: int) -> None:
        self.tell(f"rounds close again; all are to end at round {version}")
        with replacing(self.options.end_file) as draft:
            draft.write_text(str(version))

    def finish(self) -> None:
        """Let the server save what its workers hold, and end."""
        if self.trouble is not None:
            return
        self.monitor.poll()
        self.server.ask_to_stop()
        if not wait_until(lambda: self.server.poll() is not None, SERVER_ENDS_S):
            self.trouble = f"the server did not end within {SERVER_ENDS_S:g} s of SIGTERM"

    # ------------------------------------------------------------------ show

    def frame(self) -> Frame:
        monitor = self.monitor
        fragments = monitor.status.get("fragments", [])
        moved = (monitor.bytes_in + monitor.bytes_out) / 1e6
        return Frame(
            elapsed_s=self.elapsed_s,
            title=f"server {self._server_state()}: {monitor.version} rounds, {moved:.1f} MB",
            columns=("worker", "state", "step", "loss", "rounds"),
            rows=[self._row(name) for name, process in self.workers.items() if process.lives],
            caption=fragments[0]["waiting"] if fragments else "",
        )

    def _server_state(self) -> str:
        if not self.server.alive:
            return "killed" if self.server.life.killed is not None else "ended"
        return "up" if self.monitor.status else "starting"

    def _row(self, name: str) -> list[str]:
        process, last = self.workers[name], self.logs[name].last
        state = "starting" if last is None else "training" if self.server.alive else "alone"
        if not process.alive:
            state = "killed" if process.life.killed is not None else "ended"
        step, rounds = (last.step, last.syncs) if last else (0, 0)
        return [name, state, str(step), loss_text(last.loss if last else None), str(rounds)]

    # ------------------------------------------------------------------ the end

    def summary(self) -> ServerSummary:
        """Return the figures of the run; call it after `end`."""
        killed = self.server.lives[0].killed if self.server.lives else None
        came_back = killed is not None and self.back_at is not None
        return ServerSummary(
            workers=[self._result(name) for name, p in self.workers.items() if p.lives],
            told=self.controller.done,
            rounds=self.monitor.version,
            rounds_at_kill=self.rounds_at_kill,
            rounds_after_restart=self.rounds_after_restart,
            bytes_in=self.monitor.bytes_in,
            bytes_out=self.monitor.bytes_out,
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
            paused_at_kill_s=self._paused(log, self.workers[VICTIM]),
            paused_without_server_s=self._paused(log, self.server),
            held_out=(told["held_out_before"], told["held_out_after"]) if told else None,
            digest=told.get("digest"),
        )

    def _paused(self, log: WorkerMonitor, victim: Group) -> float:
        killed = next((life.killed for life in victim.lives if life.killed is not None), None)
        until = None if killed is None else self.monitor.moved_on(killed)
        return 0.0 if killed is None or until is None else log.longest_pause(killed, until)
