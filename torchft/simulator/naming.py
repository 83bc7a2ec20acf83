"""What a run is called, and where its files are: logs in one folder, checkpoints in another.

<log_dir>/<name>/train.csv …        <save_dir>/<name>/step_00000100.pt …
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from torchft.errors import SettingsError
from torchft.simulator.checkpoint import Checkpoints, Saved, load_checkpoint
from torchft.strategies import Strategy

__all__ = ["Naming", "default_name", "find_resumed"]


class Naming:
    """Of one run: the given name, else that of the run it resumes, else a new one."""

    def __init__(
        self,
        strategy: Strategy,
        name: str | None,
        saved: Saved | None,
        log_dir: str | Path,
        save_dir: str | Path,
    ) -> None:
        self._roots = Path(log_dir), Path(save_dir)
        self._resumes = saved is not None
        if name is None and saved is not None:
            name = saved.path.parent.name
        self.name = name or default_name(strategy, datetime.now(), taken=self._taken)

    def _taken(self, name: str) -> bool:
        return any((root / name).exists() for root in self._roots)

    @property
    def logs(self) -> Path:
        """The folder of its logs."""
        return self._roots[0] / self.name

    def checkpoints(self, keep: int) -> Checkpoints:
        """Those of this run.

        Raises:
            SettingsError: there are some of an earlier run, which this one would mix with.
        """
        checkpoints = Checkpoints(self._roots[1] / self.name, keep=keep)
        if checkpoints.newest() is not None and not self._resumes:
            raise SettingsError(
                f"{checkpoints.folder} holds checkpoints of an earlier run: go on with it by "
                "resume=True, give another run_name, or remove them"
            )
        return checkpoints


def default_name(strategy: Strategy, now: datetime, *, taken: Callable[[str], bool]) -> str:
    """`diloco_20260131_120000`, with a number after it where that is taken."""
    kind = type(strategy).__name__.removesuffix("Strategy")
    kind = kind or "-".join(type(recipe).__name__ for recipe in strategy.recipes) or "alone"
    name = f"{kind.lower()}_{now:%Y%m%d_%H%M%S}"
    numbered = (name if n == 1 else f"{name}_{n}" for n in itertools.count(1))
    return next(candidate for candidate in numbered if not taken(candidate))


def find_resumed(
    resume: bool | str | Path, save_dir: str | Path, run_name: str | None
) -> Saved | None:
    """The checkpoint to go on from, if any.

    Raises:
        SettingsError: there is none, or nothing says of which run.
    """
    if resume is False:
        return None
    if resume is not True:
        return load_checkpoint(resume)
    if run_name is None:
        raise SettingsError("resume=True goes on with a run_name: give it, or resume=a checkpoint")
    return load_checkpoint(Path(save_dir) / run_name)
