"""One node of a local run, seen from inside its process: its manager, and its word with the parent.

A target is what the process does. It meets the others once, and then trains:

    def target(node: LocalNode) -> object:
        manager = node.connect(load, save)
        ...
        return result
"""

from __future__ import annotations

import gc
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from torchft import settings
from torchft.coordination import LighthouseServer, watch_parent
from torchft.errors import TorchftError
from torchft.manager import Manager
from torchft.manager.peers import ManagerPeers
from torchft.process_group import ProcessGroupGloo

__all__ = ["LocalNode", "NodeTask", "Target", "name_of", "run_node", "serve_lighthouse"]

HOST = "127.0.0.1"
NOT_OURS = (settings.MANAGER_PORT, "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
"""Variables of another job that this process may have been started in."""


def name_of(number: int) -> str:
    """Names sort as the numbers do, and so do ranks."""
    return f"node_{number:04d}"


@dataclass(frozen=True)
class NodeTask:
    """What a process is told when it starts."""

    number: int
    life: int
    """0, and one more for each restart."""
    join_steps: frozenset[int]
    """Steps before which it waits until another node has joined."""
    lighthouse: str
    records: Path
    """The file for its step records."""
    timeout: timedelta


class LocalNode:
    """One process of one node, with its model and its manager."""

    manager: Manager

    def __init__(self, task: NodeTask, pipe: Connection) -> None:
        self.number = task.number
        self.life = task.life
        self.name = name_of(task.number)
        self.pg = ProcessGroupGloo(timeout=task.timeout)
        self._task = task
        self._pipe = pipe
        self._store: TCPStore | None = None
        self._joined = False

    def connect(
        self,
        load: Callable[[Any], None] | None = None,
        save: Callable[[], Any] | None = None,
        **options: Any,
    ) -> Manager:
        """Make the manager, and wait until every node that starts with this one has its own.

        `load` and `save` move what a node that heals needs, if nobody else registers that;
        `options` are the manager's.
        """
        self._store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        timeout = self._task.timeout
        self.manager = Manager(
            pg=self.pg,
            load_state_dict=load,
            state_dict=save,
            min_replica_size=1,
            use_async_quorum=False,
            timeout=timeout,
            quorum_timeout=timeout,
            connect_timeout=timeout,
            rank=0,
            world_size=1,
            store_addr=HOST,
            store_port=self._store.port,
            lighthouse_addr=self._task.lighthouse,
            replica_id=self.name,
            hostname=HOST,
            **options,
        )
        self._tell("ready")
        self._pipe.recv()
        return self.manager

    def peers(self, *, deterministic: bool = False) -> ManagerPeers:
        """The other nodes, to exchange numbers with."""
        return ManagerPeers(self.manager, deterministic=deterministic)

    def joined(self) -> None:
        """A round has opened: nobody has to wait for this node's coming any longer."""
        if not self._joined:
            self._joined = True
            self._tell("joined")

    def wait_for_joins(self, step: int) -> None:
        """Before `step`: wait for a node that is to join there."""
        if step in self._task.join_steps:
            self._tell("at", step)
            self._pipe.recv()

    def report(self, value: Any) -> None:
        """Something that outlives this process, should it be killed."""
        self._tell("report", value)

    def kill_self(self) -> None:
        """End this process by SIGKILL, as a preempted machine does."""
        os.kill(os.getpid(), signal.SIGKILL)

    def close(self) -> None:
        """Leave the other nodes and free the connections."""
        if hasattr(self, "manager"):
            self.manager.shutdown()

    def _tell(self, kind: str, value: Any = None) -> None:
        self._pipe.send((kind, value))


Target = Callable[[LocalNode], Any]


def run_node(task: NodeTask, target: Target, pipe: Connection) -> None:
    """Run `target`; then stay, for the others may still heal from here, until the parent's word."""
    _settle_in()
    for name in NOT_OURS:
        os.environ.pop(name, None)
    os.environ[settings.STEP_RECORDS] = str(task.records)
    node = LocalNode(task, pipe)
    try:
        pipe.send(("done", target(node)))
    except BaseException as error:
        ours = isinstance(error, TorchftError) and type(error).__module__.startswith("torchft.")
        named = (type(error), str(error)) if ours else None
        pipe.send(("failed", (traceback.format_exc(), named)))
    pipe.recv()
    node.close()


def serve_lighthouse(options: dict[str, Any], pipe: Connection) -> None:
    """Serve until the parent's word. A process of its own: the parent stays without threads."""
    _settle_in()
    lighthouse = LighthouseServer(bind=f"{HOST}:0", min_replicas=1, **options)
    pipe.send(lighthouse.address())
    pipe.recv()
    lighthouse.shutdown()


def _settle_in() -> None:
    """What came along from the parent is the parent's: its objects, its handlers, its Ctrl-C."""
    gc.freeze()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch_parent()
    torch.set_num_threads(1)
