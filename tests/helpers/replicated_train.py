"""A script for torchrun: one group trains by a strategy, and one of them is killed and comes back.

    torchrun … replicated_train.py STRATEGY FOLDER GROUP      prints "digest …" in the end

In group 1 the worker kills itself after step KILLED of its first life; torchrun starts another.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import Tiny, backward, digest
from torch import Tensor

from torchft import Manager, ProcessGroupGloo, Replicated
from torchft.strategies import (
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    LocalSGDStrategy,
    OptimSpec,
    Recipe,
    SimpleReduceStrategy,
    SPARTAStrategy,
    Strategy,
    StreamingDiLoCoStrategy,
    TopKStrategy,
)

ADAMW = OptimSpec(torch.optim.AdamW, lr=1e-2)
STEPS, KILLED = 24, 7


class Halfway(Recipe):
    """A user's own recipe: every second step half of the way to the mean, in the end all of it."""

    sync_every = 2

    def contribution(self, fragment: Any) -> Any:
        return self.local.weights(fragment), None

    def apply_locally(self, fragment: Any, update: Any, draft: Any) -> None:
        share = 1.0 if self.clock.steps == STEPS else 0.5
        mine = self.local.weights(fragment)
        mixed = [m.lerp(n, share) for m, n in zip(mine, update, strict=True)]
        self.local.set_weights(fragment, mixed)


def some_then_all(numel: int, turn: int, seed: int) -> Tensor:
    """A third of the weights in each round, and all in the last one."""
    return torch.arange(numel) if 2 * (turn + 1) == STEPS else torch.arange(turn % 3, numel, 3)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "all-reduce": lambda: SimpleReduceStrategy(ADAMW),
    "FedAvg": lambda: FedAvgStrategy(ADAMW, H=3),
    "LocalSGD": lambda: LocalSGDStrategy(ADAMW, H=3),
    "DiLoCo": lambda: DiLoCoStrategy(ADAMW, H=4, codec="int8", error_feedback=True),
    "Streaming DiLoCo": lambda: StreamingDiLoCoStrategy(ADAMW, H=6, fragments=2, delay=2, mix=0.5),
    "SPARTA": lambda: SPARTAStrategy(ADAMW, index_selector=some_then_all, sparta_interval=2),
    "DeMo": lambda: DeMoStrategy(compression_topk=4, compression_chunk=16),
    "top-k": lambda: TopKStrategy(ADAMW, H=3, topk=4, chunk=16),
    "a recipe of one's own": lambda: Strategy([Halfway()], inner=ADAMW),
}


def train(
    name: str, manager: Manager, group: int, at_step: Callable[[int], None]
) -> tuple[int, str]:
    """Train to the end; the step, and the digest of what all groups must hold alike."""
    model = Tiny(group)
    replicated = Replicated(manager, model, None, STRATEGIES[name]())
    replicated.join()
    while replicated.step_count < STEPS:
        at_step(replicated.step_count)
        replicated.zero_grad()
        backward(model, group, replicated.step_count + 1)
        replicated.step()
    replicated.finish()
    shared = replicated.shared_state_dict()
    equal = () if name == "Streaming DiLoCo" else [p for p in model.parameters() if p.requires_grad]
    return replicated.step_count, digest([shared, list(equal)])


def main(name: str, folder: Path, group: int) -> None:
    first_life = not (folder / "killed").exists()

    def at_step(step: int) -> None:
        if group == 1 and step >= KILLED and first_life:
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    soon = timedelta(seconds=60)
    manager = Manager(
        ProcessGroupGloo(timeout=soon),
        None,
        None,
        min_replica_size=1,
        timeout=soon,
        quorum_timeout=soon,
        replica_id=f"group_{group}",
        hostname="127.0.0.1",
    )
    print("digest", *train(name, manager, group, at_step), flush=True)
    manager.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
