"""One replica group on this machine: a torchrun child and its workers, over one or more lives.

A life is from the spawn of an agent until that agent is gone, whether it ended, was stopped or was
killed. Times are `time.monotonic()`, so that they can be compared with the workers' step records.
Whoever makes a group ends it: `stop` leaves no process behind.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchft.errors import TorchftError
from torchft.launch.prefork import Forked
from torchft.launch.processes import kill_all, kill_tree, tree

__all__ = ["Group", "GroupError", "Life", "torchrun"]

MAX_RESTARTS = 1
"""How often an agent restarts its workers after one of them ended in error."""

AGENT = (sys.executable, "-m", "torchft.launch.agent")
"""What a group's command begins with."""

STOP_GRACE_S = 3.0
"""How long a group that is asked to end has until it is killed."""


class GroupError(TorchftError):
    """The group is not in the state that the call needs: it already runs, or it does not."""


@dataclass
class Life:
    """One torchrun agent, from its spawn on."""

    pid: int
    spawned: float
    killed: float | None = None
    """When this program sent SIGKILL, if it did."""
    ended: float | None = None
    """When the agent was found to be gone."""
    code: int | None = None
    """The agent's exit code; negative: the number of the signal that ended it."""


@dataclass
class Group:
    """What to run and the lives it has had."""

    number: int
    command: Sequence[str]
    env: Mapping[str, str]
    """The whole environment of the child."""
    log: Path
    """Both output streams of agent and workers; each life adds to it."""
    lives: list[Life] = field(default_factory=list)
    forked: Forked | None = None
    """A process that has imported torch, for the first life."""
    _process: subprocess.Popen[bytes] | Forked | None = None

    @property
    def alive(self) -> bool:
        """True from a start until the agent is found to be gone."""
        return self.poll() is None and self._process is not None

    @property
    def life(self) -> Life:
        """The latest one.

        Raises:
            GroupError: it never started.
        """
        if not self.lives:
            raise GroupError(f"group {self.number} has not been started")
        return self.lives[-1]

    def start(self) -> Life:
        """Spawn the agent.

        Raises:
            GroupError: it runs already.
        """
        if self.alive:
            raise GroupError(f"group {self.number} already runs as process {self.life.pid}")
        spawned = time.monotonic()
        self._process = self._spawn()
        self.lives.append(Life(self._process.pid, spawned))
        return self.life

    def _spawn(self) -> subprocess.Popen[bytes] | Forked:
        forked, self.forked = self.forked, None
        if forked is not None:
            forked.run(self.command[len(AGENT) :], self.env, self.log)
            return forked
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command,
                env=dict(self.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C in the terminal is for the launcher, which then ends its groups in order.
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit code of the last life, or None while it runs or before the first."""
        if self._process is None:
            return None
        code = self._process.poll()
        life = self.life
        if code is not None and life.ended is None:
            life.ended, life.code = time.monotonic(), code
        return code

    def kill(self) -> Life:
        """SIGKILL the agent and all below it at once, as a power cut would. Returns that life.

        Raises:
            GroupError: it does not run.
        """
        if not self.alive or self._process is None:
            raise GroupError(f"group {self.number} does not run")
        self.life.killed = time.monotonic()
        kill_tree(self._process.pid)
        self._process.wait()
        self.poll()
        return self.life

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the agent, which ends its workers. Does not wait."""
        if self.alive and self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self, *, grace_s: float = STOP_GRACE_S) -> None:
        """End the group: politely, then by force. Nothing of it is left on return."""
        if not self.alive or self._process is None:
            return
        below = tree(self._process.pid)
        self.ask_to_stop()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_s)
        kill_tree(self._process.pid)
        kill_all(below)  # workers that outlived their agent are nobody's children now
        self._process.wait()
        self.poll()


def torchrun(
    command: Sequence[str], *, workers: int, max_restarts: int = MAX_RESTARTS
) -> list[str]:
    """The command line of one replica group on this machine.

    torchrun picks a free port for its own store, so that groups need no numbers from us.
    """
    return [
        *AGENT,
        *("--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={workers}"),
        *(f"--max-restarts={max_restarts}", *command),
    ]
