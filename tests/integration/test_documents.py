"""Every code block of the documents and the README: programs run, commands exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.documents import (
    KINDS,
    ROOT,
    Block,
    before_and_after,
    blocks_of,
    commands_in,
    documents,
    trouble_with,
)
from torch.distributed import TCPStore

from torchft.coordination import LighthouseServer

BLOCKS = [block for document in documents() for block in blocks_of(document)]

STEPS = {"STEPS": "30", "ROUNDS": "3"}
"""What the programs take from the environment, so that they end soon."""


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What `torchrun` and a lighthouse give a program: it is the only rank of the only group."""
    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=500)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    given = {
        "TORCHFT_LIGHTHOUSE": server.address(),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "RANK": "0",
        "WORLD_SIZE": "1",
        **STEPS,
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DILOCO_SERVER", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    yield
    server.shutdown()


def run(text: str, where: str, names: dict[str, Any]) -> None:
    exec(compile(text, where, "exec"), names)


def programs() -> list[Path]:
    kinds = {block.document for block in BLOCKS if block.kind in ("python", "diff")}
    return [ROOT / name for name in sorted(kinds)]


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("document", programs(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_programs_of_a_document_run_as_they_stand(document: Path) -> None:
    names: dict[str, Any] = {"__name__": "walk_through"}
    for block in blocks_of(document):
        if block.kind == "python":
            run(block.text, block.where, names)
        elif block.kind == "diff":
            for program in before_and_after(block.text):
                run(program, block.where, {"__name__": "walk_through"})


GUARDED = [path for path in programs() if 'if __name__ == "__main__":' in path.read_text()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("document", GUARDED, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_starts_processes_in_a_document_runs_from_a_file(
    document: Path, tmp_path: Path
) -> None:
    script = tmp_path / "program.py"
    script.write_text("\n".join(b.text for b in blocks_of(document) if b.kind == "python"))
    subprocess.run([sys.executable, script], check=True, timeout=500)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.kind == "sh"], ids=lambda block: block.where
)
def test_the_commands_of_a_document_can_be_typed(block: Block) -> None:
    assert [
        trouble for words in commands_in(block.text) if (trouble := trouble_with(words))
    ] == [], block.where


def test_each_block_says_what_it_is() -> None:
    assert [block.where for block in BLOCKS if block.kind not in KINDS] == []


def test_the_minimal_examples_import_public_names_only() -> None:
    for path in (ROOT / "examples").glob("minimal_*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 50, path
        froms = set(re.findall(r"^from (torchft[\w.]*) import", text, flags=re.MULTILINE))
        assert froms <= {"torchft", "torchft.local_sgd"}, path


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("name", ["minimal_ddp.py", "minimal_diloco.py"])
def test_a_minimal_example_trains_as_a_group_of_one(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["STEPS"] = "100"
    path = ROOT / "examples" / name
    run(path.read_text(), str(path), {"__name__": "__main__"})
    assert "loss" in capsys.readouterr().out
