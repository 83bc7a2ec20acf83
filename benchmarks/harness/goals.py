"""What the figures are held to. A goal that is missed is shown and never makes a run fail: wall
times depend on the machine and on who else uses it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from harness.figures import Figure

__all__ = ["GOALS", "Goal", "Verdict", "judge"]


class Verdict(enum.Enum):
    """A figure beside its goal."""

    MET = "met"
    MISSED = "missed"
    NONE = ""
    """There is no goal for it."""


@dataclass(frozen=True)
class Goal:
    """A bound, of the ratio to the floor when `ratio`, else of the figure in its own unit."""

    bound: float
    ratio: bool = True
    least: bool = False
    """The bound is the least there may be, as of a speed; else the most."""

    def met_by(self, figure: Figure) -> bool:
        """Whether `figure` keeps to it."""
        reached = figure.ratio if self.ratio else figure.value
        if reached is None:
            return False
        return reached >= self.bound if self.least else reached <= self.bound


GOALS = {
    # startup
    "startup.import": Goal(1.15),
    "startup.heavy_modules": Goal(0, ratio=False),
    "startup.lighthouse_cpu": Goal(0.15, ratio=False),  # seconds
    "startup.lighthouse_memory": Goal(40, ratio=False),  # MiB
    # quorum_latency
    "quorum.lighthouse_cpu.512": Goal(70, ratio=False),  # milliseconds
    # commit_latency
    "commit.step": Goal(3),
    "commit.heartbeat": Goal(0.2, ratio=False),  # milliseconds
    # allreduce_overhead
    "allreduce.4096": Goal(1.3),
    "allreduce.1048576": Goal(1.15),
    "allreduce.67108864": Goal(1.03),
    # guards: of the least that they could add; per cent of a step of 100 ms
    "guards.nan": Goal(1.2),
    "guards.nan.share": Goal(1, ratio=False),
    "guards.fp32": Goal(4),
    "guards.fp32.share": Goal(1, ratio=False),
    "guards.following": Goal(2),
    "guards.following.share": Goal(1, ratio=False),
    "guards.hooks.share": Goal(1, ratio=False),
    "guards.rounds": Goal(2),
    "guards.rounds.share": Goal(1, ratio=False),
    # diloco_overhead
    "diloco.1": Goal(1.25),
    "diloco.1.memory": Goal(3.2),
    "diloco.4": Goal(1.25),
    "diloco.4.memory": Goal(2.5),
    # links, at 100 Mbit/s where the delay is longer than a transfer: per cent
    "links.blocked.100.100.1.fp32": Goal(5, ratio=False),
    "links.blocked.100.100.1.int8": Goal(5, ratio=False),
    "links.false_deaths": Goal(0, ratio=False),
    # recovery_time
    "recovery.next_commit": Goal(1.1),
    "recovery.digests_that_differ": Goal(0, ratio=False),
    # simulator
    "simulator.mlp.diloco": Goal(1.2, least=True),
    "simulator.mlp.fedavg": Goal(1.2, least=True),
    "simulator.mlp.all_reduce": Goal(1.1, least=True),
    "simulator.mlp.sparta": Goal(1.0, least=True),
    "simulator.mlp.demo": Goal(0.25, least=True),
    "simulator.gpt.diloco": Goal(0.9, least=True),
    "simulator.flat": Goal(1.1),
    # nats: a tenth, twice the spread of seeds, over one seed of a reference of a few lines
    "simulator.learning.diloco.2": Goal(0.434 * 1.1, ratio=False),
    "simulator.learning.diloco.4": Goal(0.395 * 1.1, ratio=False),
    "simulator.learning.fedavg.2": Goal(0.532 * 1.1, ratio=False),
    "simulator.learning.fedavg.4": Goal(0.477 * 1.1, ratio=False),
    # simulator_starts
    "simulator.start": Goal(1.1),
    "simulator.cold": Goal(10.3, ratio=False),  # seconds
    "simulator.warm": Goal(1.7, ratio=False),  # seconds
    "simulator.memory.mlp": Goal(2560, ratio=False),  # MiB
    "simulator.memory.gpt": Goal(4096, ratio=False),  # MiB
    # learning: per cent above the loss of DiLoCo in fp32
    "learning.gap.streaming.int8.diloco": Goal(1, ratio=False),
    # server
    "server.sync.fp32": Goal(2),
    "server.bytes.int8": Goal(2.1, ratio=False),  # a parameter, up and down
    "server.bytes.int4": Goal(1.2, ratio=False),
    **{f"server.memory.{codec}": Goal(20, ratio=False) for codec in ("fp32", "int8", "int4")},
    **{
        f"server.worker_memory.{codec}": Goal(12, ratio=False) for codec in ("fp32", "int8", "int4")
    },
    # server_faults
    "server_faults.kill": Goal(1),
    "server_faults.stuck": Goal(0, ratio=False),
    # server_learning: per cent above the loss of synchronous rounds
    **{
        f"server_learning.gap.{task}.{mode}.{speeds}": Goal(2, ratio=False)
        for task in ("toy", "bytes")
        for mode in ("decoupled", "asynchronous")
        for speeds in ("equal", "1:4")
    },
    # codecs: GB/s of fp32, on one core
    **{
        f"codecs.{codec}.{act}": Goal(1, ratio=False, least=True)
        for codec in ("bf16", "fp8", "int8", "int4")
        for act in ("encode", "decode", "decode_and_add")
    },
    **{f"codecs.{codec}.size": Goal(0.27, ratio=False) for codec in ("fp8", "int8")},
    "codecs.int4.size": Goal(0.15, ratio=False),
}
"""By `Figure.key`."""


def judge(figure: Figure) -> Verdict:
    """Whether a figure keeps to its goal."""
    goal = GOALS.get(figure.key)
    if goal is None:
        return Verdict.NONE
    return Verdict.MET if goal.met_by(figure) else Verdict.MISSED
