"""The examples, started as their first lines say; one group is killed and started again."""

from __future__ import annotations

import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from torchft.coordination import LighthouseServer
from torchft.launch.group import Group
from torchft.launch.processes import tree
from torchft.retry import wait_until

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
DILOCO = ROOT / "examples" / "diloco" / "train_diloco.py"
DDP = ROOT / "examples" / "ddp" / "train_ddp.py"
HSDP = ROOT / "examples" / "hsdp" / "train_hsdp.py"

TORCHRUN_SETS = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}

MakeGroup = Callable[..., Group]


@dataclass(frozen=True)
class Done:
    returncode: int
    stderr: str


@pytest.fixture
def run_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Runs a script in this process, as far as it gets without another group."""
    before = signal.getsignal(signal.SIGTERM)

    def run(script: Path, *flags: str, **variables: str) -> Done:
        for name in (*TORCHRUN_SETS, "TORCHFT_LIGHTHOUSE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", [str(script), *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        code = end.value.code
        said = capsys.readouterr().err
        if isinstance(code, str):  # Python prints it and ends with 1
            return Done(1, f"{said}{code}\n")
        return Done(int(code or 0), said)

    yield run
    signal.signal(signal.SIGTERM, before)


RunAlone = Callable[..., Done]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def make_group(tmp_path: Path) -> Iterator[MakeGroup]:
    """Groups of two that share a lighthouse, each started by the documented torchrun line."""
    lighthouse = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=10_000, heartbeat_timeout_ms=2000
    )
    address = f"http://127.0.0.1:{lighthouse.address().rpartition(':')[2]}"
    made: list[Group] = []

    def make(number: int, script: Path, *flags: str) -> Group:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCHFT_LIGHTHOUSE": address,
            "REPLICA_GROUP_ID": str(number),
            "NUM_REPLICA_GROUPS": "2",
        }
        command = [
            *(sys.executable, "-m", "torch.distributed.run", f"--master_port={free_port()}"),
            *("--nnodes=1", "--nproc_per_node=1", str(script), *flags),
        ]
        made.append(Group(number, command, environment, tmp_path / f"group_{number}.log"))
        return made[-1]

    yield make
    for group in made:
        group.stop(grace_s=0)
    lighthouse.shutdown()


def wait_for_line(group: Group, pattern: str, *, within_s: float = 120) -> str:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        text = group.log.read_text() if group.log.exists() else ""
        if found := re.search(pattern, text):
            return found.group(0)
        assert group.alive, f"ended with {group.life.code} before {pattern!r}:\n{text}"
        time.sleep(0.05)
    raise TimeoutError(f"no {pattern!r} in\n{text}")


def wait_for_end(group: Group, *, within_s: float = 120) -> str:
    assert wait_until(lambda: group.poll() is not None, within_s), group.log.read_text()
    return group.log.read_text()


@pytest.mark.parametrize("script", [DILOCO, DDP, HSDP])
def test_without_torchrun_it_says_how_to_start_it(run_alone: RunAlone, script: Path) -> None:
    done = run_alone(script)
    assert done.returncode == 1
    assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set: start this" in done.stderr
    assert "torchrun --master_port=29600 --nnodes=1 --nproc_per_node=1" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_lighthouse_it_says_how_to_start_one(run_alone: RunAlone) -> None:
    done = run_alone(DILOCO, **TORCHRUN_SETS)
    assert done.returncode == 1
    assert "TORCHFT_LIGHTHOUSE is not set" in done.stderr
    assert "torchft_lighthouse --min_replicas 1" in done.stderr


def test_an_unreadable_corpus_is_named(run_alone: RunAlone, tmp_path: Path) -> None:
    missing = tmp_path / "absent.txt"
    lighthouse = {"TORCHFT_LIGHTHOUSE": "http://127.0.0.1:1"}
    done = run_alone(DILOCO, f"--corpus={missing}", **TORCHRUN_SETS, **lighthouse)
    assert done.returncode == 2
    assert f"cannot read {missing}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "flag"), [(DDP, "--steps"), (DILOCO, "--outer-steps"), (DILOCO, "--sync-every")]
)
def test_a_number_that_trains_nothing_is_refused(
    run_alone: RunAlone, script: Path, flag: str
) -> None:
    done = run_alone(script, f"{flag}=-3")
    assert done.returncode == 2
    assert f"argument {flag}: -3: it must be an integer, at least 1" in done.stderr


@pytest.mark.parametrize("script", [DILOCO, DDP])
def test_a_group_that_there_is_not_is_refused(run_alone: RunAlone, script: Path) -> None:
    lighthouse = {"TORCHFT_LIGHTHOUSE": "http://127.0.0.1:1"}
    done = run_alone(script, **TORCHRUN_SETS, **lighthouse, REPLICA_GROUP_ID="2")
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script.name}: REPLICA_GROUP_ID=2: with NUM_REPLICA_GROUPS=2")
    assert done.stderr.count("\n") == 1


def test_two_shells_of_diloco_one_killed_and_started_again(make_group: MakeGroup) -> None:
    flags = ("--sync-every=20", "--outer-steps=100")
    groups = [make_group(number, DILOCO, *flags) for number in range(2)]
    for group in groups:
        group.start()
    for group in groups:
        # The later one heals from the earlier, which may have gone on alone meanwhile.
        wait_for_line(group, r"outer optimizer steps completed: \[([3-9]|\d\d)\] loss = \d+\.\d+")
    groups[1].kill()
    groups[1].log.unlink()
    groups[1].start()
    wait_for_line(groups[1], r"Number of inner optimizer steps completed: 20\n")
    done = int(wait_for_line(groups[1], r"(?<=completed: \[)\d+"))
    assert done > 3, "it went on from where the other was"
    assert re.search(r"step 0\] healed from group_0:\S+, now at step", groups[1].log.read_text())
    ends = [wait_for_end(group) for group in groups]
    digests = {re.search(r"digest of .*: (\w+)", end).group(1) for end in ends}  # type: ignore[union-attr]
    assert len(digests) == 1
    assert [group.life.code for group in groups] == [0, 0]


def test_two_shells_of_ddp(make_group: MakeGroup) -> None:
    groups = [make_group(number, DDP, "--steps=60") for number in range(2)]
    for group in groups:
        group.start()
    ends = [wait_for_end(group) for group in groups]
    assert re.search(r"DDP: step 60, [12] of 2 groups", "".join(ends))
    for end in ends:
        assert re.search(r"quorum \d+: group_0, group_1\b", end)
    digests = {re.search(r"digest of .*: (\w+)", end).group(1) for end in ends}  # type: ignore[union-attr]
    assert len(digests) == 1


def test_who_is_alone_says_so_at_both_ends(make_group: MakeGroup) -> None:
    group = make_group(0, DDP, "--steps=20", "--finish-together-s=0")
    group.start()
    said = wait_for_end(group)
    assert group.life.code == 0
    assert "DDP: starts afresh from step 0, alone" in said
    assert "DDP: ends at step 20 without 1 of 2 groups" in said


def test_sigterm_while_it_waits_for_others_ends_it_cleanly(make_group: MakeGroup) -> None:
    group = make_group(0, DILOCO, "--sync-every=20", "--outer-steps=100000")
    group.start()
    wait_for_line(group, r"outer optimizer steps completed: \[1\]")
    _, worker = tree(group.life.pid)
    group.ask_to_stop()
    said = wait_for_end(group, within_s=20)
    assert not worker.is_running()
    assert group.life.code not in (0, -signal.SIGKILL)
    assert "terminate called" not in said
    assert "panicked" not in said
