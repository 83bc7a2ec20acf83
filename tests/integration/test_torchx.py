"""The torchx component, alone and by `torchx run` in the folder of the DiLoCo example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchft.coordination import LighthouseServer
from torchft.torchx import hsdp

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "diloco"


def torchx_run(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchx.cli.main", "run", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True)


def test_one_torchrun_a_group_each_with_its_number_and_port() -> None:
    app = hsdp("--fast", replicas=2, workers_per_replica=3, script="train.py", env={"A": "1"})
    first, second = app.roles
    assert [first.name, second.name] == ["replica_0", "replica_1"]
    assert second.args == [
        "--master_port=29601",
        "--nnodes=1",
        "--nproc_per_node=3",
        "--max_restarts=10",
        "train.py",
        "--fast",
    ]
    assert second.env["REPLICA_GROUP_ID"] == "1"
    assert second.env["NUM_REPLICA_GROUPS"] == "2"
    assert second.env["A"] == "1"
    assert Path(first.entrypoint).name == "torchrun"


def test_the_lighthouse_is_the_environments_or_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    assert hsdp().roles[0].env["TORCHFT_LIGHTHOUSE"] == "http://localhost:29510"
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://far:1")
    assert hsdp().roles[0].env["TORCHFT_LIGHTHOUSE"] == "http://far:1"


def test_resources_are_each_groups() -> None:
    (role,) = hsdp(replicas=1, cpu=4, gpu=1, memMB=2048).roles
    assert (role.resource.cpu, role.resource.gpu, role.resource.memMB) == (4, 1, 2048)


def test_in_an_image_torchrun_is_the_images() -> None:
    assert hsdp(replicas=1, image="some/image:1").roles[0].entrypoint == "torchrun"


@pytest.mark.parametrize("wrong", [{"replicas": 0}, {"workers_per_replica": 0}])
def test_a_group_needs_a_worker(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        hsdp(**wrong)  # type: ignore[arg-type]


def test_the_folders_config_names_component_and_script() -> None:
    done = torchx_run("--dryrun")
    assert done.returncode == 0, done.stderr
    assert "train_diloco.py" in done.stdout
    assert "'--master_port=29601'" in done.stdout


@pytest.mark.timeout(300)
def test_torchx_run_trains_two_groups_to_the_end(tmp_path: Path) -> None:
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=10_000)
    address = f"http://127.0.0.1:{lighthouse.address().rpartition(':')[2]}"
    try:
        done = torchx_run(
            f"-cfg=log_dir={tmp_path},prepend_cwd=True",
            "../../torchft/torchx.py:hsdp",
            *("--", "--outer-steps=10"),
            TORCHFT_LIGHTHOUSE=address,
        )
    finally:
        lighthouse.shutdown()
    assert done.returncode == 0, done.stderr
    logs = [path.read_text() for path in tmp_path.rglob("stdout.log")]
    assert len(logs) == 2
    for log in logs:
        assert "DiLoCo: Number of inner optimizer steps completed: 500" in log
        assert re.search(r"outer optimizer steps completed: \[5\] loss = \d+\.\d+", log)
    assert len({re.search(r"digest of .*: (\w+)", log).group(1) for log in logs}) == 1  # type: ignore[union-attr]
