"""What `manager.allreduce` adds to the all-reduce under it.

Two groups of one rank, and in the same two processes torch's own gloo group. The two take turns on
tensors of the same size, each after a barrier of a third group, so that both see the same machine
and neither finds its threads awake from the barrier. The floor is torch's all-reduce. The manager's
also divides, a pass over memory that has just been written by another core, which any average
needs: the second figure of a small size has a floor that divides too, as that of large ones has.

Small tensors are compared by their minimum, which is the work itself; large ones by their median.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.group import both_groups, manager_of, meet
from harness.lighthouse import lighthouse
from harness.spread import Spread, in_turns, timed

if TYPE_CHECKING:
    from torch import Tensor

    from torchft import Manager

GROUPS = 2
WARM_UP = 3
LARGE = 16 << 20
"""Bytes from which the floor divides and medians are compared."""
IN_FLIGHT_BYTES = 4096

Act = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """How much data, in what pieces."""

    sizes: tuple[int, ...] = option((4096, 1 << 20, 64 << 20), "bytes of one tensor, of float32")
    total_mib: int = option(640, "data of each size: limits how often, to at most 300 times")
    in_flight: int = option(100, f"tensors of {IN_FLIGHT_BYTES} bytes under way together")
    timeout_s: float = option(180.0, "when a run counts as stuck")


def measure(options: Options) -> Findings:
    """What the first of the two groups saw."""
    with lighthouse(min_replicas=GROUPS) as running:
        sizes, in_flight = both_groups(
            _worker, timeout_s=options.timeout_s, address=running.address, options=options
        )
    figures = [figure for size in sizes for figure in _figures(size)]
    figures.append(_in_flight_figure(in_flight))
    details = {"sizes": [asdict(size) for size in sizes], "in_flight": asdict(in_flight)}
    return Findings(figures, details)


@dataclass(frozen=True)
class Size:
    """Microseconds of one all-reduce."""

    bytes: int
    raw_us: Spread
    raw_and_division_us: Spread
    manager_us: Spread


@dataclass(frozen=True)
class InFlight:
    """Microseconds of each of many that are under way together."""

    tensors: int
    raw_us: Spread
    manager_us: Spread


def _figures(size: Size) -> list[Figure]:
    key, name = f"allreduce.{size.bytes}", f"all-reduce of {_size(size.bytes)}"
    if size.bytes >= LARGE:
        floor = Floor("raw gloo and division", size.raw_and_division_us.p50)
        return [Figure(key, f"{name}, median", size.manager_us.p50, "µs", floor)]
    name, figure = f"{name}, minimum", size.manager_us.min
    divided = Floor("raw gloo and division", size.raw_and_division_us.min)
    return [
        Figure(key, name, figure, "µs", Floor("raw gloo", size.raw_us.min)),
        Figure(f"{key}.divided", name, figure, "µs", divided),
    ]


def _in_flight_figure(many: InFlight) -> Figure:
    name = f"each of {many.tensors} all-reduces of {_size(IN_FLIGHT_BYTES)} in flight, median"
    floor = Floor("raw gloo", many.raw_us.p50)
    return Figure("allreduce.in_flight", name, many.manager_us.p50, "µs", floor)


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


# ---------------------------------------------------------------------- in the workers


def _worker(
    line: Connection, *, group: int, port: int | None, address: str, options: Options
) -> tuple[list[Size], InFlight]:
    barrier = meet(line, group, port)
    with manager_of(group, lighthouse=address, min_replicas=GROUPS, init_sync=False) as manager:
        manager.start_quorum()
        sizes = [_one_size(manager, barrier, size, _times(size, options)) for size in options.sizes]
        in_flight = _in_flight(manager, barrier, options.in_flight)
        if not manager.should_commit():
            raise RuntimeError(f"the step was discarded: {manager.errored()}")
        barrier()
    return sizes, in_flight


def _times(size: int, options: Options) -> int:
    return min(300, max(4, (options.total_mib << 20) // size))


def _one_size(manager: Manager, barrier: Act, size: int, times: int) -> Size:
    import torch
    import torch.distributed as dist

    tensor = torch.empty(size // 4)

    def raw() -> None:
        dist.all_reduce(tensor)

    def raw_and_division() -> None:
        dist.all_reduce(tensor)
        tensor.div_(GROUPS)

    def managed() -> None:
        manager.allreduce(tensor).wait()

    def of_ones() -> None:
        tensor.fill_(1)
        barrier()

    found = in_turns(WARM_UP + times, (raw, raw_and_division, managed), before=of_ones)
    if not (tensor == 1).all():
        raise RuntimeError("the average of ones is not one")
    return Size(size, *(Spread.of(times_s[WARM_UP:], scale=1e6) for times_s in found))


def _in_flight(manager: Manager, barrier: Act, count: int, times: int = 10) -> InFlight:
    import torch
    import torch.distributed as dist

    tensors = [torch.ones(IN_FLIGHT_BYTES // 4) for _ in range(count)]

    def raw(tensor: Tensor) -> Any:
        return dist.all_reduce(tensor, async_op=True)

    def round_of(begin: Callable[[Tensor], Any]) -> float:
        for tensor in tensors:
            tensor.fill_(1)
        barrier()
        return timed(lambda: [work.wait() for work in [begin(one) for one in tensors]])

    both = [(round_of(raw), round_of(manager.allreduce)) for _ in range(WARM_UP + times)]
    raw_s, manager_s = zip(*both[WARM_UP:], strict=True)
    scale = 1e6 / count
    return InFlight(count, Spread.of(raw_s, scale=scale), Spread.of(manager_s, scale=scale))


QUICK = Options(sizes=(4096,), total_mib=1, in_flight=2)

if __name__ == "__main__":
    raise SystemExit(run("allreduce_overhead", __doc__, Options(), QUICK, measure))
