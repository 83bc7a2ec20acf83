"""What a program of N processes is to an `Experiment`: a strategy that only processes can run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

from torchft.errors import SettingsError
from torchft.peers import Peers
from torchft.strategies.inner import Inner
from torchft.strategies.local import Local
from torchft.strategies.strategy import Strategy

if TYPE_CHECKING:
    from torchft.experiments.spmd.node import SPMDNode
    from torchft.experiments.validation import Validator

__all__ = ["SPMDProgram", "SPMDStrategy", "as_strategy", "needs_processes"]


class SPMDProgram(ABC):
    """What each process of a run does from its first step to its last. It pickles."""

    @abstractmethod
    def spmd_main(self, node: SPMDNode) -> None:
        """Train `node.model` for `node.total_steps` steps, and report each.

        All processes must enter the same collectives in the same order; one that does not leaves
        the others waiting until the timeout, which ends the run.
        """

    def spmd_settings(self) -> dict[str, Any]:
        """What logs say of it, as plain data."""
        return {}


class SPMDStrategy(Strategy):
    """A program in the place of a strategy. It has no recipes, and its own optimizer."""

    def __init__(self, program: SPMDProgram) -> None:
        super().__init__([], inner=Inner())
        self.program = program
        self.validator: Validator | None = None
        """For programs that look at held-out samples between steps: see `SPMDNode.look_if_due`."""
        self.val_interval: int | None = None

    def config(self) -> dict[str, Any]:
        """The settings of the program as plain data."""
        return {"strategy": type(self.program).__name__, **self.program.spmd_settings()}

    def bind(
        self,
        local: Local,
        peers: Peers,
        *,
        applying: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> NoReturn:
        """Refuse: it has no recipes that peers could run.

        Raises:
            SettingsError: always.
        """
        raise SettingsError(needs_processes(self.program))


def as_strategy(given: Any) -> Any:
    """`given`, or the strategy that stands for it if it is a program."""
    return SPMDStrategy(given) if isinstance(given, SPMDProgram) else given


def needs_processes(program: SPMDProgram) -> str:
    """What to tell someone who runs it in one process."""
    return (
        f"{type(program).__name__} calls torch.distributed collectives, which need a process for "
        "each node: give fit(processes=True)"
    )
