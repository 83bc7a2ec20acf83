"""The training script of the demo: one rank of one replica group, started by torchrun.

How a run ends. Every group must end with the same step, though some may be down or behind just
then. So a group ends when it has committed a step, the last wanted one or a later one, in which
*all* groups took part: they all read that from the same quorum. A group that missed that very step
heals from the others in the settling round after it, and what it heals includes `finished`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from torchft import Manager, Optimizer, ProcessGroupGloo
from torchft.ddp import DistributedDataParallel
from torchft.demo.final_report import FinalReport
from torchft.demo.train_options import TrainOptions
from torchft.digest import digest
from torchft.launch.starting import wait_for_start
from torchft.ledger import Bucket
from torchft.local_sgd import DiLoCo, LocalSGD
from torchft.script.ranks import average_inside, meet_inside
from torchft.toy.byte_model import ByteTransformer, next_byte_loss
from torchft.toy.corpus import ByteCorpus, Order

__all__ = ["main"]

ROWS = 8
"""Windows in a batch."""

NICE = 3
"""How much a training worker steps back for one that starts, on a machine with few cores."""

HELD_OUT_ROWS = 64
"""Windows that the last loss is measured on."""


class Trainee:
    """A model, its data and its manager: what the loops below have in common."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.rank, self.ranks = meet_inside(timedelta(seconds=options.timeout_s))
        torch.manual_seed(options.seed)
        self.model = ByteTransformer()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)
        self.corpus = ByteCorpus.load(options.corpus)
        self.context = self.model.shape.context
        self.order = Order(
            windows=self.corpus.windows(self.context),
            shards=options.groups * self.ranks,
            rows=ROWS,
            seed=options.seed,
        )
        self.batches = 0
        self.finished = False

    @cached_property
    def manager(self) -> Manager:
        """Made on first use: from then on the others may wait for this group."""
        options = self.options
        manager = Manager(
            pg=ProcessGroupGloo(timeout=timedelta(seconds=options.timeout_s)),
            load_state_dict=self._load_end,
            state_dict=self._end_state,
            min_replica_size=options.min_groups,
            use_async_quorum=options.strategy in ("ddp", "streaming"),
            timeout=timedelta(seconds=options.timeout_s),
            quorum_timeout=timedelta(seconds=options.quorum_timeout_s),
            replica_id=f"group_{options.group}",
            hostname="127.0.0.1",
        )
        manager.register_state_dict_fn(
            "inner_optimizer", self.optimizer.load_state_dict, self.optimizer.state_dict
        )
        return manager

    def begin(self) -> None:
        """Start together with the other groups, or with those that train when it comes back."""
        options = self.options
        with self.manager.ledger.spending(Bucket.QUORUM):
            wait_for_start(
                options.folder,
                group=options.group,
                rank=self.rank,
                timeout_s=options.quorum_timeout_s,
            )
        step_back()

    def _end_state(self) -> dict[str, Any]:
        return {"finished": self.finished}

    def _load_end(self, state: dict[str, Any]) -> None:
        self.finished = state["finished"]

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next one of this rank's shard."""
        with self.manager.ledger.spending(Bucket.DATA):
            shard = self.options.group * self.ranks + self.rank
            starts = self.order.batch(self.batches, shard=shard)
            self.batches += 1
            return self.corpus.batch(starts, context=self.context)

    def compute(self, model: torch.nn.Module) -> None:
        """Forward and backward on the next batch: the gradients are there afterwards."""
        inputs, targets = self.batch()
        with self.manager.ledger.spending(Bucket.COMPUTE):
            loss = next_byte_loss(model, inputs, targets)
            loss.backward()
            self.manager.note(loss=loss.item(), pid=os.getpid())
        with self.manager.ledger.spending(Bucket.COMMUNICATE):
            average_inside(self.model.parameters())

    def look_at_the_end(self) -> None:
        """Call after a committed step: was it one that all groups can end with?"""
        late = self.manager.current_step() >= self.options.steps
        self.finished |= late and self.manager.num_participants() >= self.options.groups

    def tell(self, state: dict[str, Any]) -> None:
        """Settle, then write the last word of this rank. `state` is what all must hold alike."""
        self.manager.settle()
        ledger = self.manager.ledger
        with ledger.spending(Bucket.SETTLE):
            value = digest(state)
            loss = self._held_out_loss()
            FinalReport(
                group=self.options.group,
                group_rank=self.rank,
                pid=os.getpid(),
                step=self.manager.current_step(),
                digest=value,
                held_out_loss=loss,
                t_monotonic=time.monotonic(),
                ledger=ledger.snapshot(),
            ).write(self.options.folder)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        inputs, targets = self.corpus.held_out_batch(HELD_OUT_ROWS, context=self.context)
        return next_byte_loss(self.model, inputs, targets).item()


def step_back() -> None:
    """On a machine with few cores, a group that starts needs them more than one that trains."""
    # On Linux for this thread and those it starts from here on: heartbeats keep their priority.
    os.nice(NICE)
    # Between sessions, as torchrun gives each worker, the kernel compares those, if it groups them.
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as autogroup:
        autogroup.write(str(NICE))


def train_ddp(trainee: Trainee) -> dict[str, Any]:
    """Train with gradients that are averaged in every step."""
    manager = trainee.manager
    manager.register_state_dict_fn("model", trainee.model.load_state_dict, trainee.model.state_dict)
    model = DistributedDataParallel(
        manager, trainee.model, should_quantize=trainee.options.should_quantize
    )
    optimizer = Optimizer(manager, trainee.optimizer)
    while not trainee.finished:
        with manager.ledger.spending(Bucket.OPTIMIZER):
            optimizer.zero_grad()
        trainee.compute(model)
        with manager.ledger.spending(Bucket.OPTIMIZER):
            committed = optimizer.step()
        if committed:
            trainee.look_at_the_end()
    return {"model": trainee.model.state_dict(), "optimizer": trainee.optimizer.state_dict()}


def train_local_sgd(trainee: Trainee) -> dict[str, Any]:
    """Train with weights that are averaged every few steps."""
    manager, options = trainee.manager, trainee.options
    with LocalSGD(
        manager,
        trainee.model,
        trainee.optimizer,
        sync_every=options.sync_every,
        should_quantize=options.should_quantize,
    ):
        _train_alone(trainee)
    return {"model": trainee.model.state_dict()}


def train_diloco(trainee: Trainee) -> dict[str, Any]:
    """An outer optimizer applied every few steps to the mean of what the groups moved."""
    manager, options = trainee.manager, trainee.options
    outer = torch.optim.SGD(trainee.model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    with DiLoCo(
        manager,
        [trainee.model],
        trainee.optimizer,
        outer,
        sync_every=options.sync_every,
        should_quantize=options.should_quantize,
        error_feedback=options.codec != "none",
    ):
        _train_alone(trainee)
    return {"model": trainee.model.state_dict(), "outer": outer.state_dict()}


def train_streaming(trainee: Trainee) -> dict[str, Any]:
    """DiLoCo in fragments, whose averages travel while the others train: there is always one in
    flight, and two for half of the time."""
    manager, options = trainee.manager, trainee.options
    fragments, slot = 4, options.sync_every
    outer = torch.optim.SGD(trainee.model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    diloco = DiLoCo(
        manager,
        [trainee.model],
        trainee.optimizer,
        outer,
        sync_every=slot * fragments,
        should_quantize=options.should_quantize,
        error_feedback=options.codec != "none",
        fragments=fragments,
        fragment_sync_delay=slot + slot // 2,
        fragment_update_alpha=0.5,
    )
    with diloco:
        _train_alone(trainee)
    # Each group's own weights are a mixture of these and what it has trained since.
    return diloco.shared_state_dict()


def _train_alone(trainee: Trainee) -> None:
    """Inner steps; a hook on the optimizer synchronises when it is time."""
    manager, optimizer = trainee.manager, trainee.optimizer
    while not trainee.finished:
        before = manager.batches_committed()
        with manager.ledger.spending(Bucket.OPTIMIZER):
            optimizer.zero_grad()
        trainee.compute(trainee.model)
        with manager.ledger.spending(Bucket.OPTIMIZER):
            optimizer.step()
        if manager.batches_committed() != before:
            trainee.look_at_the_end()


LOOPS: dict[str, Callable[[Trainee], dict[str, Any]]] = {
    "ddp": train_ddp,
    "diloco": train_diloco,
    "local_sgd": train_local_sgd,
    "streaming": train_streaming,
}
"""Each trains until the end and returns the state that all groups must hold alike."""


def main(arguments: list[str]) -> None:
    """Train as one rank of one group, as torchrun starts it."""
    # SystemExit, so that `finally` runs: the manager leaves its quorum and frees its port.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    torch.set_num_threads(1)
    trainee = Trainee(TrainOptions.from_arguments(arguments))
    try:
        trainee.begin()
        trainee.tell(LOOPS[trainee.options.strategy](trainee))
    finally:
        trainee.manager.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
