"""What a run shows while it goes: a bar on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

from torchft.best_effort import BestEffort

__all__ = ["ProgressBar"]

EVERY_S = 10.0
"""Between two lines, where there is no terminal."""


class ProgressBar:
    """A bar with the losses and the speed; without a terminal a line now and then, and
    one at the end.

    Args:
        name: the run's.
        total: steps of the run, of which `done` are behind it.
        stream: by default standard error.
    """

    def __init__(
        self,
        name: str,
        total: int,
        done: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._name, self._clock = name, clock
        self._first, self._done, self._total = done, done, total
        self._began = self._said = clock()
        self._shown: dict[str, str] = {}
        self._try = BestEffort("the progress", logging.getLogger(__name__).warning)
        self._bar = self._make_bar() if self._stream.isatty() else None

    def _make_bar(self) -> Any:
        from tqdm import tqdm  # type: ignore[import-untyped]

        return tqdm(
            total=self._total,
            initial=self._done,
            desc=self._name,
            file=self._stream,
            dynamic_ncols=True,
        )

    def show(self, **figures: float) -> None:
        """Figures that stand beside the bar from now on."""
        self._shown.update({name: f"{value:.4g}" for name, value in figures.items()})
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def step(self, loss: float) -> None:
        """Move the bar on by one step that is done."""
        self._done += 1
        self.show(loss=loss)
        if self._bar is not None:
            self._bar.update()

    def now_and_then(self) -> None:
        """Without a terminal: a line, if the last one is long ago."""
        if self._bar is None and self._clock() - self._said >= EVERY_S:
            self.say()

    def say(self) -> None:
        """Without a terminal: a line, but for the last step's, which `close` writes."""
        if self._bar is None and self._done < self._total:
            self._write()

    def close(self) -> None:
        """Take the bar down, or write the last line."""
        if self._bar is not None:
            self._bar.close()
            return
        self._write()

    def _write(self) -> None:
        self._said = self._clock()
        seconds = self._said - self._began
        steps = self._done - self._first
        speed = f"{steps / seconds:.1f} it/s" if seconds > 0 else "0 s"
        figures = "".join(f", {name} {value}" for name, value in self._shown.items())
        part = "" if self._done == self._total else f" of {self._total}"
        line = f"{self._name}: {self._done}{part} steps, {speed}{figures}"
        self._try(partial(print, line, file=self._stream, flush=True))
