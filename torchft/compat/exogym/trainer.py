"""`exogym.trainer`: the simulator's Trainer with the leniency that EXO Gym's scripts count on."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchft import experiments, strategies
from torchft.experiments.devices import usable_device, usable_devices
from torchft.simulator.node import TrainNode
from torchft.simulator.program import SPMDProgram

__all__ = ["LocalTrainer", "Trainer"]


class Trainer(experiments.Trainer):
    """As `torchft.experiments.Trainer`, but

    - a strategy that calls collectives itself, and nodes that have several CUDA devices, run as
      real processes without being asked to;
    - `device=""` is the best one there is, and devices that are not there are left out, once said;
    - a `run_name` whose logs are there already gets a number behind it, once said;
    - `fit(kwargs=…)`, which EXO Gym never reads, is left out, once said.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        train_dataset: Any,
        val_dataset: Any = None,
        start_port: int | None = None,
        device: torch.device | str | None = None,
        devices: Sequence[int] | None = None,
        *,
        node_cls: type[TrainNode] = TrainNode,
    ) -> None:
        super().__init__(
            model,
            train_dataset,
            val_dataset,
            start_port,
            usable_device(device),
            usable_devices(devices),
            node_cls=node_cls,
        )

    def fit(
        self,
        num_epochs: int | None = None,
        strategy: strategies.Strategy | SPMDProgram | None = None,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        processes: bool | None = None,
        device: torch.device | str | None = None,
        run_name: str | None = None,
        log_dir: str | Path = "logs",
        **settings: Any,
    ) -> nn.Module:
        """As `torchft.experiments.Trainer.fit`; see the class for what differs.

        `processes` None: real processes where the strategy needs them.
        """
        if kwargs is not None:
            warnings.warn(
                f"fit(kwargs={dict(kwargs)!r}) is left out: EXO Gym does not read it either",
                UserWarning,
                stacklevel=2,
            )
        if not settings.get("resume"):
            run_name = _free_name(run_name, Path(log_dir))
        return super().fit(
            num_epochs,
            strategy,
            *args,
            processes=self._needs(strategy) if processes is None else processes,
            device=usable_device(device),
            run_name=run_name,
            log_dir=log_dir,
            **settings,
        )

    def _needs(self, strategy: object) -> bool:
        """Whether nodes have to be processes."""
        return isinstance(strategy, SPMDProgram) or len(self.devices or ()) > 1


LocalTrainer = Trainer
"""What it was called in older releases."""


def _free_name(name: str | None, logs: Path) -> str | None:
    """`name`, or the first of `name_2`, `name_3`, … that holds no logs of an earlier run."""
    if not isinstance(name, str) or not _holds_files(logs / name):
        return name
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    free = next(one for one in numbered if not _holds_files(logs / one))
    warnings.warn(
        f"{logs / name} holds the logs of an earlier run, so this one is called {free}",
        UserWarning,
        stacklevel=3,
    )
    return free


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
