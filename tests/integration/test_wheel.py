"""The wheel as somebody without a Rust toolchain installs it, outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UV = shutil.which("uv") or str(ROOT / ".uv/bin/uv")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` leaves."""
    made = tmp_path_factory.mktemp("dist")
    command = ["make", "wheel", f"DIST={made}", f"UV={UV}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=1500)
    return made


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a new environment that holds the wheel and what it needs, nothing else."""
    place = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([UV, "venv", "--python", sys.executable, str(place)], check=True, timeout=60)
    (wheel,) = dist.glob("*.whl")
    install = [UV, "pip", "install", "--python", str(place), f"torchft[demo] @ {wheel.as_uri()}"]
    subprocess.run(install, check=True, timeout=600)
    return place / "bin"


def run(command: Path, *flags: str, timeout_s: float = 60) -> str:
    """What a command prints, run in another folder and without a compiler on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PATH": f"{command.parent}:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [command, *flags],
        cwd=command.parent,
        env=environment,
        check=True,
        timeout=timeout_s,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout


def test_the_wheel_runs_on_any_linux_and_says_what_is_in_it(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert "-cp311-abi3-manylinux_2_28_" in wheel.name
    assert wheel.stat().st_size < 8 * 2**20, "stripped"
    assert list(dist.glob("torchft-*.tar.gz")), "the sources"
    (sbom,) = dist.glob("*.cyclonedx.json")
    named = {part["name"] for part in json.loads(sbom.read_text())["components"]}
    assert {"tonic", "pyo3", "tokio"} <= named
    assert "torchft/parameter_server/page.html" in zipfile.ZipFile(wheel).namelist()


def test_the_commands_of_an_install_answer(installed: Path) -> None:
    assert run(installed / "torchft", "--version").startswith("torchft 1")
    assert run(installed / "torchft_lighthouse", "--version").startswith("torchft_lighthouse 1")
    assert run(installed / "diloco", "--version").startswith("diloco 1")


def test_a_demo_runs_from_an_install(installed: Path) -> None:
    flags = ("demo", "--replicas=2", "--steps=40", "--seed=3", "--json")
    summary = json.loads(run(installed / "torchft", *flags, timeout_s=400))
    assert summary["good"]
    assert summary["kill"]["full_again_s"] > 0
