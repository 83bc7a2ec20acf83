"""The engine of both demos: look at the processes, ask the controller, carry out what it says.

What a demo starts, watches and shows is its own business: `group_run.py`, `server_demo.py`.
Whatever ends a run, `end` leaves no process of it.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torchft.demo.scenario import Action, Controller, RunSnapshot
from torchft.demo.view import Frame, View
from torchft.launch.group import Group
from torchft.launch.logs import last_error
from torchft.launch.stopping import StopSignals

__all__ = ["Run", "RunSummary"]


@dataclass(frozen=True, kw_only=True)
class RunSummary(ABC):
    """What is known of any demo run that has ended."""

    wall_s: float
    trouble: str | None = None
    """Why the run was given up, if it was."""
    stopped_by: int | None = None
    """The number of the signal that ended it, if one did."""
    folder: Path | None = None
    """Where the logs are. Those of a good run may have been removed."""

    @property
    @abstractmethod
    def good(self) -> bool:
        """Whether everything went as it should: the exit code follows from it."""

    @abstractmethod
    def lines(self) -> list[str]:
        """Describe what came of the run, without why it was given up."""

    def text(self) -> str:
        """Describe the run in lines of plain text."""
        parts = ["", *self.lines()]
        if self.trouble is not None:
            parts.append(f"given up: {self.trouble}")
        if not self.good and self.folder is not None:
            parts.append(f"logs: {self.folder}")
        return "\n".join(parts)


class Run(ABC):
    """One run of a demo: call `play`, then `end`, then `summary`.

    Args:
        processes: by the name that messages give them; none has been started.
        controller: decides what happens when.
        view: shows lines of events and the present state.
        timeout_s: a run that takes longer is given up.
    """

    look_every_s = 0.02
    """How long the loop sleeps between two looks at the processes."""

    def __init__(
        self,
        processes: Mapping[str, Group],
        controller: Controller,
        view: View,
        *,
        timeout_s: float,
    ) -> None:
        self.processes = processes
        self.controller = controller
        self.trouble: str | None = None
        """Why the run was given up, if it was."""
        self.stopped_by: int | None = None
        """The number of the signal that ended the run, if one did."""
        self.ended: set[str] = set()
        """Processes that ended by themselves."""
        self._view = view
        self._timeout_s = timeout_s
        self._began = time.monotonic()

    def play(self, stop: StopSignals) -> None:
        """Run from the first start until all is over, or the run has to be given up."""
        self.begin()
        while not self._over(stop):
            self.look()
            self._look_for_ends()
            if (action := self.controller.decide(self.snapshot())) is not None:
                self.carry_out(action)
            self._view.show(self.frame())
            time.sleep(self.look_every_s)
        self.finish()

    def end(self) -> None:
        """Stop every process that still runs; none is left on return."""
        for process in self.processes.values():
            process.ask_to_stop()  # all at once, so that they take their time together
        for process in self.processes.values():
            process.stop()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the run was made."""
        return time.monotonic() - self._began

    def tell(self, event: str) -> None:
        """Show one line about something that happened."""
        self._view.tell(self.elapsed_s, event)

    @abstractmethod
    def begin(self) -> None:
        """Start the processes that run from the beginning."""

    @abstractmethod
    def look(self) -> None:
        """Read what the processes have reported since the last look."""

    @abstractmethod
    def snapshot(self) -> RunSnapshot:
        """Collect what the controller decides from."""

    @abstractmethod
    def carry_out(self, action: Action) -> None:
        """Do what the controller has decided."""

    @abstractmethod
    def frame(self) -> Frame:
        """Describe the present state for the view."""

    @abstractmethod
    def is_over(self) -> bool:
        """Whether nothing more is to happen."""

    @abstractmethod
    def why_too_early(self, name: str, code: int) -> str | None:
        """Say what is wrong with `name` ending now with this exit code; None if nothing is."""

    def finish(self) -> None:
        """Do what comes after the loop, by default one last look."""
        self.look()
        self._look_for_ends()

    def failure(self, name: str) -> str:
        """Name the exit code of a process and the last error in its log."""
        process = self.processes[name]
        error = last_error(process.log)
        after = f" after {error}" if error else ""
        return f"{name} ended with exit code {process.life.code}{after}"

    def _over(self, stop: StopSignals) -> bool:
        if stop.received is not None:
            self.stopped_by = stop.received
            self.trouble = f"stopped by {signal.Signals(stop.received).name}"
        elif self.elapsed_s > self._timeout_s:
            waited = self.controller.waits
            self.trouble = f"not over after {self._timeout_s:g} s; it waited {waited}"
        return self.trouble is not None or self.is_over()

    def _look_for_ends(self) -> None:
        for name, process in self.processes.items():
            code = process.poll()
            if code is None or name in self.ended or process.life.killed is not None:
                continue
            self.ended.add(name)
            self.tell(f"{name} ended with exit code {code}")
            self.trouble = self.trouble or self.why_too_early(name, code)
