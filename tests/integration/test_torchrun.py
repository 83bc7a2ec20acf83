"""A replica group that is started by torchrun, in the ways in which people start it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.coordination import free_port, lighthouse
from helpers.torchrun import Torchrun

TRAINS = """
from datetime import timedelta
import os
import torch
from torchft import Manager, ProcessGroupGloo
w = torch.zeros(3)
manager = Manager(pg=ProcessGroupGloo(timeout=timedelta(seconds=30)), min_replica_size=1,
                  load_state_dict=lambda s: w.copy_(s["w"]), state_dict=lambda: {"w": w},
                  timeout=timedelta(seconds=30), replica_id="group_0", hostname="127.0.0.1")
for _ in range(2):
    manager.start_quorum()
    manager.allreduce(w.add_(1)).wait()
    assert manager.should_commit()
print("committed", manager.current_step(), "on rank", os.environ["RANK"], flush=True)
manager.shutdown()
"""


def torchrun(folder: Path, *flags: str, ranks: int, **env: str) -> list[str]:
    """Run the script above; the lines that its workers print, sorted."""
    script = folder / "train.py"
    script.write_text(TRAINS)
    with lighthouse() as server:
        env = {**os.environ, "TORCHFT_LIGHTHOUSE": server.address(), **env}
        run = Torchrun([*flags, f"--nproc-per-node={ranks}", str(script)], env, folder)
        code, said, errors = run.end(within_s=110)
    assert code == 0, errors[-3000:]
    return sorted(line for line in said.splitlines() if "committed" in line)


def test_standalone(tmp_path: Path) -> None:
    assert torchrun(tmp_path, "--standalone", ranks=1) == ["committed 2 on rank 0"]


@pytest.mark.slow
def test_standalone_whose_agent_shares_no_store(tmp_path: Path) -> None:
    found = torchrun(tmp_path, "--standalone", ranks=2, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert found == [f"committed 2 on rank {rank}" for rank in range(2)]


@pytest.mark.slow
def test_a_rendezvous_of_c10d(tmp_path: Path) -> None:
    where = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    found = torchrun(tmp_path, "--rdzv-backend=c10d", where, "--rdzv-id=one", ranks=2)
    assert found == [f"committed 2 on rank {rank}" for rank in range(2)]
