"""Processes that are forked before they know what they will run."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from torchft.launch import prefork

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux only")

FORK = """
import signal, sys
from torchft.launch import prefork
prefork._agent = lambda arguments: print("ran", *arguments, flush=True)
first, second = prefork.fork_agents(2)
second.discard()
print("discarded", second.returncode)
first.run(["a", "b"], {"ONLY": "this"}, __import__("pathlib").Path(sys.argv[1]))
print("ended", first.wait(10))
(third,) = prefork.fork_agents(1)
third.send_signal(signal.SIGKILL)
print("killed", third.wait(10))
"""


def test_a_forked_process_takes_orders_once_and_one_without_any_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    # A process of its own: pytest's may have threads, which a fork must not have.
    done = subprocess.run(
        [sys.executable, "-c", FORK, str(log)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split("\n")[:3] == ["discarded 0", "ended 0", "killed -9"], done.stderr
    assert log.read_text() == "ran a b\n"


def test_a_process_with_threads_is_not_forked() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    try:
        assert not prefork.can_fork()
        with pytest.raises(RuntimeError, match="fork before they start"):
            prefork.fork_agents(1)
    finally:
        go.set()
        thread.join()
