"""Real processes as the ranks of a process group, cheap enough for unit tests.

They fork from one warm server that has imported torch and started no thread, so a rank stands in
milliseconds. Each runs a function of the test's module with a `Rank`, through which it reports to
the test and waits for its word: tests wait for events, never for time to pass. The store that they
meet at is the test's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.distributed import TCPStore

from torchft.process_group import ProcessGroupGloo

DEADLINE_S = 30.0

WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(
    [
        *("pytest", "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.run"),
        *("torchft.parameter_server.worker.worker", "torchft.process_group"),
    ]
)


@dataclass
class Rank:
    """What a rank's function is given."""

    rank: int
    world_size: int
    store: str
    """`host:port` of the store."""
    line: Connection
    timeout: timedelta
    generation: int = 0
    group: ProcessGroupGloo | None = None

    def configure(
        self, rank: int | None = None, world_size: int | None = None, prefix: str | None = None
    ) -> ProcessGroupGloo:
        """A process group under a prefix that all ranks agree on, since all count alike."""
        self.generation += 1
        self.group = self.group or ProcessGroupGloo(self.timeout)
        self.group.configure(
            f"{self.store}/{prefix or f'quorum/{self.generation}'}",
            f"replica_{self.rank}",
            self.rank if rank is None else rank,
            world_size or self.world_size,
        )
        return self.group

    def tell(self, news: Any) -> None:
        """Report to the test."""
        self.line.send(news)

    def listen(self) -> Any:
        """Wait for the test's word."""
        assert self.line.poll(DEADLINE_S), f"rank {self.rank}: no word from the test"
        return self.line.recv()


@dataclass
class Ranks:
    """The test's side."""

    processes: list[Any] = field(default_factory=list)
    lines: list[Connection] = field(default_factory=list)
    deadline_s: float = DEADLINE_S

    def hear(self, rank: int) -> Any:
        """The next report of `rank`; its error, if it failed."""
        assert self.lines[rank].poll(self.deadline_s), f"rank {rank} says nothing"
        news = self.lines[rank].recv()
        if isinstance(news, _Failed):
            raise AssertionError(
                "\n".join([f"rank {rank} failed:\n{news.text}", *self._failures()])
            )
        return news

    def _failures(self) -> Iterator[str]:
        """Of the other ranks: what one waits for is often what another one died of."""
        for rank, line in enumerate(self.lines):
            with contextlib.suppress(EOFError):
                while line.poll():
                    if isinstance(news := line.recv(), _Failed):
                        yield f"rank {rank} failed:\n{news.text}"

    def hear_all(self, *ranks: int) -> list[Any]:
        """One report of each of `ranks`, or of all."""
        return [self.hear(rank) for rank in (ranks or range(len(self.lines)))]

    def tell(self, word: Any, *ranks: int) -> None:
        """Let `ranks`, or all, go on."""
        for rank in ranks or range(len(self.lines)):
            self.lines[rank].send(word)

    def silence(self, rank: int) -> None:
        """Stop it as it is: its sockets stay open and say nothing."""
        os.kill(self.processes[rank].pid, signal.SIGSTOP)

    def wake(self, rank: int) -> None:
        """Let a silenced one go on."""
        os.kill(self.processes[rank].pid, signal.SIGCONT)

    def kill(self, rank: int) -> None:
        """End it at once."""
        self.processes[rank].kill()
        self.processes[rank].join(DEADLINE_S)


@dataclass
class _Failed:
    text: str


@contextlib.contextmanager
def ranks(
    count: int,
    body: Callable[..., None],
    *args: Any,
    timeout_s: float = 20.0,
    deadline_s: float = DEADLINE_S,
) -> Iterator[Ranks]:
    """`count` processes that run `body(rank, *args)`; none is left behind. So long may each take
    for a report."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = Ranks(deadline_s=deadline_s)
    try:
        for rank in range(count):
            ours, theirs = WARM.Pipe()
            given = Rank(
                rank, count, f"localhost:{store.port}", theirs, timedelta(seconds=timeout_s)
            )
            process = WARM.Process(target=_run, args=(body, given, args), daemon=True)
            process.start()
            theirs.close()
            world.processes.append(process)
            world.lines.append(ours)
        yield world
    finally:
        for process in world.processes:
            process.kill()
        for process in world.processes:
            process.join(DEADLINE_S)


def _run(body: Callable[..., None], given: Rank, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        body(given, *args)
    except BaseException:
        given.line.send(_Failed(traceback.format_exc()))
