"""What the demo of replica groups watches, carries out and shows, on the engine of `run.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torchft.demo.group_scenario import Scenario, name_of
from torchft.demo.run import Run
from torchft.demo.scenario import Action, Controller, KillProcess, RunSnapshot, StartProcess
from torchft.demo.view import Frame, View, loss_text
from torchft.launch.events import Events
from torchft.launch.group import Group
from torchft.launch.monitor import GroupMonitor, RunMonitor
from torchft.launch.processes import has_children, tree
from torchft.launch.starting import Starting
from torchft.records import StepRecord

__all__ = ["GroupRun", "row_of", "state_of"]

HEALED_FOR_S = 2.0
"""How long a group that came back is shown as healed: it heals too quickly to be seen."""


class GroupRun(Run):
    """Replica groups that train to step `target`; one is killed if there is a `scenario`."""

    def __init__(
        self,
        groups: Sequence[Group],
        monitor: RunMonitor,
        scenario: Scenario | None,
        view: View,
        *,
        starting: Starting,
        target: int,
        timeout_s: float,
    ) -> None:
        controller = Controller(scenario.stages if scenario else ())
        named = {name_of(group.number): group for group in groups}
        super().__init__(named, controller, view, timeout_s=timeout_s)
        self.groups = groups
        self.monitor = monitor
        self.killed_id = ""
        """The replica id of the life that was killed; empty: none was."""
        self._victim = scenario.victim if scenario else 0
        self._starting = starting
        self._target = target
        self._events = Events(len(groups), target=target)
        self._all_took_part = False
        self._went_on = False

    def begin(self) -> None:
        for group in self.groups:
            group.start()

    def look(self) -> None:
        self._starting.look()
        new = self.monitor.poll()
        for event in self._events.of(new):
            self.tell(event)
        for record in new:
            self._follow(record)

    def _follow(self, record: StepRecord) -> None:
        """Keep what the controller wants to know."""
        if record.committed:
            self._all_took_part |= record.participants == len(self.groups)
            # A quorum that does not hold the killed member was formed after the kill.
            self._went_on |= bool(self.killed_id) and self.killed_id not in record.members

    def snapshot(self) -> RunSnapshot:
        return RunSnapshot(
            now=time.monotonic(),
            steps={name_of(group.number): group.step for group in self.monitor.groups},
            all_took_part=self._all_took_part,
            went_on=self._went_on,
        )

    def carry_out(self, action: Action) -> None:
        match action:
            case KillProcess(name):
                self._kill(name)
            case StartProcess(name):
                self.processes[name].start()
                self.tell(f"{name} is started again")

    def _kill(self, name: str) -> None:
        last, group = self.monitor.groups[self._victim].last, self.processes[name]
        if not group.alive or last is None:
            self.trouble = f"{name} was gone before it could be killed"
            return
        self.killed_id = last.replica_id
        many = len(tree(group.life.pid))
        group.kill()
        self.tell(f"{name} is killed: SIGKILL to its {many} processes")

    def is_over(self) -> bool:
        """Whether all have ended; a group that was killed is to come back first."""
        codes = [group.poll() for group in self.groups]
        return None not in codes and all(group.life.killed is None for group in self.groups)

    def why_too_early(self, name: str, code: int) -> str | None:
        if code == 0 and self.killed_id and not self._came_back:
            return (
                f"{name} had its last step when group {self._victim} was killed, "
                "which now has nobody to heal from: give the run more --steps"
            )
        return self.failure(name) if code != 0 else None

    @property
    def _came_back(self) -> bool:
        """Whether the victim takes part again, in another life."""
        last = self.monitor.groups[self._victim].last
        return last is not None and last.replica_id != self.killed_id and last.participants > 1

    def frame(self) -> Frame:
        now = time.monotonic()
        pairs = zip(self.groups, self.monitor.groups, strict=True)
        return Frame(
            elapsed_s=self.elapsed_s,
            title=f"groups train until step {self._target}",
            columns=("group", "state", "step", "loss", "members", "take part", "discarded"),
            rows=[row_of(state_of(group, monitor, now), monitor) for group, monitor in pairs],
        )


def row_of(state: str, monitor: GroupMonitor) -> list[str]:
    """Return the cells of a group's row in the live table."""
    last = monitor.last
    members, participants = (len(last.members), last.participants) if last else (0, 0)
    counts = map(str, (members, participants, len(monitor.discarded)))
    return [str(monitor.number), state, str(monitor.step), loss_text(monitor.loss), *counts]


def state_of(group: Group, monitor: GroupMonitor, now: float) -> str:
    """Say in a word what the group does at `now`, seconds of `time.monotonic()`.

    While it starts, its agent comes up, then its worker imports PyTorch and makes its model.
    """
    if group.poll() is not None:
        return "dead" if group.life.code else "ended"
    last = monitor.last
    if last is None or last.t_monotonic < group.life.spawned:
        has_worker = bool(group.lives) and has_children(group.life.pid)
        return "starting: worker" if has_worker else "starting: torchrun"
    first = monitor.first_of[last.replica_id]
    just_now = now - first.t_monotonic < HEALED_FOR_S
    return "healed" if first.step > 0 and just_now else "training"
