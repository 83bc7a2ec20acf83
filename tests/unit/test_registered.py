"""Objects that heal by their own `state_dict`: which are taken, and what their digests cover."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchft.errors import SettingsError
from torchft.manager.registered import Registered


class Position:
    """A place in the data."""

    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def pair() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_what_is_the_groups_own_does_not_travel() -> None:
    registered = Registered()
    added = registered.add({"step": Position(1), "data": Position(2)}, ["data"], ())
    assert list(added) == ["step"]


def test_each_digest_covers_its_own_part() -> None:
    registered, shared, own = Registered(), Position(1), Position(2)
    registered.add({"shared": shared, "data": own}, ["data"], ())
    before = registered.digest_shared(), registered.digest_own()
    own.at += 1
    assert registered.digest_shared() == before[0]
    assert registered.digest_own() != before[1]
    shared.at += 1
    assert registered.digest_shared() != before[0]


def test_a_learning_rate_changes_the_shared_digest() -> None:
    registered, (model, optimizer) = Registered(), pair()
    registered.add({"model": model, "optimizer": optimizer}, (), ())
    before = registered.digest_shared()
    optimizer.param_groups[0]["lr"] = 0.2
    assert registered.digest_shared() != before


@pytest.mark.parametrize("one", [None, 3, Position, {"at": 1}])
def test_an_object_without_a_state_dict_is_refused_by_name(one: Any) -> None:
    with pytest.raises(SettingsError, match=r"data is .*state_dict"):
        Registered().add({"data": one}, (), ())


def test_an_optimizer_of_another_model_is_refused_and_nothing_is_taken() -> None:
    registered, model, (_, stranger) = Registered(), nn.Linear(2, 2), pair()
    with pytest.raises(SettingsError, match="steps none of the model's"):
        registered.add({"model": model, "optimizer": stranger}, (), ())
    assert list(registered.add({"model": model}, (), ())) == ["model"]


@pytest.mark.parametrize(
    ("own", "taken", "said"),
    [
        (["loader"], (), r"own names \['loader'\]"),
        ("data", (), "one string"),
        ((), ["data"], r"\['data'\] registered already"),
    ],
)
def test_names_that_do_not_fit_are_refused(own: Any, taken: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        Registered().add({"data": Position(0)}, own, taken)


def test_a_name_is_registered_once_in_whatever_part() -> None:
    registered = Registered()
    registered.add({"data": Position(0)}, ["data"], ())
    with pytest.raises(SettingsError, match=r"\['data'\] registered already"):
        registered.add({"data": Position(0)}, (), ())


def test_nothing_to_register_is_refused() -> None:
    with pytest.raises(SettingsError, match="nothing to register"):
        Registered().add({}, (), ())
