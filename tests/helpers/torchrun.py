"""torchrun as people run it, but for its start: it forks from the warm server of `ranks`.

Only the agent is warm. Its workers are new processes that import torch themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from helpers.ranks import WARM

__all__ = ["Torchrun"]


class Torchrun:
    """A run of torchrun with these arguments; its output and that of its workers go into files."""

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        number = len(list(folder.glob("torchrun_*.out")))
        self._files = [folder / f"torchrun_{number}.{name}" for name in ("out", "err")]
        for file in self._files:
            file.touch()
        given = (list(arguments), dict(env), folder, self._files)
        self._process = WARM.Process(target=_run, args=given)
        self._process.start()

    def end(self, within_s: float) -> tuple[int | None, str, str]:
        """Its exit code, standard output and standard error; killed if it takes longer."""
        self._process.join(within_s)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        return self._process.exitcode, *(file.read_text() for file in self._files)

    def kill(self) -> None:
        """End it if it runs."""
        self._process.kill()


def _run(arguments: list[str], env: dict[str, str], folder: Path, files: list[Path]) -> None:
    from torch.distributed.run import main

    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), descriptor)
    main(arguments)
