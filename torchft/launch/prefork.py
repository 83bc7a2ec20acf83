"""Torchrun agents forked from a process that has imported torch once for all of them.

Importing torch and a first optimizer takes seconds of a core, and a demo on one machine would do it
twice for each group: in the agent and in its worker. So the launcher imports torch, forks one
process per group while it has a single thread and no handle of the extension, and gives each its
orders later: the agent's arguments, environment and log. The agent is torch's own elastic agent,
and forks its workers.

Only the first start of a group is like this. A group that is started again is a `torchrun` of its
own, so what a recovery takes is what it takes on a cluster.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torchft.launch.agent import end_with_parent
from torchft.retry import wait_until

__all__ = ["Forked", "can_fork", "fork_agents", "import_once"]


def can_fork() -> bool:
    """Whether this process may fork: on Linux, with one thread."""
    return sys.platform.startswith("linux") and threading.active_count() == 1


def import_once(module: str) -> None:
    """Import all that agents and workers need: torchrun, what torch imports at its first optimizer,
    and `module`, whose `main(arguments)` the workers will run."""
    import torch
    import torch.distributed.run

    importlib.import_module(module)
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).zero_grad()


class Forked:
    """A process that waits for its orders and then is one torchrun agent. It has what
    `subprocess.Popen` has, as far as a `Group` uses it."""

    def __init__(self, pid: int, orders: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """Exit code; negative: the number of the signal that ended it."""
        self._orders = orders

    def run(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Give the orders: torchrun's `arguments`, the whole environment, the file for both
        output streams."""
        order = {"arguments": list(arguments), "environment": dict(environment), "log": str(log)}
        with os.fdopen(self._orders, "w") as pipe:
            json.dump(order, pipe)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid == self.pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait at most `timeout` seconds for its end; returns the exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        within_s = math.inf if timeout is None else timeout
        if not wait_until(lambda: self.poll() is not None, within_s):
            raise subprocess.TimeoutExpired("a forked agent", within_s)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it is known to be gone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def discard(self) -> None:
        """End it if it has had no orders yet."""
        with contextlib.suppress(OSError):  # closed with the orders
            os.close(self._orders)
            self.wait()


def fork_agents(count: int) -> list[Forked]:
    """Fork `count` processes that wait for orders. Call it after `import_once`.

    Raises:
        RuntimeError: this process has threads, so a fork of it could wait for ever.
    """
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("a process with threads cannot be forked: fork before they start")
    forked: list[Forked] = []
    for _ in range(count):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write)
            for other in forked:
                os.close(other._orders)
            _wait_for_orders(read)
        os.close(read)
        forked.append(Forked(pid, write))
    return forked


def _wait_for_orders(read: int) -> NoReturn:
    """In the child: never returns, and runs nothing of its parent's on its way out."""
    code = 1
    try:
        end_with_parent()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.setsid()  # a Ctrl-C in the terminal is for the launcher
        with os.fdopen(read) as pipe:
            text = pipe.read()
        code = _obey(json.loads(text)) if text else 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _obey(order: dict[str, Any]) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, number)
    os.environ.clear()
    os.environ.update(order["environment"])
    _agent(order["arguments"])
    return 0


def _agent(arguments: list[str]) -> None:
    """torchrun with `--standalone`, but for its workers: they are forked."""
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    config, _, command = config_from_args(parse_args(_with_rendezvous(arguments)))
    config.start_method = "fork"
    module, *own = command[command.index("-m") + 1 :]
    record(elastic_launch(config, _work))(module, own)


def _with_rendezvous(arguments: Sequence[str]) -> list[str]:
    """What torchrun makes of `--standalone`."""
    alone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"]
    return [*alone, *(one for one in arguments if one != "--standalone")]


def _work(module: str, arguments: list[str]) -> None:
    """One worker: what `python -m module` does."""
    importlib.import_module(module).main(arguments)
