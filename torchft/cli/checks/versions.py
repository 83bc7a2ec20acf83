"""What is installed, and whether it fits together."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import metadata

from torchft.cli.checks.check import Check
from torchft.version import UPSTREAM_API, __version__

__all__ = ["extension", "extras", "package", "python", "torch"]

LEAST_PYTHON = (3, 11)
LEAST_TORCH = (2, 7)

EXTRAS = {"psutil": "demo", "rich": "demo", "torchx": "torchx"}
"""Module → the extra that brings it."""


def python(version: tuple[int, int] | None = None) -> Check:
    """Check the version of the Python interpreter."""
    version = sys.version_info[:2] if version is None else version
    name = ".".join(map(str, version))
    if version < LEAST_PYTHON:
        return Check.fail("python", name, "use Python 3.11 or later")
    return Check.ok("python", name)


def torch(installed: str | None = None) -> Check:
    """Check the installed version of PyTorch."""
    try:
        installed = metadata.version("torch") if installed is None else installed
    except metadata.PackageNotFoundError:
        return Check.fail("torch", "torch is not installed", "install torch 2.7 or later")
    numbers = tuple(int(part) for part in installed.split("+")[0].split(".")[:2])
    if numbers < LEAST_TORCH:
        return Check.fail("torch", installed, "install torch 2.7 or later")
    return Check.ok("torch", installed)


def package(installed: Sequence[str] | None = None) -> Check:
    """This package, alone: PyTorch's own torchft has the same import name.

    `installed` are the names of the distributions that bring a package `torchft`, as
    `name version`; read from the environment if None.
    """
    if installed is None:
        found = sorted(set(metadata.packages_distributions().get("torchft", [])))
        installed = [f"{name} {metadata.version(name)}" for name in found]
    others = [one for one in installed if one != f"torchft {__version__}"]
    if others:
        names = dict.fromkeys([*(one.split()[0] for one in others), "torchft"])
        return Check.fail(
            "torchft",
            f"{', '.join(others)} is installed too, and this is torchft {__version__}: both write "
            "into the same folder",
            f"uninstall both (pip uninstall {' '.join(names)}), and install the one that you want",
        )
    return Check.ok("torchft", f"{__version__}, the interface of torchft {UPSTREAM_API}")


def extension() -> Check:
    """The Rust part, and that it can serve on this machine."""
    from torchft.cli.checks.lighthouse import ask, own_lighthouse

    try:
        with own_lighthouse() as address:
            answer = ask(address, timeout_s=5.0)
    except Exception as error:
        return Check.fail(
            "extension",
            f"the compiled part does not work: {error}",
            "build it again in the checkout: `make setup`, or `pip install .`",
        )
    return Check.ok("extension", f"serves here and speaks wire version {answer.wire}")


def extras() -> Check:
    """What some commands need beyond the package itself."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if not missing:
        return Check.ok("extras", f"{', '.join(EXTRAS)} are there")
    wanted = ",".join(sorted({EXTRAS[name] for name in missing}))
    return Check.warn(
        "extras",
        f"not installed: {', '.join(missing)} (for `torchft demo` and `torchx run`)",
        f"pip install 'torchft[{wanted}]', or '.[{wanted}]' in a checkout",
    )
