"""One process of a program: its model, its samples, and what it tells of its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchft.errors import SettingsError
from torchft.experiments.real_node import device_of, to_bytes
from torchft.experiments.spmd.traffic import Traffic, counted
from torchft.simulator.experiment import Experiment
from torchft.simulator.node import finite_losses
from torchft.simulator.program import SPMDProgram, SPMDStrategy
from torchft.simulator.result import averaged_tensors
from torchft.simulator.seeds import kept_rng, seed_node

if TYPE_CHECKING:
    from torchft.experiments.local_node import LocalNode

__all__ = ["SPMDNode", "SPMDProcess", "check_program"]

_SHARED = 1 << 36
"""In the place of a node's number: for draws that are alike at all nodes."""
_ROWS = 100
"""So many steps are told at once."""
_TIMEOUT = timedelta(minutes=5)
"""Of one collective. A process that ends is seen at once; this is for one that is slow, or that
never enters what the others have entered."""


class SPMDNode:
    """One process, as its program sees it."""

    def __init__(
        self, experiment: Experiment, rank: int, tell: Callable[[list[dict[str, Any]]], None]
    ) -> None:
        self.experiment = experiment
        self.rank, self.num_nodes = rank, experiment.num_nodes
        self.device = experiment.torch_device
        self.total_steps = experiment.total_steps
        self.model: nn.Module = experiment.make_model()
        self.traffic = Traffic()
        self._train_node = experiment.make_node(self.model, rank)
        self._feed = experiment.feed()
        self._tell, self._rows = tell, list[dict[str, Any]]()
        self._compute_s = 0.0

    def batch(self, step: int) -> Any:
        """What this node trains on at `step`, where the data are."""
        return self._feed.batch(self.rank, step)

    def backward(self, step: int) -> Tensor:
        """Add the gradients of this node's batch to those of `model`; returns the mean loss."""
        began = perf_counter()
        batch = self.batch(step)
        self.seed(step)
        loss = self._train_node.backward(batch, self.experiment.micro_batch_size)
        self._compute_s += perf_counter() - began
        return loss

    def seed(self, step: int) -> None:
        """Random draws from here on are this node's own at `step`."""
        seed_node(self.experiment.seed, self.rank, step, self.device)

    def seed_alike(self, step: int) -> None:
        """Random draws from here on are the same at all nodes."""
        seed_node(self.experiment.seed, _SHARED, step, self.device)

    def report(self, step: int, loss: Tensor | float | None, lr: float) -> None:
        """Tell of a step that is done, with what was sent in it. `loss` None: nobody knows it.

        Raises:
            NodeError: the loss is not finite.
        """
        number = math.nan
        if loss is not None:
            number = finite_losses({self.rank: torch.as_tensor(loss, device="cpu")}, step)[
                self.rank
            ]
        row: dict[str, Any] = {"step": step, "loss": number, "lr": lr}
        row |= vars(self.traffic.take())
        row["compute_s"], self._compute_s = self._compute_s, 0.0
        self._rows.append(row)
        if len(self._rows) >= _ROWS:
            self.flush()

    def report_validation(self, step: int, local_loss: float, global_loss: float) -> None:
        """Tell how this node's model and the mean of all do on held-out samples, after `step`
        steps."""
        self._rows.append({"step": step, "local_loss": local_loss, "global_loss": global_loss})

    def look_if_due(self, step: int) -> None:
        """Where the run asks for it after `step` steps: the held-out loss of this node's model, and
        of the mean of all. All nodes must ask together."""
        strategy = self.experiment.strategy
        assert isinstance(strategy, SPMDStrategy)
        interval = strategy.val_interval
        if strategy.validator is None or interval is None:
            return
        if step % interval and step != self.total_steps:
            return
        local = strategy.validator.local_loss(self._train_node)
        with self.holding_mean(self.model):
            together = strategy.validator.loss(self._train_node)
        self.report_validation(step, local, together)

    @contextmanager
    def holding_mean(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` holds the mean of all nodes. What that takes is not counted as sent."""
        before = replace(self.traffic)
        tensors = [tensor.detach() for tensor in averaged_tensors(model).values()]
        kept = [tensor.clone() for tensor in tensors]
        for tensor in tensors:
            mean = tensor.double() if tensor.device.type != "mps" else tensor.clone()
            dist.all_reduce(mean)
            tensor.copy_(mean / self.num_nodes)
        self.traffic.nbytes, self.traffic.collectives = before.nbytes, before.collectives
        try:
            yield
        finally:
            for tensor, own in zip(tensors, kept, strict=True):
                tensor.copy_(own)

    def flush(self) -> None:
        """Tell what has been kept back."""
        rows, self._rows = self._rows, []
        self._tell(rows)

    def close(self) -> None:
        """End the processes and threads that load data."""
        self._feed.close()


@dataclass
class SPMDProcess:
    """The target of each process: join the group, run the program, give the model back."""

    experiment: Experiment
    program: SPMDProgram
    rendezvous: Path
    """A file that all processes share."""

    def __call__(self, process: LocalNode) -> dict[str, Any]:
        """Train to the end. What is left: `model`, the bytes of its state."""
        device = device_of(self.experiment, process.number)
        experiment = replace(self.experiment, device=device)
        self._join(process.number, device)
        with kept_rng(device):
            node = SPMDNode(experiment, process.number, process.report)
            with counted(node.traffic):
                self.program.spmd_main(node)
            node.flush()
            node.close()
        dist.barrier()  # nobody leaves while another still waits for its part
        dist.destroy_process_group()
        return {"model": to_bytes(node.model.state_dict())}

    def _join(self, rank: int, device: torch.device) -> None:
        if dist.is_initialized():
            raise SettingsError(
                "this process has a default process group already, which the program's own would "
                "replace: start the run from a process without one"
            )
        size = self.experiment.num_nodes
        own = device.type == "cuda" and torch.cuda.device_count() >= size
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if own else "gloo",
            store=dist.FileStore(str(self.rendezvous), size),
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
        )


def check_program(experiment: Experiment) -> None:
    """Refuse what only the rounds of recipes have.

    Raises:
        SettingsError: the experiment asks for events, `deterministic` or `digests`.
    """
    asked = {
        "events": bool(experiment.all_events()),
        "deterministic": experiment.deterministic,
        "digests": experiment.digests,
    }
    for name in (name for name, given in asked.items() if given):
        raise SettingsError(
            f"{name} is for strategies made of recipes: leave it out with one that calls "
            "torch.distributed itself"
        )
