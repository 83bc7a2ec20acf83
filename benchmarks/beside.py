"""This package beside another one of the import name torchft, in turns on one machine.

    python benchmarks/beside.py --other /path/to/other/bin/python

`--other` is the Python of an environment that has the other package, such as PyTorch's torchft from
the package index, and no checkout of this one. Everything is measured through names that both have:
each turn is a process of its own, this package and the other in turns, and the median is printed.
Two groups are two threads of a process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from harness import machine
from harness.group import manager_of
from harness.lighthouse import lighthouse as lighthouse_of
from harness.spread import repeat, timed
from harness.threads import at_once

ROOT = Path(__file__).parents[1]

FIGURES = {
    "import_cpu_s": "`import torchft`, with Manager and DistributedDataParallel, CPU s",
    "torch_cpu_s": "floor: `import torch` alone, CPU s",
    "lighthouse_cpu_s": "a lighthouse until it listens, CPU s",
    "lighthouse_mib": "its memory, MiB",
    "step_ms": "a step of one group without averages, median, ms",
    "allreduce_us": "an average of 1 MiB between two groups, minimum, µs",
    "heal_gb_s": "a heal of 256 MiB over HTTP, GB/s",
    "nan_commits": "an average with NaN in it is committed (1) or discarded (0)",
}


def main() -> None:
    arguments = command_line()
    if arguments.child:
        print(json.dumps(CHILDREN[arguments.child]()), flush=True)
        os._exit(0)
    sides = {"this": (sys.executable, str(ROOT)), "other": (arguments.other, "")}
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(arguments.turns):
        for side, (python, path) in sides.items():
            taken[side].append(one_turn(python, path))
    print(table({side: medians(turns) for side, turns in taken.items()}))


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--other", metavar="PYTHON", help="of the environment with the other one")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    typed = parser.parse_args()
    if not typed.child and not typed.other:
        parser.error("--other is needed: the Python of an environment with the other package")
    return typed


def one_turn(python: str, path: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RUST_LOG": "error"}
    figures: dict[str, float] = {}
    for child in CHILDREN:
        done = subprocess.run(
            [python, __file__, "--child", child],
            env=environment,
            cwd="/",
            check=True,
            timeout=300,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        figures |= json.loads(done.stdout.splitlines()[-1])
    return figures


def medians(turns: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(turn[name] for turn in turns) for name in FIGURES}


def table(sides: dict[str, dict[str, float]]) -> str:
    rows = ["| | this | other |", "| --- | --- | --- |"]
    for name, said in FIGURES.items():
        rows.append(f"| {said} | {sides['this'][name]:.3g} | {sides['other'][name]:.3g} |")
    return "\n".join(rows)


# ---------------------------------------------------------------- in a process of either side


def torch_alone() -> dict[str, float]:
    import torch  # noqa: F401

    return {"torch_cpu_s": time.process_time()}


def imports() -> dict[str, float]:
    from torchft import DistributedDataParallel, Manager  # noqa: F401

    return {"import_cpu_s": time.process_time()}


def lighthouse() -> dict[str, float]:
    """The command, until its port answers; its own CPU time and resident memory."""
    command = [str(Path(sys.executable).with_name("torchft_lighthouse"))]
    with lighthouse_of(min_replicas=1, command=command) as running:
        return {
            "lighthouse_cpu_s": machine.cpu_seconds(running.pid),
            "lighthouse_mib": machine.resident_mib(running.pid),
        }


def server_for(groups: int) -> Any:
    from torchft.coordination import LighthouseServer

    return LighthouseServer(bind="127.0.0.1:0", min_replicas=groups, join_timeout_ms=3000)


def steps() -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    server = server_for(1)
    with manager_of(0, lighthouse=server.address(), min_replicas=1) as manager:

        def step() -> None:
            manager.start_quorum()
            manager.should_commit()

        took = repeat(520, step)
    return {"step_ms": statistics.median(took[20:]) * 1e3}


def averages() -> dict[str, float]:
    """1 MiB of fp32 between two groups; then one of them sends NaN."""
    import torch

    torch.set_num_threads(1)
    server, found = server_for(2), {}

    def group(number: int) -> None:
        with manager_of(number, lighthouse=server.address(), min_replicas=2) as manager:

            def average(tensor: Any) -> None:
                manager.allreduce(tensor).wait()

            took = []
            for _ in range(220):
                tensor = torch.ones(2**18)
                manager.start_quorum()
                manager.wait_quorum()
                took.append(timed(partial(average, tensor)))
                manager.should_commit()
            manager.start_quorum()
            manager.allreduce(torch.full((4,), float("nan") if number else 1.0)).wait()
            found[number] = (min(took[20:]), manager.should_commit())

    at_once([partial(group, number) for number in (0, 1)])
    return {
        "allreduce_us": max(took for took, _ in found.values()) * 1e6,
        "nan_commits": float(all(committed for _, committed in found.values())),
    }


def heal() -> dict[str, float]:
    """256 MiB in 64 tensors by the transport that a manager uses, median of three."""
    from datetime import timedelta

    import torch

    from torchft.checkpointing import HTTPTransport

    state = {str(number): torch.ones(2**20) for number in range(64)}
    timeout = timedelta(seconds=60)
    transport = HTTPTransport(timeout=timeout, num_chunks=0)
    took = []
    for step in range(3):
        transport.send_checkpoint([1], step=step, state_dict=state, timeout=timeout)
        metadata = transport.metadata()
        fetch = partial(transport.recv_checkpoint, 0, metadata=metadata, step=step, timeout=timeout)
        took.append(timed(fetch))
        transport.disallow_checkpoint()
    return {"heal_gb_s": 64 * 2**22 / statistics.median(took) / 1e9}


CHILDREN = {
    "torch_alone": torch_alone,
    "imports": imports,
    "lighthouse": lighthouse,
    "steps": steps,
    "averages": averages,
    "heal": heal,
}


if __name__ == "__main__":
    main()
