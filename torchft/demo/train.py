"""The training script of the demo: one rank of one replica group, started by torchrun.

All groups end with the same step: see `torchft.script.FinishBarrier`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft import Manager, ProcessGroupGloo, Replicated
from torchft.demo.final_report import FinalReport
from torchft.demo.options import DemoOptions
from torchft.digest import digest
from torchft.launch.starting import wait_for_start
from torchft.ledger import Bucket
from torchft.script import FinishBarrier, JobRank, average_inside
from torchft.strategies import (
    DiLoCoStrategy,
    LocalSGDStrategy,
    OptimSpec,
    SimpleReduceStrategy,
    Strategy,
    StreamingDiLoCoStrategy,
)
from torchft.toy.byte_model import ByteTransformer, held_out_loss, next_byte_loss
from torchft.toy.corpus import ByteCorpus, Order

__all__ = ["main"]

ROWS = 8
"""Windows in a batch."""

NICE = 3
"""How much a training worker steps back for one that starts, on a machine with few cores."""

TIMEOUT = timedelta(seconds=20)
"""Of a collective, a vote, a transfer of state."""

QUORUM_TIMEOUT = timedelta(seconds=60)

INNER = OptimSpec(torch.optim.AdamW, lr=2e-3)
OUTER = OptimSpec(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
FRAGMENTS = 4
"""Of the streaming strategy."""


class Trainee:
    """A model, its data and its manager."""

    def __init__(self, options: DemoOptions, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.job = JobRank.join(TIMEOUT)
        torch.manual_seed(options.seed)
        self.model = ByteTransformer()
        self.optimizer = INNER.build(self.model)
        self.corpus = ByteCorpus.load(options.corpus)
        self.context = self.model.shape.context
        self.order = Order(
            windows=self.corpus.windows(self.context),
            shards=self.job.shards,
            rows=ROWS,
            seed=options.seed,
        )
        self.batches = 0
        # By then the launcher has given up the run: no group ends without the others.
        self.barrier = FinishBarrier(
            steps=options.target, groups=self.job.groups, patience_s=options.timeout_s
        )

    @cached_property
    def manager(self) -> Manager:
        """Made on first use: from then on the others may wait for this group."""
        return Manager(
            pg=ProcessGroupGloo(timeout=TIMEOUT),
            load_state_dict=self.barrier.load_state_dict,
            state_dict=self.barrier.state_dict,
            min_replica_size=self.options.min_groups,
            use_async_quorum=self.options.strategy in ("ddp", "streaming"),
            timeout=TIMEOUT,
            quorum_timeout=QUORUM_TIMEOUT,
            replica_id=f"group_{self.job.group}",
            hostname="127.0.0.1",
        )

    def begin(self) -> None:
        """Start together with the other groups, or with those that train when it comes back."""
        with self.manager.ledger.spending(Bucket.QUORUM):
            wait_for_start(
                self.folder,
                group=self.job.group,
                rank=self.job.rank,
                timeout_s=QUORUM_TIMEOUT.total_seconds(),
            )
        step_back()

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next one of this rank's shard."""
        with self.manager.ledger.spending(Bucket.DATA):
            starts = self.order.batch(self.batches, shard=self.job.shard)
            self.batches += 1
            return self.corpus.batch(starts, context=self.context)

    def compute(self) -> None:
        """Forward and backward on the next batch: the gradients are there afterwards."""
        inputs, targets = self.batch()
        with self.manager.ledger.spending(Bucket.COMPUTE):
            loss = next_byte_loss(self.model, inputs, targets)
            loss.backward()
            self.manager.note(loss=loss.item(), pid=os.getpid())
        with self.manager.ledger.spending(Bucket.COMMUNICATE):
            average_inside(self.model.parameters())

    def look_at_the_end(self) -> None:
        """Call after a committed step: was it one that all groups can end with?"""
        manager = self.manager
        with manager.ledger.spending(Bucket.COMMUNICATE):  # the ranks of the group agree
            for line in self.barrier.committed(manager.current_step(), manager.num_participants()):
                print(line, flush=True)

    def tell(self, state: dict[str, Any]) -> None:
        """Write the report of this rank. `state` is what all groups must hold alike."""
        ledger = self.manager.ledger
        with ledger.spending(Bucket.SETTLE):
            FinalReport(
                group=self.job.group,
                group_rank=self.job.rank,
                pid=os.getpid(),
                step=self.manager.current_step(),
                digest=digest(state),
                held_out_loss=held_out_loss(self.model, self.corpus),
                t_monotonic=time.monotonic(),
                ledger=ledger.snapshot(),
            ).write(self.folder)


def step_back() -> None:
    """On a machine with few cores, a group that starts needs them more than one that trains."""
    # On Linux for this thread and those it starts from here on: heartbeats keep their priority.
    os.nice(NICE)
    # Between sessions, as torchrun gives each worker, the kernel compares those, if it groups them.
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as autogroup:
        autogroup.write(str(NICE))


def strategy_of(options: DemoOptions) -> Strategy:
    """Return what the groups exchange, and when."""
    every, codec = options.sync_every, options.codec
    match options.strategy:
        case "ddp":
            return SimpleReduceStrategy(INNER, codec=codec)
        case "local_sgd":
            return LocalSGDStrategy(INNER, H=every, codec=codec)
        case "diloco":
            return DiLoCoStrategy(INNER, OUTER, H=every, codec=codec, error_feedback=bool(codec))
        case _:  # always one fragment in flight, and two for half of the time
            return StreamingDiLoCoStrategy(
                INNER,
                OUTER,
                H=every * FRAGMENTS,
                fragments=FRAGMENTS,
                delay=every + every // 2,
                mix=0.5,
                codec=codec,
                error_feedback=bool(codec),
            )


def train(trainee: Trainee) -> dict[str, Any]:
    """Train until the end; return the state that all groups must hold alike."""
    manager, options = trainee.manager, trainee.options
    replicated = Replicated(manager, trainee.model, trainee.optimizer, strategy_of(options))
    while not trainee.barrier.reached:
        before = manager.batches_committed()
        with manager.ledger.spending(Bucket.OPTIMIZER):
            replicated.zero_grad()
        trainee.compute()
        with manager.ledger.spending(Bucket.OPTIMIZER):
            replicated.step()
        if manager.batches_committed() != before:
            trainee.look_at_the_end()
    replicated.finish()
    # Between rounds, the weights and the inner optimizer of a group are its own.
    if options.strategy == "ddp":
        return {"model": trainee.model.state_dict(), "optimizer": trainee.optimizer.state_dict()}
    return replicated.shared_state_dict()


def main(arguments: list[str]) -> None:
    """Train as one rank of one group, as torchrun starts it.

    Args:
        arguments: the folder of the run, and the options as JSON.
    """
    folder, options = arguments
    # SystemExit, so that `finally` runs: the manager leaves its quorum and frees its port.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    torch.set_num_threads(1)
    trainee = Trainee(DemoOptions.from_json(options), Path(folder))
    try:
        trainee.begin()
        trainee.tell(train(trainee))
    finally:
        trainee.manager.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
