"""The servers that coordinate replica groups, and their clients; they are written in Rust.

A *lighthouse* decides which replica groups take part in each step. A *manager server*, one a group,
gathers the group's ranks and speaks for them. Every call has a deadline, releases the GIL, and ends
within a tenth of a second of Ctrl-C.
"""

from __future__ import annotations

from torchft._torchft import (
    LighthouseClient,
    LighthouseServer,
    ManagerClient,
    ManagerServer,
    Quorum,
    QuorumMember,
    QuorumResult,
    Timestamp,
    lighthouse_main,
    watch_parent,
)

__all__ = [
    "LighthouseClient",
    "LighthouseServer",
    "ManagerClient",
    "ManagerServer",
    "Quorum",
    "QuorumMember",
    "QuorumResult",
    "Timestamp",
    "lighthouse_main",
    "watch_parent",
]
