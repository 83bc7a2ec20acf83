"""The torchx component, alone and by `torchx run` in the folders of the examples."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.coordination import lighthouse
from helpers.waiting import until

from torchft.launch.processes import Process, tree
from torchft.torchx import hsdp

ROOT = Path(__file__).parents[2]
DILOCO = ROOT / "examples" / "diloco"
HSDP = ROOT / "examples" / "hsdp"
COMPONENT = "../../torchft/torchx.py:hsdp"
PATIENCE = "--finish-together-s=200"


def torchx_run(folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torchx.cli.main", "run", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


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


@pytest.mark.parametrize(
    ("folder", "script", "ranks"), [(DILOCO, "train_diloco.py", 1), (HSDP, "train_hsdp.py", 2)]
)
def test_the_folders_config_names_component_and_script(
    folder: Path, script: str, ranks: int
) -> None:
    done = torchx_run(folder, "--dryrun")
    assert done.returncode == 0, done.stderr
    assert script in done.stdout
    assert f"'--nproc_per_node={ranks}'" in done.stdout
    assert "'--master_port=29601'" in done.stdout


@pytest.mark.timeout(300)
def test_torchx_run_trains_two_groups_to_the_end(tmp_path: Path) -> None:
    with lighthouse(2, join_timeout_ms=10_000) as server:
        done = torchx_run(
            DILOCO,
            f"-cfg=log_dir={tmp_path},prepend_cwd=True",
            *(COMPONENT, "--", "--outer-steps=10"),
            TORCHFT_LIGHTHOUSE=server.address(),
        )
    assert done.returncode == 0, done.stderr
    logs = [said(tmp_path, group) for group in range(2)]
    for log in logs:
        assert "DiLoCo: Number of inner optimizer steps completed: 500" in log
        assert re.search(r"outer optimizer steps completed: \[5\] loss = \d+\.\d+", log)
    assert len({re.search(r"digest of .*: (\w+)", log).group(1) for log in logs}) == 1  # type: ignore[union-attr]


@pytest.mark.slow  # six starts of torch with FSDP2
@pytest.mark.timeout(300)
def test_a_killed_group_of_two_ranks_is_started_again_and_ends_with_equal_shards(
    tmp_path: Path,
) -> None:
    words = f"-cfg=log_dir={tmp_path},prepend_cwd=True", COMPONENT, "--", "--steps=300", PATIENCE
    with lighthouse(join_timeout_ms=10_000, heartbeat_timeout_ms=2000) as server:
        where = {"TORCHFT_LIGHTHOUSE": server.address()}
        running = ThreadPoolExecutor(1).submit(torchx_run, HSDP, *words, **where)
        until(lambda: "0, 2 of 2 groups" in said(tmp_path, 1), "both train", within_s=120)
        for worker in workers_of(group=1):
            worker.kill()
        done = running.result()
    assert done.returncode == 0, done.stderr
    healed = re.findall(r"step 0\] healed from group_0:\S+, now at step (\d+)", said(tmp_path, 1))
    assert int(healed[-1]) >= 20
    ends = [digests(said(tmp_path, group)) for group in range(2)]
    assert ends[0] == ends[1]
    assert len(set(ends[0])) == 2, "the shards of two ranks"


def said(logs: Path, group: int) -> str:
    """What a group's ranks have written so far, to both streams."""
    return "".join(log.read_text() for log in logs.rglob(f"replica_{group}/*/std*.log"))


def digests(log: str) -> list[str]:
    """Those at the end, by rank."""
    found: dict[str, str] = dict(re.findall(r"rank (\d): step \d+, digest of .*: (\w+)", log))
    return [digest for _, digest in sorted(found.items())]


def workers_of(*, group: int) -> list[Process]:
    """The processes below this one that run ranks of a group."""
    ours = {"REPLICA_GROUP_ID": str(group), "GROUP_RANK": "0"}.items()
    return [process for process in tree(os.getpid()) if ours <= process.environ().items()]
