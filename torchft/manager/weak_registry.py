"""Objects that somebody else holds, by names that are equal in a group that was restarted."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Generic, Protocol, TypeVar

__all__ = ["WeakRegistry"]


class _Kind(Protocol):
    kind: str


T = TypeVar("T", bound=_Kind)


class WeakRegistry(Generic[T]):
    """They are held weakly: a model that is wrapped anew is followed by the new wrapper alone."""

    def __init__(self) -> None:
        self._references: list[weakref.ref[T]] = []

    def add(self, one: T) -> None:
        """Keep `one` for as long as somebody else holds it."""
        self._references.append(weakref.ref(one))

    def named(self) -> list[tuple[str, T]]:
        """Those that are alive, in the order in which they were added: `model`, `model 2`, …."""
        alive = [(reference, reference()) for reference in self._references]
        self._references = [reference for reference, one in alive if one is not None]
        numbers: Counter[str] = Counter()
        named = []
        for _, one in alive:
            if one is not None:
                numbers[one.kind] += 1
                number = numbers[one.kind]
                named.append((one.kind if number == 1 else f"{one.kind} {number}", one))
        return named
