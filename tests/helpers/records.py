"""Step records as a test needs them."""

from __future__ import annotations

from typing import Any

from torchft.records import StepRecord

__all__ = ["step_record"]


def step_record(step: int, **fields: Any) -> StepRecord:
    """A committed step of the first of two groups; `fields` override what is known of it."""
    known: dict[str, Any] = {
        "t_monotonic": 1.0,
        "replica_id": "group_0:a",
        "group_rank": 0,
        "quorum_id": 5,
        "members": ("group_0:a", "group_1:b"),
        "participants": 2,
        "committed": True,
    }
    return StepRecord(step=step, **{**known, **fields})
