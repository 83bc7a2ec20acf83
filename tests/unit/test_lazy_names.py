"""Names of packages that load on first use, and names of earlier releases."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

PACKAGES = ["torchft.experiments", "torchft.parameter_server", "torchft.simulator"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_hidden_by_a_module_of_the_same_name(package: str) -> None:
    module = importlib.import_module(package)
    modules = {one.name for one in pkgutil.iter_modules(module.__path__)}
    assert not set(module.__all__) & modules


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_loads(package: str) -> None:
    module = importlib.import_module(package)
    assert all(getattr(module, name) is not None for name in module.__all__)


@pytest.mark.parametrize("old", ["NodeWeather", "Run", "SimulatedRun", "WeatherEvent", "zoo"])
def test_a_name_of_an_earlier_release_warns_and_says_the_new_one(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{old} is now torchft\."):
        assert getattr(importlib.import_module("torchft.simulator"), old) is not None


def test_a_name_that_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("torchft.simulator").nothing  # noqa: B018
