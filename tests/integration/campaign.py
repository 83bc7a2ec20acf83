"""Groups that are killed at random moments and started again, while the others train on.

    plan(seed, 100)                               who is killed when, and how: pure
    Campaign(folder, train).run(plan(seed, 100))

`train(group)` runs on each rank of each life of a group, forked from the test's process, which has
no threads: the lighthouse, too, is a process of its own. It yields a report of each step that it
commits, with a digest of all that heals. All who report a step must report the same digest, and a
group that comes back must go on from where the others are.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from sharded import RANKS
from world import HERE, Group, World

from torchft.coordination import LighthouseServer

__all__ = ["Campaign", "Kill", "Report", "plan"]

GROUPS = 2
HANGS_S = 60.0
"""So long may it take until all groups train together, on a machine that others use."""
MORE_STEPS = 40
"""From the last heal to the end."""
_FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Kill:
    """How one group dies and comes back."""

    group: int
    joining: bool
    """It has just been started, and may not have healed yet."""
    after_s: float
    """Since it was started, when `joining`; else since all trained together."""
    first: int
    """The rank that dies first."""
    gap_s: float
    """Until the rest of the group is ended, as torchrun does it."""
    away_s: float
    """Until it is started again."""


@dataclass(frozen=True)
class Report:
    """A step that a rank has committed."""

    step: int
    groups: int
    """How many took part."""
    digest: str


Train = Callable[[Group], Iterator[Report]]


def plan(seed: int, kills: int) -> list[Kill]:
    """The kills of a campaign; the only group that has the state is never killed."""
    dice, made = random.Random(seed), list[Kill]()
    for _ in range(kills):
        joining = bool(made) and dice.random() < 0.3
        made.append(
            Kill(
                group=made[-1].group if joining else dice.randrange(GROUPS),
                joining=joining,
                after_s=dice.uniform(0, 1 if joining else 0.4),
                first=dice.randrange(RANKS),
                gap_s=dice.uniform(0, 0.2),
                away_s=dice.uniform(0, 0.4),
            )
        )
    return made


class Campaign:
    """One job, in an empty folder.

    Attributes:
        compared: how many reports had a report to be compared with.
    """

    def __init__(self, folder: Path, train: Train) -> None:
        self._folder, self._train = folder, train
        self._digests: dict[tuple[int, int], str] = {}
        """Of each step and rank."""
        self._newest = 0
        """The last step that was reported."""
        self._lives: dict[int, _Life] = {}
        self._started = 0
        self.compared = 0

    def run(self, kills: list[Kill]) -> None:
        """Kill as planned, and train on until all have gone on together.

        Raises:
            AssertionError: states differ, a rank raised, a group lost its state, or hangs.
        """
        with _lighthouse() as self._address:
            try:
                for group in range(GROUPS):
                    self._start(group)
                for kill in kills:
                    self._carry_out(kill)
                self._until(lambda life: life.together)
                last = self._newest + MORE_STEPS
                for life in self._lives.values():
                    life.world.happen("last", str(last))
                self._until(lambda life: life.at == [last] * RANKS)
            finally:
                for life in self._lives.values():
                    life.end()

    def _carry_out(self, kill: Kill) -> None:
        if not kill.joining:
            self._until(lambda life: life.together)
        self._listen(kill.after_s)
        life = self._lives.pop(kill.group)
        life.processes[kill.first].kill()
        self._listen(kill.gap_s)
        life.end()
        self._listen(kill.away_s)
        self._start(kill.group)

    def _start(self, group: int) -> None:
        self._started += 1
        folder = self._folder / f"life {self._started}"
        folder.mkdir()
        world = World(folder)
        world.happen("lighthouse", self._address)
        self._lives[group] = _Life(world, self._train, group, self._newest)

    def _until(self, reached: Callable[[_Life], bool]) -> None:
        end = time.monotonic() + HANGS_S
        while not all(map(reached, self._lives.values())):
            self._listen(0.05)
            where = {group: life.at for group, life in self._lives.items()}
            assert time.monotonic() < end, f"in {HANGS_S} s no group went on: {where}"

    def _listen(self, seconds: float) -> None:
        """Take in all reports of the next seconds."""
        end = time.monotonic() + seconds
        lines = {
            line: (life, r) for life in self._lives.values() for r, line in enumerate(life.lines)
        }
        while (left := end - time.monotonic()) > 0:
            for line in wait(list(lines), timeout=left):
                self._take(*lines[line])  # type: ignore[index]

    def _take(self, life: _Life, rank: int) -> None:
        report = life.next(rank)
        known = self._digests.get((report.step, rank))
        assert known in (None, report.digest), f"two states of rank {rank} at step {report.step}"
        self.compared += known is not None
        self._digests[report.step, rank] = report.digest
        self._newest = max(self._newest, report.step)


class _Life:
    """A group from its start to its end.

    Attributes:
        at: the last step of each rank.
    """

    def __init__(self, world: World, train: Train, group: int, newest: int) -> None:
        self.world, self.group, self._newest = world, group, newest
        self.at = [0] * RANKS
        self.together = False
        self._joined: set[int] = set()
        pipes = [_FORK.Pipe(duplex=False) for _ in range(RANKS)]
        self.lines = [mine for mine, _ in pipes]
        self.processes = [
            _FORK.Process(target=_live, args=(world, train, group, rank, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def next(self, rank: int) -> Report:
        """What a rank reports next."""
        try:
            report = self.lines[rank].recv()
        except EOFError:
            self.processes[rank].join()
            report = f"exit code {self.processes[rank].exitcode}"
        assert isinstance(report, Report), f"rank {rank} of {self.group} ended: {report}"
        assert report.step > self._newest, f"rank {rank} begins anew at {report.step}"
        self.at[rank] = report.step
        if report.groups == GROUPS:
            self._joined.add(rank)
        self.together = len(self._joined) == RANKS
        return report

    def end(self) -> None:
        """SIGKILL, if they still live."""
        for process in self.processes:
            process.kill()
            process.join()
        for line in self.lines:
            line.close()


def _live(world: World, train: Train, group: int, rank: int, pipe: Connection) -> None:
    gc.freeze()
    try:
        for report in train(Group(world, f"group_{group}", rank, RANKS)):
            pipe.send(report)
            if world.happened("last") and report.step >= int(world.wait("last")):
                break
    except BaseException:
        pipe.send(traceback.format_exc())
    signal.pause()


@contextmanager
def _lighthouse() -> Iterator[str]:
    mine, theirs = _FORK.Pipe()
    process = _FORK.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield mine.recv()
    finally:
        process.kill()
        process.join()


def _serve(line: Connection) -> None:
    server = LighthouseServer(
        bind=f"{HERE}:0", min_replicas=1, join_timeout_ms=10_000, heartbeat_timeout_ms=2_500
    )
    line.send(server.address())
    signal.pause()
