"""Fault-tolerant, communication-efficient replica-group training for PyTorch.

Names and submodules load when they are first used, so `import torchft` is light: the lighthouse
command never imports torch, and what needs the compiled extension asks for it only then.

`__version__` is the version of this package; `UPSTREAM_API` is the version of PyTorch's torchft
whose Python interface and wire protocol it provides.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from torchft.version import UPSTREAM_API, __version__

if TYPE_CHECKING:
    from torchft.data import DistributedSampler
    from torchft.ddp import DistributedDataParallel
    from torchft.manager import Manager
    from torchft.optim import OptimizerWrapper as Optimizer
    from torchft.process_group import (
        ProcessGroupBabyGloo,
        ProcessGroupBabyNCCL,
        ProcessGroupBabyXCCL,
        ProcessGroupGloo,
        ProcessGroupNCCL,
        ProcessGroupXCCL,
    )
    from torchft.replicated import Replicated

__all__ = [
    "UPSTREAM_API",
    "DistributedDataParallel",
    "DistributedSampler",
    "Manager",
    "Optimizer",
    "ProcessGroupBabyGloo",
    "ProcessGroupBabyNCCL",
    "ProcessGroupBabyXCCL",
    "ProcessGroupGloo",
    "ProcessGroupNCCL",
    "ProcessGroupXCCL",
    "Replicated",
    "__version__",
]

_HOMES = {
    "DistributedDataParallel": ("torchft.ddp", "DistributedDataParallel"),
    "DistributedSampler": ("torchft.data", "DistributedSampler"),
    "Manager": ("torchft.manager", "Manager"),
    "Optimizer": ("torchft.optim", "OptimizerWrapper"),
    "ProcessGroupBabyGloo": ("torchft.process_group", "ProcessGroupBabyGloo"),
    "ProcessGroupBabyNCCL": ("torchft.process_group", "ProcessGroupBabyNCCL"),
    "ProcessGroupBabyXCCL": ("torchft.process_group", "ProcessGroupBabyXCCL"),
    "ProcessGroupGloo": ("torchft.process_group", "ProcessGroupGloo"),
    "ProcessGroupNCCL": ("torchft.process_group", "ProcessGroupNCCL"),
    "ProcessGroupXCCL": ("torchft.process_group", "ProcessGroupXCCL"),
    "Replicated": ("torchft.replicated", "Replicated"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, attribute = _HOMES[name]
        value = getattr(importlib.import_module(module), attribute)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"torchft.{name}") is not None:
        return importlib.import_module(f"torchft.{name}")
    raise AttributeError(f"module 'torchft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
