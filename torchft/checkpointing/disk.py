"""Checkpoints on disk: from time to time one group writes what all groups share, beside training.

    checkpoints = DiskCheckpoints(manager, "checkpoints", every_steps=100, keep=3)
    checkpoints.load_newest()                # before the first step; None: there is none
    while manager.current_step() < 1000:
        ...                                  # one step
        checkpoints.save_if_due()            # returns when the state is copied
    checkpoints.close()                      # waits for the one that is being written

What is written is what a group that heals would get: all that is registered at the manager, and the
manager's step. So any number of groups starts from it. Rounds that are in flight are not part of
it: after a restart they have come to nothing, as discarded ones do. Of the groups that committed a
step the first one writes, all its ranks together; the others go on at once.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torchft.arguments import check_integer, in_words
from torchft.checkpointing import checkpoint, kept
from torchft.checkpointing.folder import CheckpointFolder
from torchft.checkpointing.own_mesh import holds_dtensor, on_own_mesh
from torchft.checkpointing.ranks import Ranks
from torchft.checkpointing.staging import Staged, Staging
from torchft.checkpointing.tree import encode
from torchft.errors import CheckpointError, PhaseError, SettingsError, StateDictError
from torchft.uncopied import Uncopied

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["DiskCheckpoints"]

_log = logging.getLogger("torchft.checkpointing.disk")
_PATIENCE = timedelta(hours=1)
"""How long the ranks of a group wait for each other's disk."""


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class DiskCheckpoints(Uncopied):
    """Writes checkpoints to one folder, and starts all groups from the newest whole one.

    Every rank of every group makes one, when the manager, and the wrappers that use it, are made.
    A group of several ranks needs torch.distributed over its ranks, and a folder that all of them
    see. Other groups may see another folder, or none: they heal. The copy of the state stays in the
    memory of the group that writes. Hashes find what was damaged, not what somebody forged: whoever
    can write to the folder decides what training goes on from, but cannot run code in it.

    Args:
        manager: whose registered state is saved, and whose committed steps are counted.
        folder: made when the first checkpoint is written.
        every_steps: committed steps of the manager from one checkpoint to the next. Of LocalSGD and
            DiLoCo each round is one.
        keep: so many whole checkpoints; older ones are deleted.
        state: objects by name to save beside what is registered, such as the position of a loader
            that each group has for itself; each has `state_dict` and `load_state_dict`.

    Raises:
        SettingsError: an argument that cannot be used; several ranks without torch.distributed.
    """

    copy_instead = "make another one for the same folder in each process"

    def __init__(
        self,
        manager: Manager,
        folder: str | Path,
        every_steps: int,
        keep: int = 3,
        *,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check_integer("every_steps", every_steps, least=1)
        check_integer("keep", keep, least=1)
        self.every_steps, self.keep = every_steps, keep
        self.folder = CheckpointFolder(Path(folder))
        self._beside = _checked(state or {})
        self._manager = manager
        rank, count = manager.group.rank, manager.group.world_size
        self._ranks = Ranks.of_group(rank, count, _PATIENCE)
        # The training thread's own: the other one is busy while a checkpoint is written.
        self._control = Ranks.of_group(rank, count, manager.options.timeout)
        self._staging = Staging()
        self._save: _Save | None = None
        self._looked = self._begun = False
        self._before = 0
        """Where the manager stood when it was last asked whether a checkpoint is due."""
        self.newest: int | None = None
        """The step of the newest checkpoint that was written or loaded here."""
        self.failures = 0
        """How many checkpoints could not be written; the log says why."""
        self.skipped = 0
        """How many were due while the one before was still being written."""

    # ------------------------------------------------------------------ load

    def load_newest(self) -> int | None:
        """Start from the newest whole checkpoint; before the first step, on all ranks.

        A damaged one is named in a warning, and the one before it is taken. Groups that start from
        different steps, or from none, heal when they meet.

        Returns:
            Its step; None where there is none.

        Raises:
            PhaseError: training has begun.
            MismatchError: a tensor has another shape here, or cannot be sharded as it is here.
            StateDictError: what is registered here is not what was saved.
        """
        if self._manager.steps.last is not None:
            raise PhaseError("training has begun: load a checkpoint before the first step")
        self._looked = True
        for one in self._control.first(lambda: kept.newest_first(self.folder.found())):
            path = self.folder.path / one.name
            try:
                state = self._read(path, one.step)
            except (CheckpointError, OSError) as error:
                said = "checkpoint %s is damaged, so the one before it is taken: %s"
                self._say(logging.WARNING, said, path, error)
                continue
            self._load(state, f"checkpoint {path}")
            self.newest = self._before = one.step
            self._say(logging.INFO, "starts from checkpoint %s", path)
            return one.step
        return None

    def _read(self, path: Path, step: int) -> Any:
        # Only sharded tensors depend on what there is already, which may not be asked for so early.
        sharded = "torch.distributed.tensor" in sys.modules
        own = self._state if sharded else lambda: None
        return checkpoint.read(path, step, own, self._control)

    def _load(self, state: Any, source: str) -> None:
        if state["beside"].keys() != self._beside.keys():
            raise StateDictError(
                f"{source} was written with state={sorted(state['beside'])}, and here it is "
                f"{sorted(self._beside)}: give the same names"
            )
        self._manager.state.load_from_disk(state["user"], source)
        for name, one in self._beside.items():
            saved = state["beside"][name]
            if holds_dtensor(saved):
                saved = on_own_mesh(saved, one.state_dict(), (name,))
            one.load_state_dict(saved)
        self._manager.load_state_dict(state["torchft"])

    # ------------------------------------------------------------------ save

    def save_if_due(self) -> bool:
        """Begin a checkpoint, if one is due and it is this group's turn; after a step, on all
        ranks. Returns when the state is copied. What fails later is said at the next call.

        Returns:
            Whether it began one.

        Raises:
            PhaseError: a step is open; or at the first call, the folder has checkpoints of later
                steps, and none was loaded.
            StateDictError: a value cannot be saved; names its place. First call.
        """
        if self._manager.steps.is_open:
            raise PhaseError(
                "a step is open, so that what would be saved is not all of one step: call "
                "save_if_due() after optimizer.step()"
            )
        self._report()
        step = self._manager.current_step()
        if not self._begun:
            self._begin(step)
        before, self._before = self._before, step
        plan = self._manager.steps.committed
        if not kept.is_due(step, before, self.every_steps) or plan is None:
            return False
        return plan.participating_rank == 0 and self._start(step)

    def close(self, timeout: timedelta = timedelta(minutes=10)) -> None:
        """Wait for the checkpoint that is being written, and say if it fails."""
        if self._save is not None:
            self._save.join(timeout.total_seconds())
            if self._save.is_alive():
                said = "checkpoint of step %d is still being written after %s: it is given up"
                self._say(logging.WARNING, said, self._save.step, timeout)
        self._report()

    def _begin(self, step: int) -> None:
        self._begun = True
        for name, one in self._beside.items():
            try:
                encode(one.state_dict())
            except TypeError as error:
                raise StateDictError(f"{error} (given as state={name!r})") from error
        self._before = self._before or max(step - 1, 0)
        if self._looked:
            return
        newest = max((one.step for one in self.folder.found()), default=0)
        if newest > step:
            raise PhaseError(
                f"{self.folder.path} has a checkpoint of step {newest}, and this run is at {step}: "
                "call load_newest() before the first step, or give an empty folder"
            )

    def _start(self, step: int) -> bool:
        try:
            copies = self._control.together(self._copy_unless_busy)
        except Exception as error:
            self._fail(step, error)
            return False
        if not all(copies):
            self.skipped += 1
            said = "checkpoint of step %d is left out: the one before is still being written"
            self._say(logging.WARNING, said, step)
            return False
        self._save = _Save(step, self._write_of(self._staging.staged, step))
        self._save.start()
        return True

    def _write_of(self, staged: Staged, step: int) -> Callable[[], None]:
        given = self.folder, staged, step, self._ranks
        by = self._manager.group.replica_id
        return partial(checkpoint.write, *given, written_by=by, keep=self.keep)

    def _copy_unless_busy(self) -> bool:
        if self._save is not None and self._save.is_alive():
            return False
        self._staging.copy(self._state())
        return True

    def _state(self) -> dict[str, Any]:
        return {
            "user": self._manager.state.collect_for_disk(),
            "beside": {name: one.state_dict() for name, one in self._beside.items()},
            "torchft": self._manager.state_dict(),
        }

    def _report(self) -> None:
        """Say how the last save ended, once."""
        save = self._save
        if save is None or save.is_alive():
            return
        self._save = None
        if save.error is not None:
            self._fail(save.step, save.error)
            return
        self.newest = save.step
        said = "checkpoint of step %d was written in %.1f s"
        self._say(logging.INFO, said, save.step, save.seconds)

    def _fail(self, step: int, error: BaseException) -> None:
        self.failures += 1
        said = "checkpoint of step %d was not written, training goes on: %s: %s"
        self._say(logging.WARNING, said, step, type(error).__name__, error)
        _log.debug("the same, with where it came from", exc_info=error)

    def _say(self, level: int, said: str, *values: object) -> None:
        """One line for the whole group; on its other ranks for whoever looks for details."""
        level = level if self._ranks.rank == 0 else logging.DEBUG
        _log.log(level, f"[%s] {said}", self._manager.group.replica_id, *values)


class _Save(threading.Thread):
    """One checkpoint that is being written. A disk that hangs keeps no process from ending."""

    def __init__(self, step: int, write: Callable[[], None]) -> None:
        super().__init__(name=f"torchft_checkpoint_{step}", daemon=True)
        self.step = step
        self.error: BaseException | None = None
        self.seconds = 0.0
        self._write = write

    def run(self) -> None:
        """Write it, and keep the error for the training thread."""
        began = time.monotonic()
        try:
            self._write()
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - began


def _checked(state: Mapping[str, Any]) -> dict[str, Any]:
    for name, one in state.items():
        if isinstance(one, type) or not isinstance(one, _Stateful):
            raise SettingsError(
                f"state={name!r} is {in_words(one)}, which has no state_dict() and "
                "load_state_dict(): give an object that has both"
            )
    return dict(state)
