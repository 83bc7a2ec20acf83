"""A job on this machine: a real lighthouse, and replica groups as real processes.

    World(tmp_path).run(story, story)      # story(group) in a process for each group

The processes are forked from the test's, which has imported torch already, before any of them
starts a thread or a server. They tell each other of events by files; `group.dies()` is SIGKILL.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # whoever makes an optimizer needs it: seconds, in each group but for this
from helpers.waiting import until
from torch.distributed import TCPStore

from torchft.coordination import LighthouseServer
from torchft.manager import Manager
from torchft.network_namespaces import Host
from torchft.process_group import ProcessGroupGloo

DEADLINE_S = 60.0
HERE = "127.0.0.1"
KILLED = "killed"
"""What a story returns that ended by SIGKILL."""


class Group:
    """One rank of a replica group, with a weight `w` that healing moves."""

    def __init__(self, world: World, name: str, rank: int, world_size: int) -> None:
        self.world = world
        self.name = name
        self.rank = rank
        self.w = torch.zeros(3)
        self.pg = ProcessGroupGloo(timeout=timedelta(seconds=20))
        self._world_size = world_size
        self._address = world.hosts[self.number].address if world.hosts else HERE
        self._store = self._meet()

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("group_"))

    def environment(self) -> dict[str, str]:
        """What a script finds that torchrun starts as this rank."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self._world_size),
            "MASTER_ADDR": self._address,
            "MASTER_PORT": str(self._store.port),
            "REPLICA_GROUP_ID": str(self.number),
            "TORCHFT_LIGHTHOUSE": self.world.wait("lighthouse"),
        }

    def manager(self, **options: Any) -> Manager:
        """A manager of this rank; options override the defaults of the tests."""
        defaults: dict[str, Any] = {
            "pg": self.pg,
            "load_state_dict": lambda state: self.w.copy_(state["w"]),
            "state_dict": lambda: {"w": self.w},
            "min_replica_size": 1,
            "timeout": timedelta(seconds=20),
            "quorum_timeout": timedelta(seconds=20),
            "connect_timeout": timedelta(seconds=20),
            "rank": self.rank,
            "world_size": self._world_size,
            "store_addr": self._address,
            "store_port": self._store.port,
            "lighthouse_addr": self.world.wait("lighthouse"),
            "replica_id": self.name,
            "hostname": self._address,
        }
        return Manager(**{**defaults, **options})

    def dies(self) -> None:
        """As a preempted machine does."""
        os.kill(os.getpid(), signal.SIGKILL)

    def _meet(self) -> TCPStore:
        if self.rank == 0:
            store = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)
            self.world.happen(f"{self.name}'s store", str(store.port))
            return store
        port = int(self.world.wait(f"{self.name}'s store"))
        return TCPStore(self._address, port, is_master=False, wait_for_workers=False)


class World:
    """One job; `options` are the lighthouse's, `folder` an empty folder of its own.

    Each group lives on one of `hosts`, when they are given.
    """

    def __init__(
        self,
        folder: Path,
        *,
        hosts: Sequence[Host] = (),
        deadline_s: float = DEADLINE_S,
        **options: Any,
    ) -> None:
        self.hosts = hosts
        self._deadline_s = deadline_s
        self.folder = folder
        self._options: dict[str, Any] = {
            "bind": f"{HERE}:0",
            "min_replicas": 1,
            "join_timeout_ms": 10_000,
            "heartbeat_timeout_ms": 2_500,  # a busy machine starves a group for a second
            **options,
        }

    def happen(self, event: str, value: str = "") -> None:
        """Tell all groups that something happened."""
        written = self.folder / f".{event}"
        written.write_text(value)
        written.rename(self.folder / event)

    def happened(self, event: str) -> bool:
        """Whether it has."""
        return (self.folder / event).exists()

    def wait(self, event: str) -> str:
        """Wait until it has; what was told with it."""
        until(lambda: self.happened(event), event, within_s=DEADLINE_S)
        return (self.folder / event).read_text()

    def run(self, *stories: Callable[[Group], Any], ranks: int = 1) -> list[Any]:
        """Run one story for each group, on each of its ranks; what they return, in that order.

        The first story that raised fails the test, with its traceback.
        """
        context = multiprocessing.get_context("fork")
        pipes: list[Connection] = []
        children = []
        for number, story in enumerate(stories):
            for rank in range(ranks):
                mine, theirs = context.Pipe(duplex=False)
                args = (self, story, f"group_{number}", rank, ranks, theirs)
                child = context.Process(target=_live, args=args, daemon=True)
                child.start()
                theirs.close()
                pipes.append(mine)
                children.append(child)
        lighthouse = LighthouseServer(**self._options)
        try:
            self.happen("lighthouse", lighthouse.address())
            return self._results(pipes)
        finally:
            for child in children:
                child.kill()
                child.join()
            lighthouse.shutdown()

    def _results(self, pipes: list[Connection]) -> list[Any]:
        results: dict[Connection, Any] = {}
        end = time.monotonic() + self._deadline_s
        while len(results) < len(pipes):
            waiting = [pipe for pipe in pipes if pipe not in results]
            ready = wait(waiting, timeout=end - time.monotonic())
            stuck = [f"rank {pipes.index(pipe)}" for pipe in waiting]
            assert ready, f"{stuck} did not end within {self._deadline_s} s"
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    result, raised = pipe.recv()
                except EOFError:
                    result, raised = KILLED, None
                assert raised is None, f"rank {pipes.index(pipe)}: {raised}"
                results[pipe] = result
        return [results[pipe] for pipe in pipes]


def _live(
    world: World,
    story: Callable[[Group], Any],
    name: str,
    rank: int,
    ranks: int,
    pipe: Connection,
) -> None:
    # What other tests left behind belongs to the parent: its threads are not here to be ended.
    gc.freeze()
    try:
        if world.hosts:
            world.hosts[int(name.removeprefix("group_"))].enter()
        pipe.send((story(Group(world, name, rank, ranks)), None))
    except BaseException:
        pipe.send((None, traceback.format_exc()))
    # Stay until the test has all results: the others may still heal from here or meet at our store.
    signal.pause()
