"""Whether an optimizer looks at more than one number at a time: tried out, not looked up in a list.

Two questions, each answered by stepping small tensors for a while:

    couples_nodes   do the tensors of one node end with other bits when those of a second node are
                    in the same optimizer? (a norm over all tensors, a learned step size, Muon's
                    or LARS's scalars kept for all)
    sees_shapes     do tensors end elsewhere when they are given as one flat tensor? (Adafactor's
                    rows and columns, Muon's matrices, LARS's norm of each tensor)

Gradients go through many decades, so that what begins at a threshold, such as a clipped norm,
begins here too. An optimizer that cannot be stepped like this is answered with True, which is the
careful answer: an optimizer for each node, and tensors in their own shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchft.errors import SettingsError

__all__ = ["Maker", "check_steps", "couples_nodes", "sees_shapes"]

Maker = Callable[[list[nn.Parameter]], Optimizer]

_SHAPES = ((5, 7), (6,), (3, 2, 2))
_SIZES = [35, 6, 12]
_SCALES = (1e-3, 1.0, 0.1, 1e-6, 10.0, 1e3, 1e-2, 1e5)
"""Of the gradients, step by step, again and again."""
_STEPS = 3 * len(_SCALES)
_NODES = (1.0, 1e4, 0.0)
"""Three nodes' gradients, in terms of one another."""
_TOLERANCE = 1e-9
"""Of numbers in float64, where an order of summation costs 1e-15 and another algorithm 1e-6."""


def check_steps(what: str, make: Maker, device: torch.device) -> None:
    """An optimizer of `make` can step with a dense gradient, and without a closure. Whoever makes
    them for the tensors of one model alone is not tried out.

    Raises:
        SettingsError: it cannot, for the reason that it gives; `what` says whose it is.
    """
    parameter = nn.Parameter(torch.ones(2, 2, dtype=torch.float32, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = make([parameter])
    except SettingsError as error:
        if isinstance(error.__cause__, TypeError):
            raise  # an argument of a wrong type, whatever the parameters
        return
    except Exception:  # said where it is made
        return
    try:
        optimizer.step()
    except Exception as error:
        raise SettingsError(
            f"{what} {type(optimizer).__name__} cannot step: {error}. A strategy has one dense "
            "gradient for each parameter, and no loss to compute again"
        ) from error


def couples_nodes(make: Maker, device: torch.device) -> bool:
    """Whether `make` gives optimizers in which one node's tensors depend on another's, bit by bit.
    Also if hyperparameters changed while it stepped: they would be all nodes'."""
    try:
        alone = [_run(make, [node], device)[0] for node in range(len(_NODES))]
        together = _run(make, range(len(_NODES)), device)
    except Exception:  # whatever an optimizer says of tensors like these
        return True
    return not all(map(torch.equal, alone, together))


def sees_shapes(make: Maker) -> bool:
    """Whether an optimizer of `make` moves a flat tensor otherwise than the same numbers in the
    shapes of parameters."""
    try:
        shaped, flat = _run_outer(make, flat=False), _run_outer(make, flat=True)
    except Exception:  # whatever an optimizer says of tensors like these
        return True
    return not torch.allclose(shaped, flat, rtol=_TOLERANCE, atol=0.0)


def _run(make: Maker, nodes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Each node's path, `[steps, numbers]`, with one optimizer for all of `nodes`."""
    parameters = [[_parameter(t, device) for t in _cut(_drawn(node))] for node in nodes]
    optimizer = make([p for mine in parameters for p in mine])
    options, paths = _options(optimizer), []
    for step in range(_STEPS):
        for node, mine in zip(nodes, parameters, strict=True):
            gradient = _drawn(node, step + 1) * (_SCALES[step % len(_SCALES)] * _NODES[node])
            for p, part in zip(mine, _cut(gradient), strict=True):
                p.grad = part.to(device)
        optimizer.step()
        paths.append([_joined(mine) for mine in parameters])
    if _options(optimizer) != options:
        raise ValueError("it changes its own hyperparameters")
    return [torch.stack(path) for path in zip(*paths, strict=True)]


def _run_outer(make: Maker, *, flat: bool) -> Tensor:
    """The path of the same numbers, `[steps, numbers]`, in one tensor `[1, n]` or in several."""
    parameters = [nn.Parameter(t.clone()) for t in _outer_parts(_drawn(0), flat=flat)]
    optimizer, path = make(parameters), []
    for step in range(_STEPS):
        gradient = _drawn(0, step + 1) * _SCALES[step % len(_SCALES)]
        for p, part in zip(parameters, _outer_parts(gradient, flat=flat), strict=True):
            p.grad = part.clone()
        optimizer.step()
        path.append(_joined(parameters))
    return torch.stack(path)


def _outer_parts(numbers: Tensor, *, flat: bool) -> list[Tensor]:
    wide = numbers.double()
    return [wide[None]] if flat else _cut(wide)


def _parameter(values: Tensor, device: torch.device) -> nn.Parameter:
    return nn.Parameter(values.to(device, copy=True))


@cache
def _drawn(node: int, step: int = 0) -> Tensor:
    """Weights, and then gradients, of one node: the same at every call, and not to be written."""
    draws = torch.Generator().manual_seed(1000 * node + step)
    return torch.randn(sum(_SIZES), generator=draws, dtype=torch.float32, device="cpu")


def _cut(numbers: Tensor) -> list[Tensor]:
    parts = numbers.split(_SIZES)
    return [part.view(shape) for part, shape in zip(parts, _SHAPES, strict=True)]


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


def _options(optimizer: Optimizer) -> str:
    """The hyperparameters as text, so that a tensor among them has its value compared."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return repr(groups)
