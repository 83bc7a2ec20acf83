"""What DiLoCo's outer step costs: beside the bare all-reduce and outer step, and in memory.

Two groups of one rank synchronise after every inner step, which has nothing to do here, so all that
is timed is the outer step. In the same processes, in turns with it, torch's own gloo group reduces
as many bytes, and an optimizer of the same kind steps the same parameters: the floor. Memory is the
peak of the process above what it had with model and gradients, in units of the model. It has three
things at least: the backup, the outer momentum, and of one fragment what travels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.group import manager_of
from harness.lighthouse import lighthouse
from harness.machine import forget_peak, peak_mib
from harness.spread import Spread, timed
from harness.workers import Worker, results

GROUPS = 2
WARM_UP = 1

Act = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """How large, how often."""

    side: int = option(2041, "each layer is a matrix of side x side float32")
    layers: int = option(12, "matrices")
    times: int = option(5, "outer steps of the whole model")
    timeout_s: float = option(180.0, "when a run counts as stuck")


@dataclass(frozen=True)
class Found:
    """One group's view of one number of fragments."""

    fragments: int
    raw_ms: Spread
    outer_ms: Spread
    diloco_ms: Spread
    model_mib: float
    peak_mib: float


def measure(options: Options) -> Findings:
    """What the first of the two groups saw."""
    found = [_case(options, fragments) for fragments in (1, 4)]
    figures = []
    for one in found:
        floor = Floor("raw gloo and bare outer step", one.raw_ms.p50 + one.outer_ms.p50)
        name = f"DiLoCo, all of {one.fragments} fragments"
        figures.append(
            Figure(f"diloco.{one.fragments}", f"{name}, median", one.diloco_ms.p50, "ms", floor)
        )
        figures.append(
            Figure(
                f"diloco.{one.fragments}.memory",
                f"{name}, peak above the plain loop",
                one.peak_mib,
                "MiB",
                Floor("the model", one.model_mib),
            )
        )
    return Findings(figures, {"cases": [asdict(one) for one in found]})


def _case(options: Options, fragments: int) -> Found:
    with ExitStack() as stack:
        address = stack.enter_context(lighthouse(min_replicas=GROUPS)).address
        common = {"address": address, "options": options, "fragments": fragments}
        workers = [stack.enter_context(Worker(_worker, group=0, **common))]
        (port,) = workers[0].events(options.timeout_s)
        workers.append(stack.enter_context(Worker(_worker, group=1, port=port, **common)))
        return results(workers, timeout_s=options.timeout_s)[0]


# ---------------------------------------------------------------------- in the workers


def _worker(
    line: Connection,
    *,
    group: int,
    address: str,
    options: Options,
    fragments: int,
    port: int | None = None,
) -> Found:
    import torch
    import torch.distributed as dist
    from torch import nn

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port or 0, is_master=port is None, wait_for_workers=False)
    if port is None:
        line.send(store.port)
    dist.init_process_group("gloo", store=store, rank=group, world_size=GROUPS)
    barrier = partial(dist.barrier, dist.new_group(backend="gloo"))
    layers = [nn.Linear(options.side, options.side, bias=False) for _ in range(options.layers)]
    model = nn.Sequential(*layers)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3 * (group + 1))
    size = sum(p.numel() for p in model.parameters())
    raw_ms, outer_ms = _floors(model, size, barrier, options.times)
    with manager_of(
        group, lighthouse=address, min_replicas=GROUPS, init_sync=False, use_async_quorum=False
    ) as manager:
        before = forget_peak()
        diloco_ms = _outer_steps(manager, model, fragments, barrier, options.times)
        peak = peak_mib(os.getpid()) - before
    return Found(fragments, raw_ms, outer_ms, diloco_ms, size * 4 / 2**20, peak)


def _outer(parameters: Any) -> Any:
    import torch

    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def _floors(model: Any, size: int, barrier: Act, times: int) -> tuple[Spread, Spread]:
    import torch
    import torch.distributed as dist

    flat, bare = torch.zeros(size), _outer(model.parameters())
    raw_s, outer_s = [], []
    for _ in range(WARM_UP + times):
        barrier()
        raw_s.append(timed(lambda: dist.all_reduce(flat)))
        outer_s.append(timed(bare.step))
    return tuple(Spread.of(s[WARM_UP:], scale=1e3) for s in (raw_s, outer_s))  # type: ignore[return-value]


def _outer_steps(manager: Any, model: Any, fragments: int, barrier: Act, times: int) -> Spread:
    """Milliseconds in which every fragment has synchronised once."""
    import torch
    from torch import nn

    from torchft.local_sgd import DiLoCo

    layers = list(model)
    each = len(layers) // fragments
    parts = [nn.Sequential(*layers[at * each : (at + 1) * each]) for at in range(fragments)]
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    outers: list[torch.optim.Optimizer] = [_outer(part.parameters()) for part in parts]
    found = []
    warnings.simplefilter("ignore")  # the inner optimizer steps nothing of the model, on purpose
    with DiLoCo(manager, [*parts], inner, outers, sync_every=fragments):
        for _ in range(WARM_UP + times):
            barrier()
            found.append(timed(lambda: [inner.step() for _ in range(fragments)]))
    if manager.current_step() != (WARM_UP + times) * fragments:
        raise RuntimeError(f"a step was discarded: {manager.errored()}")
    return Spread.of(found[WARM_UP:], scale=1e3)


QUICK = Options(side=32, layers=4, times=1)

if __name__ == "__main__":
    raise SystemExit(run("diloco_overhead", __doc__, Options(), QUICK, measure))
