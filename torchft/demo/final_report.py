"""The last word of a worker: what it holds when its training is over, as one JSON file.

Step records tell of steps. That a run is over, and with which state, is told here: the file is
there only when the worker got to its end, and it is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torchft.atomic import replacing

__all__ = ["FinalReport", "read_final_reports"]


@dataclass(frozen=True, kw_only=True)
class FinalReport:
    """One rank of one group, after its last step."""

    group: int
    group_rank: int
    pid: int
    step: int
    """Committed steps."""
    digest: str
    """Of the committed global state: equal on all ranks of all groups, or something is wrong."""
    held_out_loss: float
    """Nats per byte on text that was never trained on."""
    t_monotonic: float
    """When `ledger` was read, `time.monotonic()` in seconds."""
    ledger: Mapping[str, float]
    """Seconds by bucket since the process was created."""

    def write(self, folder: Path) -> Path:
        """Write the file of this rank, replacing that of an earlier life. Raises OSError."""
        path = folder / f"group_{self.group}.rank_{self.group_rank}.end.json"
        with replacing(path) as draft:
            draft.write_text(json.dumps(asdict(self)))
        return path


def read_final_reports(folder: Path) -> list[FinalReport]:
    """All that are there, by group and rank."""
    endings = [FinalReport(**json.loads(path.read_text())) for path in folder.glob("*.end.json")]
    return sorted(endings, key=lambda final_report: (final_report.group, final_report.group_rank))
