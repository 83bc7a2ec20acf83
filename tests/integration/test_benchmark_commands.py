"""The benchmarks are commands: they explain themselves, refuse what they cannot do, and a tiny run
of each finds sane figures. What the figures are worth is not for a test to say."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torchft.parameter_server import DiLoCoWorker
from torchft.parameter_server.core.options import ServerOptions
from torchft.parameter_server.core.rules import Rules
from torchft.parameter_server.server.server import DiLoCoServer

FOLDER = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(FOLDER))

from harness.figures import Result  # noqa: E402
from harness.serving import Wire, layers  # noqa: E402
from run import BENCHMARKS  # noqa: E402


def ran(name: str, *flags: str, limit_s: float = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *flags]
    # Measured is the package beside the tests, whether or not it is installed.
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s)


@pytest.mark.parametrize("name", [*BENCHMARKS, "links", "run"])
def test_help_explains_and_measures_nothing(name: str) -> None:
    done = ran(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout
    assert "--json" in done.stdout


def test_a_flag_out_of_range_is_refused() -> None:
    done = ran("commit_latency", "--groups", "1,0")
    assert done.returncode == 2
    assert "--groups" in done.stderr


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    done = ran("run", "speed")
    assert done.returncode == 2
    assert "'speed' is not one of startup" in done.stderr


LONG = {"recovery_time", "simulator_starts", "variants", "server", "server_faults"}
"""Even the least of a kill, a restart and a heal takes a while, and so do five starts of torch."""
LONG_S = 400
"""Theirs on a machine that others use too."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[pytest.mark.slow, pytest.mark.timeout(LONG_S + 20)] if name in LONG else [],
        )
        for name in BENCHMARKS
    ],
)
def test_a_tiny_run_finds_sane_figures(name: str) -> None:
    done = ran(name, "--quick", "--json", limit_s=LONG_S if name in LONG else 100)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = Result.from_json(line)
    assert result.benchmark == name
    assert result.figures
    for figure in result.figures:
        assert math.isfinite(figure.value), figure
        assert figure.value >= 0 or figure.key.startswith(
            ("learning.gap.", "server_learning.gap.")
        ), figure
        assert figure.floor is None or figure.floor.value > 0, figure


@pytest.mark.parametrize(
    ("codec", "least", "most"), [("fp32", 8.0, 8.02), ("int8", 2.0, 2.1), ("int4", 1.1, 1.2)]
)
def test_a_synchronisation_takes_so_many_bytes_of_the_wire(
    tmp_path: Path, codec: str, least: float, most: float
) -> None:
    model = layers(512, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with DiLoCoServer(ServerOptions(tmp_path, Rules(1))) as server, Wire(server.port) as wire:
        address = f"127.0.0.1:{wire.port}"
        with DiLoCoWorker(model, optimizer, address, codec=codec, sync_every=1) as worker:
            before = wire.nbytes
            optimizer.step()
            counted = (wire.nbytes - before) / (2 * 512**2)
            assert worker.sync_count == 1
    assert least <= counted <= most
