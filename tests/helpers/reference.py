"""Each strategy again, in plain torch and one loop over all nodes: what the right numbers are.

Nothing here uses `torchft.strategies`. Nodes come, go and vote as the script says.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
from helpers.peers import Script, mean
from helpers.tiny import Tiny, backward
from torch import Tensor, nn

__all__ = ["INNER", "OUTER", "Kind", "reference"]

INNER = partial(torch.optim.AdamW, lr=0.03, weight_decay=0.01)
OUTER = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Kind:
    """What is computed."""

    name: str
    """all_reduce, local_sgd or diloco."""
    every: int = 1
    fragments: int = 1
    delay: int = 0
    mix: float = 0.0
    backup: bool = True


class _Alone:
    """One node: its model and its inner optimizer."""

    def __init__(self) -> None:
        self.model = Tiny()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.inner = INNER(self.parameters)

    def step(self, node: int, step: int) -> None:
        self.inner.zero_grad()
        backward(self.model, node, step)
        self.inner.step()

    def gradients(self, node: int, step: int) -> None:
        """A parameter that nobody uses has a zero gradient."""
        self.inner.zero_grad()
        backward(self.model, node, step)
        for p in self.parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad


def reference(kind: Kind, script: Script, steps: int) -> dict[int, list[Tensor]]:
    """The parameters of each living node after `steps` inner steps."""
    nodes = {n: _Alone() for n in script.members(1)}
    run = _all_reduce if kind.name == "all_reduce" else _weights
    run(kind, script, steps, nodes)
    return {n: [p.detach().clone() for p in node.parameters] for n, node in nodes.items()}


def _meet(script: Script, number: int, nodes: dict[int, _Alone]) -> list[int]:
    """Newcomers copy the first old member. Returns the members of the round."""
    members, newcomers = script.members(number), script.newcomers(number)
    donor = next(m for m in members if m not in newcomers)
    for node in newcomers:
        nodes[node] = copy.deepcopy(nodes[donor])
    return members


def _drop_lost(script: Script, number: int, nodes: dict[int, _Alone]) -> None:
    for node, last in script.lost.items():
        if last == number:
            del nodes[node]


@torch.no_grad()
def _all_reduce(kind: Kind, script: Script, steps: int, nodes: dict[int, _Alone]) -> None:
    for step in range(1, steps + 1):
        members = _meet(script, step, nodes)
        with torch.enable_grad():
            for n in members:
                nodes[n].gradients(n, step)
        if script.goes(step):
            for column in zip(*(nodes[n].parameters for n in members), strict=True):
                average = mean([p.grad for p in column])
                for p in column:
                    p.grad.copy_(average)
            for n in members:
                nodes[n].inner.step()
        _drop_lost(script, step, nodes)


@torch.no_grad()
def _weights(kind: Kind, script: Script, steps: int, nodes: dict[int, _Alone]) -> None:
    start = _Alone()
    names = {id(p): name for name, p in start.model.named_parameters()}
    first = [i for i, p in enumerate(start.parameters) if names[id(p)].startswith("first.")]
    everything = list(range(len(start.parameters)))
    rest = [i for i in everything if i not in first]
    parts = [everything] if kind.fragments == 1 else [first, rest]
    backup = [p.clone() for p in start.parameters]
    momentum = [torch.zeros_like(p) for p in start.parameters]
    period, number, committed = kind.every // kind.fragments, 0, 0
    sent: list[Tensor] = []
    for step in range(1, steps + 1):
        with torch.enable_grad():
            for n, node in nodes.items():
                node.step(n, step)
        part = parts[committed % len(parts)]
        if (step + kind.delay) % period == 0:
            number += 1
            members = _meet(script, number, nodes)
            counted = [m for m in members if m not in script.newcomers(number)]
            for n in script.newcomers(number):
                if kind.backup:
                    _write(nodes[n].parameters, backup)
            sent = [
                mean([_sent(kind, backup[i], nodes[n].parameters[i]) for n in counted])
                for i in part
            ]
            _drop_lost(script, number, nodes)
        if step % period:
            continue
        if not script.goes(number):
            if kind.backup:
                for node in nodes.values():
                    _write([node.parameters[i] for i in part], [backup[i] for i in part])
            continue
        committed += 1
        for i, average in zip(part, sent, strict=True):
            _advance(kind, backup[i], momentum[i], average)
            for node in nodes.values():
                p = node.parameters[i]
                p.copy_(kind.mix * p + (1 - kind.mix) * backup[i])


def _sent(kind: Kind, backup: Tensor, weights: Tensor) -> Tensor:
    return weights if kind.name == "local_sgd" else backup - weights


def _advance(kind: Kind, backup: Tensor, momentum: Tensor, average: Tensor) -> None:
    if kind.name == "local_sgd":
        backup.copy_(average)
    else:
        momentum.mul_(0.9).add_(average)
        backup.sub_(0.7 * (average + 0.9 * momentum))


def _write(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)
