"""What each of the guards against silent damage costs, beside the work it guards.

One row a guard: the work without it (*before*), with it (*after*), and what the guard adds, beside
the least that it could. The three take turns, so that all see the same machine; CPU seconds of one
thread, minima. A guard is a function of `GUARDS` that returns `Guard`.

    NaN        the average of gradients is divided by the number of groups; the guard says whether
               it is finite. Floor: one read of as many numbers
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from harness.cli import Findings, option, run
from harness.figures import Figure, Floor

STEP_MS = 100.0
"""A step that a guard may take a hundredth of."""

Act = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """How much work."""

    parameters: int = option(1_000_000, "of the model, fp32")
    times: int = option(200, "how often each is timed")


@dataclass(frozen=True)
class Guard:
    """CPU microseconds."""

    key: str
    name: str
    before_us: float
    after_us: float
    floor: str
    """What the least is that it could add."""
    floor_us: float

    @property
    def adds_us(self) -> float:
        """What it costs."""
        return max(0.0, self.after_us - self.before_us)


def measure(options: Options) -> Findings:
    """Each guard by itself."""
    import torch

    torch.set_num_threads(1)
    guards = [guard(options) for guard in GUARDS]
    figures = [figure for guard in guards for figure in _figures(guard)]
    return Findings(figures, {"guards": [asdict(guard) for guard in guards]})


def _figures(guard: Guard) -> list[Figure]:
    share = 100 * guard.adds_us / 1000 / STEP_MS
    return [
        Figure(f"guards.{guard.key}.before", f"{guard.name}: before", guard.before_us, "CPU µs"),
        Figure(f"guards.{guard.key}.after", f"{guard.name}: after", guard.after_us, "CPU µs"),
        Figure(
            f"guards.{guard.key}",
            f"{guard.name}: adds",
            guard.adds_us,
            "CPU µs",
            Floor(guard.floor, guard.floor_us),
        ),
        Figure(f"guards.{guard.key}.share", f"{guard.name}: of a step of 100 ms", share, "%"),
    ]


def in_turns(times: int, *acts: Act) -> list[float]:
    """The least CPU microseconds of each, `times` times in turns."""
    found: list[list[float]] = [[] for _ in acts]
    for _ in range(times):
        for seen, act in zip(found, acts, strict=True):
            began = time.process_time_ns()
            act()
            seen.append((time.process_time_ns() - began) / 1e3)
    return [min(seen) for seen in found]


def nan(options: Options) -> Guard:
    """Is the average of the gradients finite?"""
    import torch

    from torchft.finite import divide

    total = torch.randn(options.parameters)
    before, after, floor = in_turns(
        options.times, lambda: total.div_(-1), lambda: divide(total, -1), total.sum
    )
    return Guard("nan", "NaN in the average of gradients", before, after, "one read", floor)


GUARDS: tuple[Callable[[Options], Guard], ...] = (nan,)
"""In the order of the table."""

QUICK = Options(parameters=1000, times=3)

if __name__ == "__main__":
    raise SystemExit(run("guards", __doc__, Options(), QUICK, measure))
