"""Each strategy again, in plain torch and one loop over all nodes: what the right numbers are.

Nothing here uses `torchft.strategies`. Nodes come, go and vote as the script says.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from helpers.peers import Script, mean
from helpers.tiny import Tiny, backward
from torch import Tensor, nn

from torchft.quantization import Codec, quantized_mean

__all__ = ["INNER", "OUTER", "Kind", "reference"]

INNER = partial(torch.optim.AdamW, lr=0.03, weight_decay=0.01)
OUTER = partial(torch.optim.SGD, lr=0.7, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Kind:
    """What is computed."""

    name: str
    """all_reduce, local_sgd, diloco, islands, sparta (with DiLoCo if `every`), demo or top_k."""
    every: int = 0
    fragments: int = 1
    cut: tuple[tuple[int, ...], ...] = ()
    """The fragments by position, where one module was cut. Else two are `first`, and the rest."""
    delay: int = 0
    mix: float = 0.0
    backup: bool = True
    islands: Callable[[int, int], list[list[int]]] = lambda step, participants: []
    """Who averages with whom after `step`."""
    share_every: int = 0
    subset: Callable[[int, int], Tensor] = lambda turn, numel: torch.arange(numel)
    """Which of `numel` weights are averaged for the `turn`-th time, from 0."""
    topk: int = 0
    chunk: int = 0
    decay: float = 0.0
    senders: bool = False
    """A number's mean is over those that sent it, not over all."""
    by_tensor: bool = False
    """Top-k's chunks are blocks of each parameter, of sides up to √chunk."""
    weighed: bool = False
    """Node n has n + 1 samples, and as much weight in LocalSGD's mean."""
    restores_inner: bool = False
    """A no brings back the inner state of the fragment's last synchronisation."""
    skips_unused: bool = False
    """A script steps its own optimizer: torch's passes over a parameter that has no gradient."""
    codec: Codec | None = None
    """How averages travel. Not of islands, SPARTA and what is gathered."""
    feedback: bool = False
    """What the codec loses of gradients or deltas is sent later."""


@dataclass
class _Flight:
    """A round between its opening and its close."""

    index: int
    """Of the part."""
    sent: list[Tensor]
    """The average."""
    members: list[int]
    closes: int
    failed: bool


class _Alone:
    """One node: its model and its inner optimizer."""

    def __init__(self) -> None:
        self.model = Tiny()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.inner = INNER(self.parameters)

    def step(self, node: int, step: int, *, skips_unused: bool) -> None:
        if skips_unused:
            self.inner.zero_grad()
            backward(self.model, node, step)
        else:
            self.gradients(node, step)
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
    run = {
        "all_reduce": _all_reduce,
        "islands": _islands,
        "sparta": _sparta,
        "demo": _demo,
        "top_k": _top_k,
    }.get(kind.name, _weights)
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


def _average(
    kind: Kind, members: list[int], counted: list[int], sent: Callable[[int], list[Tensor]]
) -> list[Tensor]:
    """The mean of what the counted send; with a codec all travels as one, in as many chunks as
    there are members."""
    if kind.weighed:
        rows = [[(n + 1) * t for t in sent(n)] for n in counted]
        return [sum(column) / sum(n + 1 for n in counted) for column in zip(*rows, strict=True)]
    if kind.codec is None:
        return [mean(column) for column in zip(*(sent(n) for n in counted), strict=True)]
    rows = torch.stack([torch.cat([t.reshape(-1) for t in sent(n)]) for n in members])
    average = quantized_mean(rows, kind.codec, [members.index(n) for n in counted])[0]
    like = sent(counted[0])
    parts = average.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


class _Residuals:
    """What is left over of each node, for each part of the model."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._next: dict[tuple[int, int], Tensor] = {}
        """After the rounds that are open."""

    def average(
        self,
        kind: Kind,
        members: list[int],
        counted: list[int],
        sent: Callable[[int], list[Tensor]],
        part: int = 0,
    ) -> list[Tensor]:
        """As `_average`, of what is sent and what is left over."""
        if not kind.feedback:
            return _average(kind, members, counted, sent)
        like, codec = sent(counted[0]), kind.codec
        assert codec is not None
        rows = {n: torch.cat([t.reshape(-1) for t in sent(n)]) for n in members}
        rows = {n: row + self._kept.get((part, n), 0.0) for n, row in rows.items()}
        size = math.ceil(rows[counted[0]].numel() / len(members))
        # A codec does not see zeros at the end of a block, so the last chunk may be short.
        pieces = {n: row.split(size) for n, row in rows.items()}
        said = {n: [_coded(codec, piece) for piece in pieces[n]] for n in members}
        means = [mean([said[n][at] for n in counted]) for at in range(len(pieces[counted[0]]))]
        for at, n in enumerate(members):
            left = [p - q for p, q in zip(pieces[n], said[n], strict=True)]
            if at < len(means):
                left[at] = left[at] + len(counted) * (means[at] - _coded(codec, means[at]))
            self._next[part, n] = torch.cat(left)
        average = torch.cat([_coded(codec, piece) for piece in means])
        parts = average.split([t.numel() for t in like])
        return [one.view(t.shape) for one, t in zip(parts, like, strict=True)]

    def commit(self, part: int = 0) -> None:
        self._kept.update({key: left for key, left in self._next.items() if key[0] == part})

    def forget(self, node: int) -> None:
        for key in [key for key in self._kept if key[1] == node]:
            del self._kept[key]


def _coded(codec: Codec, values: Tensor) -> Tensor:
    return codec.decode(codec.encode(values[None]), values.numel())[0]


def _gradients(node: _Alone) -> list[Tensor]:
    return [p.grad for p in node.parameters if p.grad is not None]


@torch.no_grad()
def _all_reduce(kind: Kind, script: Script, steps: int, nodes: dict[int, _Alone]) -> None:
    residuals = _Residuals()
    for step in range(1, steps + 1):
        members = _meet(script, step, nodes)
        for n in script.newcomers(step):
            residuals.forget(n)
        with torch.enable_grad():
            for n in members:
                nodes[n].gradients(n, step)
        if script.goes(step):
            averages = residuals.average(kind, members, members, lambda n: _gradients(nodes[n]))
            residuals.commit()
            for n in members:
                for p, average in zip(nodes[n].parameters, averages, strict=True):
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
    parts = [list(part) for part in kind.cut] or parts
    backup = [p.clone() for p in start.parameters]
    momentum = [torch.zeros_like(p) for p in start.parameters]
    slots = {k * kind.every // kind.fragments for k in range(1, kind.fragments * (steps + 2))}
    number = 0
    versions = [0] * len(parts)
    in_flight: list[_Flight] = []
    residuals = _Residuals()

    inner: dict[tuple[int, int], dict] = {}

    def keep(node: int, part: list[int]) -> None:
        for i in part:
            state = nodes[node].inner.state.get(nodes[node].parameters[i], {})
            inner[node, i] = copy.deepcopy(dict(state))

    def bring_back(part: list[int]) -> None:
        for n, node in nodes.items():
            for i in part if kind.restores_inner else ():
                node.inner.state[node.parameters[i]] = copy.deepcopy(inner[n, i])

    for n in nodes:
        keep(n, everything)

    def opens(closes: int) -> _Flight:
        members = _meet(script, number, nodes)
        for other in in_flight:
            other.failed |= not set(other.members) <= set(members)
        away = [other.index for other in in_flight]
        index = min((i for i in range(len(parts)) if i not in away), key=lambda i: versions[i])
        counted = [m for m in members if m not in script.newcomers(number)]
        for n in script.newcomers(number):
            keep(n, everything)
            residuals.forget(n)
            if kind.backup:
                _write(nodes[n].parameters, backup)

        def contribution(n: int) -> list[Tensor]:
            return [_sent(kind, backup[i], nodes[n].parameters[i]) for i in parts[index]]

        sent = residuals.average(kind, members, counted, contribution, index)
        _drop_lost(script, number, nodes)
        return _Flight(index, sent, members, closes, failed=not script.goes(number))

    def close(one: _Flight) -> None:
        part = parts[one.index]
        if one.failed:
            bring_back(part)
            if kind.backup:
                for node in nodes.values():
                    _write([node.parameters[i] for i in part], [backup[i] for i in part])
            return
        residuals.commit(one.index)
        for n in nodes:
            keep(n, part)
        for i, average in zip(part, one.sent, strict=True):
            _advance(kind, backup[i], momentum[i], average)
            for node in nodes.values():
                p = node.parameters[i]
                p.copy_(kind.mix * p + (1 - kind.mix) * backup[i])
        versions[one.index] += 1

    def close_until(step: float) -> None:
        while in_flight and in_flight[0].closes <= step:
            close(in_flight.pop(0))

    for step in range(1, steps + 1):
        with torch.enable_grad():
            for n, node in nodes.items():
                node.step(n, step, skips_unused=kind.skips_unused)
        close_until(step)
        if step + kind.delay in slots:
            number += 1
            in_flight.append(opens(step + kind.delay))
            close_until(step)
    close_until(math.inf)


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


@torch.no_grad()
def _step_all(nodes: dict[int, _Alone], step: int) -> None:
    with torch.enable_grad():
        for n, node in nodes.items():
            node.step(n, step, skips_unused=False)


@torch.no_grad()
def _vector(node: _Alone) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in node.parameters])


@torch.no_grad()
def _write_vector(node: _Alone, vector: Tensor) -> None:
    parts = vector.split([p.numel() for p in node.parameters])
    _write(node.parameters, [v.view(p.shape) for v, p in zip(parts, node.parameters, strict=True)])


@torch.no_grad()
def _islands(kind: Kind, script: Script, steps: int, nodes: dict[int, _Alone]) -> None:
    number = 0
    for step in range(1, steps + 1):
        _step_all(nodes, step)
        if step % kind.every:
            continue
        number += 1
        members = _meet(script, number, nodes)
        counted = [m for m in members if m not in script.newcomers(number)]
        if script.goes(number):
            for island in kind.islands(step, len(counted)):
                average = mean([_vector(nodes[counted[at]]) for at in island])
                for at in island:
                    _write_vector(nodes[counted[at]], average)
        _drop_lost(script, number, nodes)


@torch.no_grad()
def _sparta(kind: Kind, script: Script, steps: int, nodes: dict[int, _Alone]) -> None:
    backup = _vector(_Alone())
    momentum, number = torch.zeros_like(backup), 0

    def counted() -> list[int]:
        members = _meet(script, number, nodes)
        newcomers = script.newcomers(number)
        if kind.every:
            for n in newcomers:
                _write_vector(nodes[n], backup)
        return [m for m in members if m not in newcomers]

    for step in range(1, steps + 1):
        _step_all(nodes, step)
        if step % kind.share_every == 0:
            number += 1
            at = kind.subset(step // kind.share_every - 1, backup.numel())
            average = mean([_vector(nodes[n])[at] for n in counted()])
            _drop_lost(script, number, nodes)
            if script.goes(number):
                for node in nodes.values():
                    _write_vector(node, _vector(node).index_copy(0, at, average))
        if kind.every and step % kind.every == 0:
            number += 1
            average = mean([backup - _vector(nodes[n]) for n in counted()])
            _drop_lost(script, number, nodes)
            if script.goes(number):
                _advance(kind, backup, momentum, average)
            for node in nodes.values():
                _write_vector(node, backup)


@torch.no_grad()
def _top_k(kind: Kind, script: Script, steps: int, nodes: dict[int, _Alone]) -> None:
    backup = _vector(_Alone())
    momentum, number = torch.zeros_like(backup), 0
    residual = {n: torch.zeros_like(backup) for n in range(script.nodes)}
    for step in range(1, steps + 1):
        _step_all(nodes, step)
        if step % kind.every:
            continue
        number += 1
        members, newcomers = _meet(script, number, nodes), script.newcomers(number)
        for n in newcomers:
            _write_vector(nodes[n], backup)
            residual[n].zero_()
        grown = {n: kind.decay * residual[n] + backup - _vector(nodes[n]) for n in members}
        sent = {n: _chosen(kind, grown[n], nodes[n].parameters) for n in members}
        _drop_lost(script, number, nodes)
        if script.goes(number):
            average = _mean_of(kind, [sent[n] for n in members if n not in newcomers])
            _advance(kind, backup, momentum, average)
            for n, node in nodes.items():
                residual[n] = grown[n] - sent[n]
                _write_vector(node, backup)


def _chosen(kind: Kind, grown: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    if not kind.by_tensor:
        return torch.cat([_largest(chunk, kind.topk) for chunk in grown.split(kind.chunk)])
    parts = grown.split([p.numel() for p in parameters])
    shaped = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
    side = math.isqrt(kind.chunk)
    kept = [_in_blocks([one], lambda b: _largest(b[0], kind.topk), side) for one in shaped]
    return torch.cat([one.reshape(-1) for one in kept])


def _mean_of(kind: Kind, sent: list[Tensor]) -> Tensor:
    """What was not sent is zero."""
    if not kind.senders:
        return mean(sent)
    senders = sum((one != 0).to(one.dtype) for one in sent)
    return sum(sent) / senders.clamp(min=1)


def _largest(values: Tensor, k: int) -> Tensor:
    """All others are zero."""
    order = values.abs().reshape(-1).argsort(descending=True)
    kept = torch.zeros_like(values).reshape(-1)
    kept[order[:k]] = values.reshape(-1)[order[:k]]
    return kept.view(values.shape)


@torch.no_grad()
def _demo(kind: Kind, script: Script, steps: int, nodes: dict[int, _Alone]) -> None:
    momentum = {n: _zeros(nodes[0]) for n in range(script.nodes)}
    for step in range(1, steps + 1):
        members = _meet(script, step, nodes)
        for n in script.newcomers(step):
            momentum[n] = _zeros(nodes[n])
        with torch.enable_grad():
            for n in members:
                nodes[n].gradients(n, step)
        if script.goes(step):
            means = []
            for at in range(len(momentum[0])):
                grads = {n: nodes[n].parameters[at].grad.double() for n in members}
                grown = [kind.decay * momentum[n][at] + grads[n] for n in members]
                means.append(_in_waves(kind, grown))
                for n, one in zip(members, grown, strict=True):
                    momentum[n][at] = one - _in_waves(kind, [one])
            for n in members:
                for p, total in zip(nodes[n].parameters, means, strict=True):
                    p.grad.copy_(torch.where(total.abs() < 1e-12, 0.0, total).sign())
                nodes[n].inner.step()
        _drop_lost(script, step, nodes)


def _zeros(node: _Alone) -> list[Tensor]:
    return [torch.zeros(p.shape, dtype=torch.float64) for p in node.parameters]


def _in_waves(kind: Kind, grown: list[Tensor]) -> Tensor:
    """What the largest coefficients of each block say, in the tensor's own terms: their mean."""

    def said(blocks: list[Tensor]) -> Tensor:
        down, across = (_cosines(side) for side in blocks[0].shape)
        kept = [_largest(down @ block @ across.T, kind.topk) for block in blocks]
        return down.T @ _mean_of(kind, kept) @ across

    return _in_blocks(grown, said, kind.chunk)


def _in_blocks(
    values: list[Tensor], of_block: Callable[[list[Tensor]], Tensor], limit: int
) -> Tensor:
    """`of_block` of each block of several tensors of one shape, put together."""
    shape = values[0].shape
    many = [v.reshape(len(v), -1) if v.dim() > 1 else v.reshape(1, -1) for v in values]
    out = torch.zeros_like(many[0])
    h, w = (max(d for d in range(1, limit + 1) if side % d == 0) for side in out.shape)
    for top in range(0, out.shape[0], h):
        for left in range(0, out.shape[1], w):
            place = slice(top, top + h), slice(left, left + w)
            out[place] = of_block([matrix[place] for matrix in many])
    return out.view(shape)


def _cosines(size: int) -> Tensor:
    """Row k: the k-th cosine of the DCT-II, of length 1."""
    rows = [[math.cos(math.pi * (n + 0.5) * k / size) for n in range(size)] for k in range(size)]
    waves = torch.tensor(rows, dtype=torch.float64)
    return waves / waves.norm(dim=1, keepdim=True)
