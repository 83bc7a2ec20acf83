"""Many threads that begin together, as many clients of one server would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

__all__ = ["at_once"]


def at_once(acts: Sequence[Callable[[], object]]) -> None:
    """Run each of `acts` on a thread of its own and wait for all; raises the first's error."""
    with ThreadPoolExecutor(len(acts)) as pool:
        for done in [pool.submit(act) for act in acts]:
            done.result()
