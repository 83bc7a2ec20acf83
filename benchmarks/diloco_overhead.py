"""What DiLoCo's outer step costs: beside the bare all-reduce and outer step, and in memory.

Two groups of one rank synchronise after every inner step, which has nothing to do here, so all that
is timed is the outer step. In the same processes, in turns with it, torch's own gloo group reduces
as many bytes, and an optimizer of the same kind steps the same parameters: the floor. Memory is the
peak of the process above what it had with model and gradients, in units of the model. It has three
things at least: the backup, the outer momentum, and what travels: of one fragment, or of several
in flight, whose transfers then run beside the outer steps of others.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.group import both_groups, manager_of, meet
from harness.lighthouse import lighthouse
from harness.machine import forget_peak, peak_mib
from harness.spread import Spread, in_turns

GROUPS = 2
CASES = (1, 1), (4, 1), (4, 3)
"""Fragments, and how many rounds are open at a time."""
WARM_UP = 2

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
    in_flight: int
    raw_ms: Spread
    outer_ms: Spread
    diloco_ms: Spread
    model_mib: float
    peak_mib: float


def measure(options: Options) -> Findings:
    """What the first of the two groups saw."""
    found = _found(options)
    figures = []
    for one in found:
        floor = Floor("raw gloo and bare outer step", one.raw_ms.p50 + one.outer_ms.p50)
        name = f"DiLoCo, all of {one.fragments} fragments"
        key = f"diloco.{one.fragments}"
        if one.in_flight > 1:
            name, key = f"{name}, {one.in_flight} in flight", f"{key}.flight"
        figures.append(Figure(key, f"{name}, median", one.diloco_ms.p50, "ms", floor))
        figures.append(
            Figure(
                f"{key}.memory",
                f"{name}, peak above the plain loop",
                one.peak_mib,
                "MiB",
                Floor("the model", one.model_mib),
            )
        )
    return Findings(figures, {"cases": [asdict(one) for one in found]})


def _found(options: Options) -> list[Found]:
    with ExitStack() as stack:
        # One for each case: it would wait for the managers of the case before.
        at = [stack.enter_context(lighthouse(min_replicas=GROUPS)).address for _ in CASES]
        found: list[Found] = both_groups(
            _worker, timeout_s=options.timeout_s, addresses=at, options=options
        )
        return found


# ---------------------------------------------------------------------- in the workers


def _worker(
    line: Connection,
    *,
    group: int,
    port: int | None,
    addresses: list[str],
    options: Options,
) -> list[Found]:
    import torch
    from torch import nn

    barrier = meet(line, group, port)
    layers = [nn.Linear(options.side, options.side, bias=False) for _ in range(options.layers)]
    model = nn.Sequential(*layers)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3 * (group + 1))
    size = sum(p.numel() for p in model.parameters())
    _in_turns(lambda: None, model, size, barrier, 1)  # a plain loop has an optimizer and gloo
    return [
        _case(options, *case, group, address, model, size, barrier)
        for case, address in zip(CASES, addresses, strict=True)
    ]


def _case(
    options: Options,
    fragments: int,
    in_flight: int,
    group: int,
    address: str,
    model: Any,
    size: int,
    barrier: Act,
) -> Found:
    with (
        manager_of(
            group, lighthouse=address, min_replicas=GROUPS, init_sync=False, use_async_quorum=False
        ) as manager,
        ExitStack() as entered,
    ):
        for p in model.parameters():
            p.data.fill_(1.0)  # without a first heal, groups start from equal weights
        before = forget_peak()
        synchronise = _diloco(manager, model, fragments, in_flight - 1, entered)
        for _ in range(WARM_UP):
            synchronise()
        peak = peak_mib(os.getpid()) - before
        spreads = _in_turns(synchronise, model, size, barrier, options.times)
        entered.close()
        if manager.current_step() != (WARM_UP + options.times) * fragments:
            raise RuntimeError(f"a step was discarded: {manager.errored()}")
    return Found(fragments, in_flight, *spreads, size * 4 / 2**20, peak)


def _outer(parameters: Any) -> Any:
    import torch

    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def _in_turns(
    synchronise: Act, model: Any, size: int, barrier: Act, times: int
) -> tuple[Spread, Spread, Spread]:
    """Milliseconds of the bare all-reduce, of the bare outer step, and of DiLoCo."""
    import torch
    import torch.distributed as dist

    flat, bare = torch.zeros(size), _outer(model.parameters())
    dist.all_reduce(flat)
    bare.step()
    acts: list[Act] = [partial(dist.all_reduce, flat), bare.step, synchronise]
    took_s = in_turns(times, acts, before=barrier)
    raw, outer, diloco = (Spread.of(seconds, scale=1e3) for seconds in took_s)
    return raw, outer, diloco


def _diloco(manager: Any, model: Any, fragments: int, delay: int, entered: ExitStack) -> Act:
    """Synchronises every fragment once."""
    import torch
    from torch import nn

    from torchft.local_sgd import DiLoCo

    layers = list(model)
    each = len(layers) // fragments
    parts = [nn.Sequential(*layers[at * each : (at + 1) * each]) for at in range(fragments)]
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)  # without gradients it steps nothing
    outers: list[torch.optim.Optimizer] = [_outer(part.parameters()) for part in parts]
    entered.enter_context(
        DiLoCo(manager, [*parts], inner, outers, fragments, fragment_sync_delay=delay)
    )
    return lambda: [inner.step() for _ in range(fragments)]


QUICK = Options(side=32, layers=4, times=1)

if __name__ == "__main__":
    raise SystemExit(run("diloco_overhead", __doc__, Options(), QUICK, measure))
