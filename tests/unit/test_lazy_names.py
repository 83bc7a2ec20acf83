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


@pytest.mark.parametrize("old", ["NodeWeather", "Run", "SimulatedRun", "WeatherEvent"])
def test_a_name_of_an_earlier_release_warns_and_says_the_new_one(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"{old} is now torchft\."):
        assert getattr(importlib.import_module("torchft.simulator"), old) is not None


@pytest.mark.parametrize(
    ("old", "names", "new"),
    [
        ("torchft.cli.numbers", ["at_least", "seconds"], "torchft.arguments"),
        ("torchft.launch.bytes_lm", ["ByteTransformer", "Order"], "torchft.toy.byte_model"),
        ("torchft.launch.corpus", ["ByteCorpus"], "torchft.toy.corpus"),
        ("torchft.launch.inside", ["average_inside", "meet_inside"], "torchft.script.ranks"),
        ("torchft.launch.network", ["Host", "Link", "Network"], "torchft.network_namespaces"),
        ("torchft.launch.shell", ["joining", "which_group"], "torchft.script.command"),
        ("torchft.launch.text", ["read_text"], "torchft.toy.text"),
        ("torchft.launch.together", ["Together"], "torchft.script.finish_barrier"),
        ("torchft.simulator.zoo", ["Mlp", "Gpt"], "torchft.experiments.models"),
    ],
)
def test_a_module_of_an_earlier_release_is_imported_and_says_where_its_names_are(
    old: str, names: list[str], new: str
) -> None:
    package, _, module = old.rpartition(".")
    assert importlib.import_module(old) is getattr(importlib.import_module(package), module)
    for name in names:
        with pytest.warns(DeprecationWarning, match=f"{old}.{name} is now {new}.") as seen:
            exec(f"from {old} import {name}", taken := {"__name__": __name__})
        assert callable(taken[name]) and len(seen) == 1
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {old} import nothing")


def test_a_name_that_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("torchft.simulator").nothing  # noqa: B018
