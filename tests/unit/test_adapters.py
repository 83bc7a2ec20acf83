"""How a manager drives process groups that others wrote."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest

from torchft.process_group import adapters
from torchft.process_group.adapters import Members

ALL: Any = ("host:1/x", "name", 1, 2, 7, 0, 1, [4, 5])


def _four(a, b, c, d):
    return (a, b, c, d)


def _five(a, b, c, d, quorum_id=None):
    return (a, b, c, d, quorum_id)


def _eight(a, b, c, d, e=None, f=None, g=None, h=None):
    return (a, b, c, d, e, f, g, h)


def _any(*members, **more):
    return members


def _named(a, b, c, d, *, quorum_id=None):
    return (a, b, c, d)


@pytest.mark.parametrize(
    ("function", "taken"), [(_four, 4), (_five, 5), (_eight, 8), (_any, 8), (_named, 4)]
)
def test_configure_gets_as_many_arguments_as_it_takes(function: Any, taken: int) -> None:
    got: list[Any] = []

    @functools.wraps(function)
    def configure(*arguments: Any) -> None:
        got.append(function(*arguments))

    adapters.configure(SimpleNamespace(configure=configure), Members(*ALL))
    assert got == [ALL[:taken]]
