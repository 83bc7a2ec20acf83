"""Which checkpoints a folder keeps: decisions about names and steps, without a disk.

    step-0000000100/          a checkpoint; it is whole when its manifest says so
    .step-0000000200.draft/   one that is being written, or was when its process died
    .step-0000000050.gone/    one that is being deleted (`atomic.aside`)

A checkpoint gets its name by one rename, when all of it is on the disk, and loses it by another one
before it is deleted. So whatever has the name and is not whole was damaged later; and a draft that
is whole was only not renamed any more, as when it was to take the place of another one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["Found", "deletable", "draft_of", "is_due", "name_of", "newest_first", "of"]

_NAME = re.compile(r"(\.?)step-(\d{10,})(\.draft|\.gone)?")


@dataclass(frozen=True)
class Found:
    """One checkpoint or draft in the folder."""

    name: str
    step: int
    whole: bool
    """It has a manifest that its files agree with, and is not being deleted."""


def name_of(step: int) -> str:
    """The name of the checkpoint of a step; such names sort by step."""
    return f"step-{step:010d}"


def draft_of(step: int) -> str:
    """Where that checkpoint is written before it has its name."""
    return f".{name_of(step)}.draft"


def of(name: str, *, is_whole: Callable[[int], bool]) -> Found | None:
    """The entry `name` as one of ours, or None; `is_whole` looks at the content, given a step."""
    match = _NAME.fullmatch(name)
    if match is None or bool(match[1]) != bool(match[3]):
        return None
    step = int(match[2])
    return Found(name, step, match[3] != ".gone" and is_whole(step))


def newest_first(found: Iterable[Found]) -> list[Found]:
    """What may be loaded: whole ones, and those that have their name, which may be damaged."""
    offered = (one for one in found if one.whole or not one.name.startswith("."))
    return sorted(offered, key=lambda one: (one.step, one.whole), reverse=True)


def deletable(found: Iterable[Found], keep: int) -> list[Found]:
    """What is older than the `keep` newest whole ones, oldest first; drafts and damaged ones too.

    Nothing while there are fewer than `keep`. What is damaged and newer stays to be looked at.
    """
    ordered = sorted(found, key=lambda one: (one.step, one.name))
    whole = [one.step for one in ordered if one.whole]
    return [one for one in ordered if len(whole) >= keep and one.step < whole[-keep]]


def is_due(step: int, before: int, every_steps: int) -> bool:
    """Whether a multiple of `every_steps` lies after the step `before`, and not after `step`."""
    return step // every_steps > before // every_steps
