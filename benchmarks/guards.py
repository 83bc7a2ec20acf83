"""What each of the guards against silent damage costs, beside the work it guards.

One row a guard: the work without it (*before*), with it (*after*), and what the guard adds, beside
the least that it could. The three take turns, so that all see the same machine; CPU seconds of one
thread, minima. A guard is a function of `GUARDS` that returns `Guard`.

    NaN        the average of gradients is divided by the number of groups; the guard says whether
               it is finite. Floor: one read of as many numbers
    fp32       what a node does in a round of DiLoCo (delta, outer step with momentum, new weights)
               with bf16 parameters, its shared state in bf16 and in fp32. Floor: fp32 made of as
               many bf16 numbers, and rounded once
    following  a look at which parameters are trained when a step begins, and one before its vote.
               Floor: one list(model.parameters()) of as many
    rounds     LocalSGD and DiLoCo look before each inner step whether the model still trains what
               it did: 288 parameters in 24 blocks. Before: nothing. Floor: a walk over them
    hooks      an SGD step over 4 small parameters after a backward pass, without and with the hooks
               that see it and the watch for steps that they do not see. Floor: torch's own hooks
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.spread import in_turns

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
    bytes_before: float | None = None
    """That it keeps, a parameter."""
    bytes_after: float | None = None

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
        *_memory(guard),
    ]


def _memory(guard: Guard) -> list[Figure]:
    if guard.bytes_before is None or guard.bytes_after is None:
        return []
    key, name = f"guards.{guard.key}.memory", f"{guard.name}: keeps"
    least = Floor("without", guard.bytes_before)
    return [Figure(key, name, guard.bytes_after, "bytes a parameter", least)]


def least_us(times: int, *acts: Act) -> list[float]:
    """The least CPU microseconds of each, `times` times in turns."""
    return [1e6 * min(seconds) for seconds in in_turns(times, acts, clock=time.process_time)]


def nan(options: Options) -> Guard:
    """Is the average of the gradients finite?"""
    import torch

    from torchft.finite import divide

    total = torch.randn(options.parameters)
    before, after, floor = least_us(
        options.times, lambda: total.div_(-1), lambda: divide(total, -1), total.sum
    )
    return Guard("nan", "NaN in the average of gradients", before, after, "one read", floor)


def shared_state(options: Options) -> Guard:
    """Is the shared state of half-precision parameters fp32?"""
    import torch

    half = torch.zeros(options.parameters, dtype=torch.bfloat16)
    bf16, bf16_bytes = _round_of(options, None)
    fp32, fp32_bytes = _round_of(options, torch.float32)
    before, after, floor = least_us(options.times, bf16, fp32, lambda: half.copy_(half.float()))
    name = "fp32 state of bf16 parameters in DiLoCo"
    kept = {"bytes_before": bf16_bytes, "bytes_after": fp32_bytes}
    return Guard("fp32", name, before, after, "made and rounded once", floor, **kept)


def _round_of(options: Options, shared: Any) -> tuple[Act, float]:
    """One node's round, and the bytes a parameter that its shared state takes."""
    import torch
    from torch import nn

    from torchft.strategies import Clock, DiLoCoRecipe, ModelLocal, OptimSpec

    model = nn.ParameterList([nn.Parameter(torch.zeros(options.parameters, dtype=torch.bfloat16))])
    outer = OptimSpec(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)
    recipe = DiLoCoRecipe(outer, 1, shared_dtype=shared)
    recipe.bind(ModelLocal([model]), Clock())
    whole = recipe.local.whole

    def act() -> None:
        sent, draft = recipe.contribution(whole)
        recipe.apply_locally(whole, recipe.apply(whole, sent), draft)
        recipe.local.release(sent, reusable=True)

    act()
    state = recipe.fragment_state(whole)
    tensors = [*state["original_parameters"].values()]
    tensors += [s["momentum_buffer"] for s in state["outer_optimizer"]["state"].values()]
    return act, sum(tensor.nbytes for tensor in tensors) / options.parameters


def following(options: Options) -> Guard:
    """Are the parameters the same that were averaged in the last step?"""
    from torch import nn

    from torchft.trained import TrainedParameters

    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 1, 8) for _ in range(24)))
    trained = TrainedParameters(model)
    before, after, floor = least_us(
        options.times,
        lambda: None,
        lambda: (trained.look(), trained.unseen()),
        lambda: list(model.parameters()),
    )
    name = "following 288 trained parameters"
    return Guard("following", name, before, after, "list(model.parameters())", floor)


def rounds(options: Options) -> Guard:
    """Does the model still train what it did?"""
    import torch
    from torch import nn

    from torchft.strategies.trained import TrainedModel

    def block() -> nn.Module:
        linears = {name: nn.Linear(4, 4) for name in ("q", "k", "v", "o")}
        norms = {name: nn.LayerNorm(4) for name in ("before", "after")}
        return nn.ModuleDict({**linears, **norms})

    model = nn.ModuleList([block() for _ in range(24)])
    trained = TrainedModel([model], torch.optim.SGD(model.parameters()), front="DiLoCo")
    before, after, floor = least_us(
        options.times,
        lambda: None,
        lambda: trained.check(frozen_steps=100),
        lambda: list(model.named_parameters()),
    )
    name = "following 288 parameters of LocalSGD or DiLoCo"
    return Guard("rounds", name, before, after, "a walk over them", floor)


def hooks(options: Options) -> Guard:
    """Is every step of the inner optimizer seen?"""
    from torchft.step_hooks import StepHooks

    plain, seen, torchs = _Steps(), _Steps(), _Steps()
    watching = StepHooks(seen.optimizer, before=lambda: None, after=lambda: None)
    watching.attach()
    torchs.optimizer.register_step_pre_hook(lambda *_: None)
    torchs.optimizer.register_step_post_hook(lambda *_: None)
    before, after, least = least_us(options.times, plain, seen, torchs)
    floor = max(0.1, least - before)
    return Guard("hooks", "seeing an inner step", before, after, "torch's hooks alone", floor)


class _Steps:
    """A backward pass and a step over a few small parameters."""

    def __init__(self) -> None:
        import torch
        from torch import nn

        self._weights = [nn.Parameter(torch.ones(3)) for _ in range(4)]
        self._loss = lambda: torch.stack(self._weights).sum()
        self.optimizer = torch.optim.SGD(self._weights, lr=0.0)

    def __call__(self) -> None:
        self._loss().backward()
        self.optimizer.step()


GUARDS: tuple[Callable[[Options], Guard], ...] = (nan, shared_state, following, rounds, hooks)
"""In the order of the table."""

QUICK = Options(parameters=1000, times=3)

if __name__ == "__main__":
    raise SystemExit(run("guards", __doc__, Options(), QUICK, measure))
