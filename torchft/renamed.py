"""Names of arguments and attributes in an earlier release, which work once more, with a warning.

    @renamed_arguments(every="sync_every")
    def __init__(self, sync_every: int) -> None: ...

Names of modules and classes: `torchft.lazy_names`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torchft.errors import SettingsError

__all__ = ["OldAttribute", "old_names_of", "renamed_arguments", "say_renamed", "with_new_names"]

_F = TypeVar("_F", bound=Callable[..., Any])


def with_new_names(
    what: str, given: Mapping[str, Any], new_names: Mapping[str, str], *, settings: bool = False
) -> dict[str, Any]:
    """Put what was given under the names of an earlier release under the names of now.

    Args:
        what: whose names they are, as the warning calls it.
        given: name → value.
        new_names: old name → new name.
        settings: they come from a file or a command line, not from a call: the warning is a
            FutureWarning, not a DeprecationWarning.

    Raises:
        TypeError: something is given under both names.
        SettingsError: the same, of settings.
    """
    named = dict(given)
    for old in named.keys() & new_names.keys():
        new = new_names[old]
        say_renamed(what, old, new, both=new in named, settings=settings)
        named[new] = named.pop(old)
    return named


def say_renamed(what: str, old: str, new: str, *, both: bool, settings: bool = False) -> None:
    """Warn the caller's caller's caller that it gives something by an old name.

    Args:
        what: whose name it is, as the warning calls it.
        both: whether it is given by the new name too.
        settings: as of `with_new_names`.

    Raises:
        TypeError: it is given under both names.
        SettingsError: the same, of a setting.
    """
    said = f"{what}: {old} is now {new}"
    if both:
        refusal = f"{said}, and both are given"
        raise SettingsError(refusal) if settings else TypeError(refusal)
    # Python shows a DeprecationWarning to the author of a call alone, a FutureWarning to all users.
    warnings.warn(said, FutureWarning if settings else DeprecationWarning, stacklevel=4)


def renamed_arguments(**new_names: str) -> Callable[[_F], _F]:
    """Let a function, or the making of a class, take keyword arguments by the names that they had
    in an earlier release.

    Args:
        new_names: old name → new name.
    """

    def decorate(function: _F) -> _F:
        if isinstance(function, type):
            made: Any = function
            made.__init__ = decorate(made.__init__)
            return function
        what = f"{function.__module__}.{function.__qualname__.removesuffix('.__init__')}"

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **with_new_names(what, kwargs, new_names))

        call.renamed_arguments = new_names  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return decorate


def old_names_of(made_by: Any) -> Mapping[str, str]:
    """Old name → new name of the arguments that a function or the making of a class takes."""
    called = getattr(made_by, "__init__") if isinstance(made_by, type) else made_by  # noqa: B009
    names: Mapping[str, str] = getattr(called, "renamed_arguments", {})
    return names


class OldAttribute:
    """An attribute by the name that it had in an earlier release, on the class or the object.

    The class calls `renew` in its `__init_subclass__`.
    """

    def __init__(self, new: str) -> None:
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self._old = name

    def __get__(self, instance: object, owner: type) -> Any:
        self._warn(owner)
        return getattr(owner if instance is None else instance, self._new)

    def __set__(self, instance: object, value: Any) -> None:
        self._warn(type(instance))
        setattr(instance, self._new, value)

    def renew(self, subclass: type) -> None:
        """Move what the body of `subclass` says under the old name to the new one."""
        if self._old in vars(subclass):
            self._warn(subclass)
            setattr(subclass, self._new, vars(subclass)[self._old])
            delattr(subclass, self._old)

    def _warn(self, owner: type) -> None:
        warnings.warn(
            f"torchft: {owner.__name__}.{self._old} is now {self._new}",
            DeprecationWarning,
            stacklevel=3,
        )
