"""What the example's Trainer does besides training: writes its log down, and knows when to end."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from torchft.integrations import DiLoCoCallback

__all__ = ["Diary", "EndTogether", "StopsOnSignal"]


class Diary(TrainerCallback):
    """A line of JSON for each log, at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero:
            line = {"step": state.global_step, "at": time.monotonic(), **(logs or {})}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class StopsOnSignal(TrainerCallback):
    """SIGTERM ends training in good order: the last steps are submitted."""

    def __init__(self) -> None:
        self._told = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self._told = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        control.should_training_stop |= self._told


class EndTogether(TrainerCallback):
    """Ends at the outer step that a file holds, once it is there: all workers that look at it end
    with the same weights, whenever they began. For workers of one rank."""

    def __init__(self, path: Path, diloco: DiLoCoCallback) -> None:
        self.path, self.diloco = path, diloco

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        worker = self.diloco.worker
        if worker is not None and self.path.exists():
            control.should_training_stop |= worker.version >= int(self.path.read_text())
