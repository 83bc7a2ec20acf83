"""The HSDP example without torchrun, whose ranks would import torch: here they are forked."""

from __future__ import annotations

import io
import os
import re
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from sharded import RANKS
from world import Group, World

SCRIPT = Path(__file__).parents[2] / "examples" / "hsdp" / "train_hsdp.py"


def test_two_groups_of_two_ranks_end_with_equal_shards(tmp_path: Path) -> None:
    def story(group: Group) -> str:
        os.environ |= {
            "RANK": str(group.rank),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(group._store.port),
            "REPLICA_GROUP_ID": str(group.number),
            "NUM_REPLICA_GROUPS": "2",
            "TORCHFT_LIGHTHOUSE": group.world.wait("lighthouse"),
        }
        sys.argv = [str(SCRIPT), "--steps=20"]
        said = io.StringIO()
        with redirect_stdout(said), pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return said.getvalue()

    said = World(tmp_path, min_replicas=2).run(story, story, ranks=RANKS)
    assert all("step 20, 2 of 2 groups, loss" in one for one in said)
    ends = [re.search(r"step 20, digest of .*: (\w+)", one).group(1) for one in said]  # type: ignore[union-attr]
    assert ends[:RANKS] == ends[RANKS:]
    assert ends[0] != ends[1]
