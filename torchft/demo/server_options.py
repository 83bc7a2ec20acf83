"""What can be asked of a demo of the parameter server, and the processes that it means."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchft import settings
from torchft.launch.group import Group

__all__ = ["ServerDemoOptions", "free_port"]

DILOCO = [sys.executable, "-m", "torchft.cli.diloco_agent"]


@dataclass(frozen=True, kw_only=True)
class ServerDemoOptions:
    """What was asked for on the command line of `demo-server`."""

    folder: Path
    """New or empty; all files of the run."""
    train: Sequence[str] = (sys.executable, "-m", "torchft.demo.server_train")
    """The workers' command. It is given `--num-shards`, `--shard-index`, `--output-dir` and
    `--end-file`, and leaves a log and a result in the output folder: see `server_train`."""
    sync_every: int = 10
    codec: str = "bf16"
    grace_s: float = 3.0
    """Silence after which the server does not wait for a worker."""
    timeout_s: float = 900.0
    """A run that is not over by then is given up."""

    @property
    def output(self) -> Path:
        """The output folder of the parameter server."""
        return self.folder / "server"

    @property
    def tokens(self) -> Path:
        """The file of tokens that the server's first start writes."""
        return self.folder / "tokens.json"

    @property
    def end_file(self) -> Path:
        """Appears when the workers are to end."""
        return self.folder / "end"

    def output_of(self, worker: str) -> Path:
        """The output folder of the worker of that name."""
        return self.folder / f"worker_{worker}"

    def server(self, port: int) -> Group:
        """The server's process, which is not started yet."""
        flags = [
            *("-o", str(self.output), "-n", "2", "--port", str(port), "--save-every", "5"),
            *("--grace", str(self.grace_s), "--auth-token-file", str(self.tokens)),
        ]
        return self._process(0, "server", [*DILOCO, "server", *flags])

    def worker(self, number: int, name: str, port: int) -> Group:
        """Not started yet; each has a shard of its own."""
        flags = [
            *("--server", f"127.0.0.1:{port}", "--worker-id", name, "--codec", self.codec),
            *("--sync-every", str(self.sync_every), "--auth-token-file", str(self.tokens)),
        ]
        of_the_script = [
            *("--num-shards", "3", "--shard-index", str(number)),
            *("--output-dir", str(self.output_of(name)), "--end-file", str(self.end_file)),
        ]
        command = [*DILOCO, "worker", *flags, "--", *self.train, *of_the_script]
        return self._process(1 + number, f"worker_{name}", command)

    def _process(self, number: int, name: str, command: Sequence[str]) -> Group:
        own = [variable for variable in os.environ if variable.startswith("DILOCO_")]
        environment = settings.for_child(
            **dict.fromkeys(own),
            OMP_NUM_THREADS="1",
            PYTHONUNBUFFERED="1",
            CUDA_VISIBLE_DEVICES="",  # the model is too small to gain from a device
        )
        return Group(number, command, environment, self.folder / f"{name}.log")


def free_port() -> int:
    """Free just now: the server is to come back to where it was."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
