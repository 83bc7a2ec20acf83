"""N nodes of one training as real processes on this machine: gloo, a manager each, a lighthouse.

    starts = [NodeStart(0), NodeStart(1), NodeStart(1, at=40)]
    results = LocalNodes(target, starts, folder=folder).run()

runs `target(node)` in a process for each node, and gives what each returned. Here node 1 kills
itself some time before step 40, before which node 0 waits until node 1, started again, asks to take
part.

A parent that has one thread forks, so that a node stands in milliseconds; any other has a server
do that, which imports torch once, and to which the target must pickle. A child that fails ends the
run with its traceback. When the parent ends, however it does, its children end.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import urllib.request
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from torchft.errors import SettingsError, TorchftError
from torchft.experiments.local_node import (
    LocalNode,
    NodeTask,
    Target,
    name_of,
    run_node,
    serve_lighthouse,
)
from torchft.launch.guard import HINT, check_guarded, main_file

__all__ = ["LocalNode", "LocalNodes", "NodeFailed", "NodeStart"]

_LIGHTHOUSE = {"join_timeout_ms": 60_000, "heartbeat_timeout_ms": 2_500}
"""Who is there is waited for; a busy machine starves a node for a second."""
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""No proxy of the user's leads back to this machine."""
_SIGNAL_S = 1.0
"""A signal that comes just before a wait is seen after it: so long a wait takes at most."""
_LOOK_S = 0.01
_END_S = 5.0


class NodeFailed(TorchftError):
    """A node's process ended before its time; the message has its traceback."""


@dataclass(frozen=True)
class NodeStart:
    """How the process of one node is started."""

    node: int
    at: int | None = None
    """Before this step the others wait for it; None: it starts with the run."""


@dataclass
class _NodeProcess:
    """A process, as the parent sees it."""

    node: int
    process: Any
    pipe: Connection
    ready: bool = False
    """It has a manager, which heartbeats."""
    joined: bool = False
    at: int | None = None
    """The gate that it waits at."""
    ended: bool = False
    """Its target is over, or it was killed."""
    killed: bool = False


@dataclass
class LocalNodes:
    """One run.

    Raises:
        SettingsError: a node is to start twice at once.
    """

    target: Target
    starts: Sequence[NodeStart]
    folder: Path
    """For the step records, one file for each process."""
    may_die: Collection[int] = ()
    """Nodes that may be killed; the death of another one is a failure."""
    method: str | None = None
    """`fork` or `forkserver`; None: fork where that is safe."""
    timeout: timedelta = timedelta(seconds=60)
    """Of each quorum, collective and connection."""
    preload: Sequence[str] = ()
    """Modules that a fork server imports once for all."""
    on_report: Callable[[int, Any], None] = lambda node, value: None
    """Gets what nodes report while they run."""
    expected_errors: tuple[type[TorchftError], ...] = ()
    """Errors of a target that say enough: they come out as they are, caused by a NodeFailed."""
    _lives: list[_NodeProcess] = field(default_factory=list)
    _begun: dict[NodeStart, _NodeProcess] = field(default_factory=dict)
    _opened: set[int] = field(default_factory=set)
    """Gates that nobody waits at any longer."""

    def __post_init__(self) -> None:
        first = [start.node for start in self.starts if start.at is None]
        if len(first) != len(set(first)) or not first:
            raise SettingsError(f"nodes {sorted(first)} start with the run: each can do so once")
        self._later = [start for start in self.starts if start.at is not None]
        self._results: dict[int, Any] = {}

    def run(self) -> dict[int, Any]:
        """Node → what its target returned. A node that was killed and not restarted has none.

        Raises:
            NodeFailed: a target raised what is not `plain`, or a process died that was not to.
            SettingsError: the script that calls this does so whenever it is imported.
        """
        check_guarded()
        context = self._context()
        helpers: list[_NodeProcess] = []
        try:
            helpers.append(self._spawn(context, -1, serve_lighthouse, _LIGHTHOUSE))
            self._address = self._hear_address(helpers[0])
            for start in self.starts:
                if start.at is None:
                    self._start(context, start)
            while not all(life.ended for life in self._lives):
                self._listen()
                self._open_gates(context)
            self._end(self._lives)
            return self._results
        finally:
            self._kill(self._lives)
            self._end(helpers)
            self._kill(helpers)

    # --- processes

    def _context(self) -> Any:
        method = self.method or ("fork" if _can_fork() else "forkserver")
        self._imports = None if method == "fork" else main_file()
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(
                ["torch", "torchft.experiments.local_node", *self.preload]
            )
        return context

    def _spawn(
        self, context: Any, node: int, target: Callable[..., None], *args: Any
    ) -> _NodeProcess:
        mine, theirs = context.Pipe()
        process = context.Process(target=target, args=(*args, theirs))
        try:
            process.start()
        except Exception as error:
            raise SettingsError(
                f"a process cannot be started: {error}. Where this one has threads, all that a "
                "process needs must pickle: define models and data sets at the top of a module, "
                "or start Python with OMP_NUM_THREADS=1, so that it can fork"
            ) from error
        theirs.close()
        return _NodeProcess(node, process, mine)

    def _start(self, context: Any, start: NodeStart) -> None:
        life = len(self._of(start.node))
        later = [one.at for one in self._later if one.at is not None]
        task = NodeTask(
            number=start.node,
            life=life,
            join_steps=frozenset(at for at in later if start.at is None or at > start.at),
            lighthouse=self._address,
            records=self.folder / f"{name_of(start.node)}.{life}.jsonl",
            timeout=self.timeout,
        )
        self._begun[start] = self._spawn(context, start.node, run_node, task, self.target)
        self._lives.append(self._begun[start])

    def _hear_address(self, lighthouse: _NodeProcess) -> str:
        try:
            address = lighthouse.pipe.recv()
        except (EOFError, ConnectionResetError):
            lighthouse.process.join(_END_S)
            raise _not_started(lighthouse.process.exitcode, imports=self._imports) from None
        assert isinstance(address, str)
        return address

    def _end(self, lives: Sequence[_NodeProcess]) -> None:
        """Let them go, and wait a moment for it."""
        for life in lives:
            self._say(life, "end")
        for life in lives:
            life.process.join(_END_S)

    @staticmethod
    def _kill(lives: Sequence[_NodeProcess]) -> None:
        for life in lives:
            life.process.kill()
        for life in lives:
            life.process.join()
            life.pipe.close()

    @staticmethod
    def _say(life: _NodeProcess, word: str) -> None:
        with suppress(OSError):  # it is gone already
            life.pipe.send(word)

    # --- what they say

    def _listen(self) -> None:
        pipes = {life.pipe: life for life in self._lives if not life.ended}
        looks = any(life.at is not None for life in pipes.values())
        for pipe in wait(list(pipes), timeout=_LOOK_S if looks else _SIGNAL_S):
            assert isinstance(pipe, Connection)
            self._hear(pipes[pipe])

    def _hear(self, life: _NodeProcess) -> None:
        try:
            kind, value = life.pipe.recv()
        except (EOFError, ConnectionResetError):
            life.ended, life.killed, life.at = True, True, None
            if life.node not in self.may_die:
                life.process.join(_END_S)
                code = life.process.exitcode
                raise NodeFailed(f"node {life.node} died (exit code {code})") from None
            return
        if kind == "failed":
            self._fail(life, *value)
        if kind == "report":
            self.on_report(life.node, value)
        elif kind == "done":
            life.ended = True
            self._results[life.node] = value
        elif kind == "at":
            life.at = value
        elif kind == "joined":
            life.joined = True
        elif kind == "ready":
            life.ready = True
            self._let_go(life)

    def _fail(
        self, life: _NodeProcess, text: str, named: tuple[type[TorchftError], str] | None
    ) -> None:
        failed = NodeFailed(f"node {life.node} failed:\n{text}")
        if named is not None and issubclass(named[0], self.expected_errors):
            raise named[0](named[1]) from failed
        raise failed

    def _let_go(self, life: _NodeProcess) -> None:
        """Those that start with the run wait for each other; whoever comes later does not."""
        first = [one for start, one in self._begun.items() if start.at is None]
        together = first if life in first else [life]
        if all(one.ready for one in together):
            for one in together:
                self._say(one, "go")

    # --- joins

    def _open_gates(self, context: Any) -> None:
        for life in self._lives:
            if life.at is not None and self._may_pass(context, life.at):
                life.at = None
                self._say(life, "go")
        for start in self._later:
            if start.at in self._opened and self._can_start(start):
                self._start(context, start)

    def _may_pass(self, context: Any, gate: int) -> bool:
        """Whether those that join at `gate` are there; they are started as soon as they can be."""
        if gate not in self._opened:
            joining = [start for start in self._later if start.at == gate]
            there = [self._is_there(context, start) for start in joining]
            if all(there):
                self._opened.add(gate)
        return gate in self._opened

    def _is_there(self, context: Any, start: NodeStart) -> bool:
        """Whether nobody has to wait for it any longer."""
        if self._can_start(start):
            self._start(context, start)
            return False
        life = self._begun.get(start)
        if life is None:  # the process of before lives; if it came so far, it dies later
            return self._of(start.node)[-1].at is not None or self._of(start.node)[-1].ended
        return life.joined or life.ended or _asks(self._address, name_of(start.node))

    def _can_start(self, start: NodeStart) -> bool:
        lives = self._of(start.node)
        return start not in self._begun and (not lives or lives[-1].killed)

    def _of(self, node: int) -> list[_NodeProcess]:
        return [life for life in self._lives if life.node == node]


def _not_started(code: int | None, *, imports: str | None) -> TorchftError:
    """Why the first process ended without a word: the only one of which that may be the script."""
    if imports is None or code != 1:
        return NodeFailed(f"the lighthouse of this run did not start (exit code {code})")
    return SettingsError(
        f"a process of this run failed before its part began (its error is above). It imports "
        f"{imports} first, which has to be possible without training anew: {HINT}, or start Python "
        "with OMP_NUM_THREADS=1, so that it can fork"
    )


def _can_fork() -> bool:
    """Whether a child of ours would find no lock that a thread of ours holds."""
    if not sys.platform.startswith("linux") or torch.cuda.is_initialized():
        return False
    return len(os.listdir("/proc/self/task")) == 1


def _asks(lighthouse: str, name: str) -> bool:
    """Whether a replica of this name waits for a quorum."""
    with _DIRECTLY.open(f"{lighthouse}/status.json", timeout=10) as reply:
        replicas = json.load(reply)["replicas"]
    return any(
        one["replica_id"].startswith(f"{name}:") and one["asks_at_step"] is not None
        for one in replicas
    )
