"""How many samples go through the model at once, when nobody has said so: what memory allows.

Starting from the batch, the number is halved until a pass fits.

- On a CPU nothing is tried out. What a forward pass keeps for the backward pass is counted on two
  samples, and grows with their number; half of the memory that is free may be used.
- On a GPU a forward and backward pass is tried on a copy of the model, beside the memory that all
  nodes' weights will take; nine tenths of what is free may be used.

Only one node computes at a time, so its pass is what must fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import SettingsError
from torchft.simulator.experiment import Experiment
from torchft.simulator.node import TrainNode, micro_batches
from torchft.simulator.seeds import kept_rng, seed_node

__all__ = ["fitting_size", "free_memory", "largest_that_fits", "saved_bytes"]

_CPU_SHARE = 0.5
_GPU_SHARE = 0.9
_PROBE = 2
"""Samples of the probe: one would be too few for a BatchNorm."""
_COPIES = 4
"""Weights, gradients and two moments, for each node."""


def fitting_size(experiment: Experiment) -> int:
    """The largest of batch, batch / 2, … that fits; at least 1. Nothing of the run changes."""
    device = experiment.torch_device
    batch_size = experiment.batch_size
    if device.type == "mps" or batch_size == 1:
        return batch_size  # MPS pages into the host's memory and does not say what is free
    with kept_rng(device):
        batch = _without_workers(experiment).feed().batch(0, 0)
        if not _can_be_cut(batch, batch_size):
            return batch_size
        node = experiment.make_node(experiment.make_model().train(), 0)
        seed_node(experiment.seed, 0, 0, device)
        if device.type == "cuda":
            return largest_that_fits(batch_size, _cuda_probe(node, batch, experiment.num_nodes))
        return largest_that_fits(batch_size, _cpu_probe(node, batch, batch_size))


def _without_workers(experiment: Experiment) -> Experiment:
    """The same data, without starting the processes that load it."""
    options = dict(experiment.dataloader_kwargs or {})
    if not options.keys() - {"collate_fn"}:
        return experiment
    collate = {k: v for k, v in options.items() if k == "collate_fn"}
    return replace(experiment, dataloader_kwargs=collate)


def largest_that_fits(batch_size: int, fits: Callable[[int], bool]) -> int:
    """Halve, rounding up, until it fits or is 1."""
    size = batch_size
    while size > 1 and not fits(size):
        size = (size + 1) // 2
    return size


def _can_be_cut(batch: Any, batch_size: int) -> bool:
    try:
        return next(micro_batches(batch, 1, batch_size)) is not None
    except SettingsError:
        return False


def _first(node: TrainNode, batch: Any, size: int) -> Any:
    return next(micro_batches(batch, size, node.batch_size))[0]


def _cpu_probe(node: TrainNode, batch: Any, batch_size: int) -> Callable[[int], bool]:
    free = free_memory()
    samples = min(_PROBE, batch_size)
    each = _bytes_of_a_sample(node, batch, samples)
    if free is None or each is None:
        return lambda size: True
    return lambda size: each * size <= free * _CPU_SHARE


def _bytes_of_a_sample(node: TrainNode, batch: Any, samples: int) -> float | None:
    try:
        return saved_bytes(node, _first(node, batch, samples)) / samples
    except SettingsError:
        raise
    except Exception:
        # It takes whole batches only. If it is at fault otherwise, the first step will say so.
        return None


def saved_bytes(node: TrainNode, batch: Any) -> int:
    """What a forward pass keeps for the backward pass, apart from the model and the batch."""
    there = [*_tensors(node.model), *_tensors_of(batch)]
    kept = {t.untyped_storage().data_ptr() for t in there}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = node.evaluate(batch)
    total = sum(seen.values())
    del loss
    return total


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _tensors_of(batch: Any) -> list[Tensor]:
    """The tensors in a batch of tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return [tensor for item in batch for tensor in _tensors_of(item)]
    return []


def free_memory() -> int | None:
    """Bytes that this process may still take, by machine and container; None: unknown."""
    limits = [_machine_free(), _container_free()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _machine_free(path: Path = Path("/proc/meminfo")) -> int | None:
    if not path.exists():
        return None
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _container_free(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    limit, used = folder / "memory.max", folder / "memory.current"
    if not limit.exists() or not used.exists():
        return None
    allowed = limit.read_text().strip()
    return None if allowed == "max" else max(0, int(allowed) - int(used.read_text()))


def _cuda_probe(node: TrainNode, batch: Any, num_nodes: int) -> Callable[[int], bool]:
    free, _ = torch.cuda.mem_get_info(node.device)
    stacked = _COPIES * num_nodes * sum(t.nbytes for t in _tensors(node.model))
    budget = free * _GPU_SHARE - stacked

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(node.device)
        before = torch.cuda.memory_allocated(node.device)
        try:
            node.backward(_first(node, batch, size))
            peak = torch.cuda.max_memory_allocated(node.device) - before
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            node.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return peak <= budget

    return fits
