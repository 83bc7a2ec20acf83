"""What a run is called, and where its files are: logs in one folder, checkpoints in another.

<log_dir>/<name>/train.csv …        <save_dir>/<name>/step_00000100.pt …
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from torchft.errors import SettingsError
from torchft.experiments.checkpoint import CheckpointFolder, Saved, load_checkpoint
from torchft.strategies import Strategy
from torchft.strategies.recipe import kind_of

__all__ = ["RunFolders", "check_name", "default_name", "find_resumed"]

_LONGEST = 200
"""Bytes: file systems take 255, and something may stand behind it."""


def check_name(name: Any) -> None:
    """Refuse what cannot be the name of a folder in another one.

    Raises:
        SettingsError: what it may be instead.
    """
    if name is None:
        return
    plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")
    if not plain:
        raise SettingsError(
            f"run_name={name!r}: it names a folder, so it must be text without / and \\; say where "
            "that folder is by log_dir and save_dir"
        )
    if len(os.fsencode(name)) > _LONGEST:
        raise SettingsError(f"run_name={name[:20]!r}…: give one of {_LONGEST} bytes or fewer")


class RunFolders:
    """Of one run: the given name, else that of the run it resumes, else a new one.

    Args:
        claims: folders in which a new name is taken at once, so that no other process has it too.
    """

    def __init__(
        self,
        strategy: Strategy,
        name: str | None,
        saved: Saved | None,
        log_dir: str | Path,
        save_dir: str | Path,
        *,
        claims: Iterable[str | Path] = (),
    ) -> None:
        self._roots, self._claims = (Path(log_dir), Path(save_dir)), list(map(Path, claims))
        self._resumes = saved is not None
        if name is None and saved is not None:
            name = saved.path.parent.name
        self.name = name or default_name(strategy, datetime.now(), taken=self._taken)

    def _taken(self, name: str) -> bool:
        if any((root / name).exists() for root in self._roots):
            return True
        return not all(_made(root / name) for root in self._claims)

    @property
    def logs(self) -> Path:
        """The folder that holds the logs of a run."""
        return self._roots[0] / self.name

    def check_logs(self) -> None:
        """Refuse the folder of an earlier run's logs, which this one would replace.

        Raises:
            SettingsError: names it, and the ways out.
        """
        if not self._resumes and self.logs.is_dir() and any(self.logs.iterdir()):
            raise SettingsError(
                f"{self.logs} holds the logs of an earlier run: give another run_name or log_dir, "
                "go on from that run's checkpoint by resume=True, or remove the folder"
            )

    def checkpoints(self, keep: int) -> CheckpointFolder:
        """Those of this run.

        Raises:
            SettingsError: there are some of an earlier run, which this one would mix with.
        """
        checkpoints = CheckpointFolder(self._roots[1] / self.name, keep=keep)
        if checkpoints.newest() is not None and not self._resumes:
            raise SettingsError(
                f"{checkpoints.folder} holds checkpoints of an earlier run: go on with it by "
                "resume=True, give another run_name, or remove them"
            )
        return checkpoints


def _made(folder: Path) -> bool:
    """Whether this call has made it."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def default_name(strategy: Strategy, now: datetime, *, taken: Callable[[str], bool]) -> str:
    """`diloco_20260131_120000`, with a number after it where that is taken."""
    kind = str(strategy.config()["strategy"]).removesuffix("Strategy")
    kind = kind or "-".join(kind_of(recipe) for recipe in strategy.recipes) or "alone"
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
