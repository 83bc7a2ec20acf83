"""A demo run while it goes on: look at its groups, ask the controller, carry out what it says."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from torchft.demo.scenario import Controller, Kill, Restart, Snapshot, Stage
from torchft.demo.view import Frame, Row, View
from torchft.launch.events import Events
from torchft.launch.group import Group
from torchft.launch.logs import last_error
from torchft.launch.monitor import GroupMonitor, RunMonitor
from torchft.launch.processes import has_children, tree
from torchft.launch.starting import Starting
from torchft.launch.stopping import StopSignals
from torchft.records import StepRecord

__all__ = ["Run", "state_of"]

LOOK_EVERY_S = 0.02
"""How often the run is looked at."""


HEALED_FOR_S = 2.0
"""How long a group that came back is said to have healed: it does so too quickly to be seen."""


class Run:
    """Groups that are watched, their controller, and the view that shows them."""

    def __init__(
        self,
        groups: Sequence[Group],
        watch: RunMonitor,
        controller: Controller,
        view: View,
        *,
        starting: Starting,
        target: int,
        timeout_s: float,
    ) -> None:
        self.groups = groups
        self.watch = watch
        self.trouble: str | None = None
        """Why the run was given up, if it was."""
        self.killed_id = ""
        """The replica id of the life that was killed."""
        self.stopped_by: int | None = None
        """The number of the signal that ended the run, if one did."""
        self._controller = controller
        self._view = view
        self._starting = starting
        self._target = target
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self._news = Events(len(groups), target=target)
        self._ended: set[int] = set()
        self._all_took_part = False
        self._went_on = False

    def play(self, stop: StopSignals) -> None:
        """From the first spawn until all have ended, or the run has to be given up."""
        for group in self.groups:
            group.start()
        while not self._over(stop):
            self._look()
            self._act()
            self._view.show(self._frame())
            time.sleep(LOOK_EVERY_S)
        self._look()

    def end(self) -> None:
        """End what still runs."""
        for group in self.groups:
            group.ask_to_stop()  # all at once, so that their graces pass together
        for group in self.groups:
            group.stop()

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def tell(self, news: str) -> None:
        """Show a line of news."""
        self._view.tell(self.elapsed_s, news)

    def _over(self, stop: StopSignals) -> bool:
        if stop.received is not None:
            self.stopped_by = stop.received
            self.trouble = f"stopped by {signal.Signals(stop.received).name}"
        elif self.elapsed_s > self._timeout_s:
            self.trouble = f"not over after {self._timeout_s:g} s"
        if self.trouble is not None:
            return True
        goes_on = self._controller.stage is Stage.DOWN  # the victim is to come back
        return not goes_on and all(group.poll() is not None for group in self.groups)

    def _look(self) -> None:
        self._starting.look()
        new = self.watch.poll()
        for news in self._news.of(new):
            self.tell(news)
        for record in new:
            self._follow(record)
        for group in self.groups:
            self._look_for_end(group)

    @property
    def _victim(self) -> int:
        scenario = self._controller.scenario
        return scenario.victim if scenario is not None else 0

    @property
    def _came_back(self) -> bool:
        """The victim takes part again, in another life."""
        last = self.watch.groups[self._victim].last
        return last is not None and last.replica_id != self.killed_id and last.participants > 1

    def _follow(self, record: StepRecord) -> None:
        """Keep what the controller wants to know."""
        if record.committed:
            self._all_took_part |= record.participants == len(self.groups)
            # A quorum that does not hold the killed member was formed after the kill.
            self._went_on |= bool(self.killed_id) and self.killed_id not in record.members

    def _look_for_end(self, group: Group) -> None:
        code = group.poll()
        if code is None or group.number in self._ended or group.life.killed is not None:
            return
        self._ended.add(group.number)
        self.tell(f"group {group.number} ended with exit code {code}")
        if self._controller.stage in (Stage.DOWN, Stage.RETURNING) and not self._came_back:
            self.trouble = (
                f"group {group.number} had its last step when group {self._victim} was killed, "
                "which now has nobody to heal from: give the run more --steps"
            )
        if code != 0 and self.trouble is None:
            self.trouble = f"group {group.number} ended with exit code {code}"
            if error := last_error(group.log):
                self.trouble += f" after {error}"

    def _act(self) -> None:
        match self._controller.decide(self._snapshot()):
            case Kill(group=number):
                self._kill(self.groups[number])
            case Restart(group=number):
                self.groups[number].start()
                self.tell(f"group {number} is started again")

    def _kill(self, group: Group) -> None:
        last = self.watch.groups[group.number].last
        if not group.alive or last is None:
            self.trouble = f"group {group.number} was gone before it could be killed"
            return
        self.killed_id = last.replica_id
        many = len(tree(group.life.pid))
        group.kill()
        self.tell(f"group {group.number} is killed: SIGKILL to its {many} processes")

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            now=time.monotonic(),
            victim_step=self.watch.groups[self._victim].step,
            all_took_part=self._all_took_part,
            went_on=self._went_on,
        )

    def _frame(self) -> Frame:
        now = time.monotonic()
        rows = [
            row_of(group, watch, now)
            for group, watch in zip(self.groups, self.watch.groups, strict=True)
        ]
        return Frame(elapsed_s=self.elapsed_s, target=self._target, rows=rows)


def row_of(group: Group, watch: GroupMonitor, now: float) -> Row:
    """One line of the live view; `now` in seconds of `time.monotonic()`."""
    last = watch.last
    return Row(
        number=group.number,
        state=state_of(group, watch, now),
        step=watch.step,
        loss=watch.loss,
        members=len(last.members) if last else 0,
        participants=last.participants if last else 0,
        discarded=len(watch.discarded),
    )


def state_of(group: Group, watch: GroupMonitor, now: float) -> str:
    """What the group does now: while it starts, its agent comes up, then its worker imports
    PyTorch and makes its model."""
    if group.poll() is not None:
        return "dead" if group.life.code else "ended"
    last = watch.last
    if last is None or last.t_monotonic < group.life.spawned:
        has_worker = bool(group.lives) and has_children(group.life.pid)
        return "starting: worker" if has_worker else "starting: torchrun"
    first = watch.first_of[last.replica_id]
    just_now = now - first.t_monotonic < HEALED_FOR_S
    return "healed" if first.step > 0 and just_now else "training"
