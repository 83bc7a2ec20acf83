"""`Peers` among nodes that are rows of one process.

A round opens with those that are up to date; those that wait to heal do so then, from a donor's
row. It comes to nothing when a member is gone as it opens, or when a later round opens without that
member before it closes: averages arrive at once. Each is recorded, with the bytes that real
processes would have sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from torchft.ordered import ordered_bytes, ordered_mean
from torchft.peers import FormedAtOnce, Handle, Place
from torchft.quantization import Codec, mean_bytes, quantized_mean
from torchft.simulator.events import Membership
from torchft.simulator.round_records import HealRecord, RoundRecord
from torchft.simulator.stacked import StackedLocal
from torchft.strategies.recipe import Recipe
from torchft.strategies.strategy import Strategy

__all__ = ["StackedPeers", "StackedRound"]


class StackedPeers:
    """The rows of `local`, for the rounds of `strategy`."""

    def __init__(
        self,
        local: StackedLocal,
        membership: Membership,
        strategy: Strategy,
        *,
        deterministic: bool = False,
    ) -> None:
        self.now = 0
        """The inner step that the nodes are in."""
        self.rounds: list[RoundRecord] = []
        self.heals: list[HealRecord] = []
        self._open: list[StackedRound] = []
        self.deterministic = deterministic
        """Averages count the bytes of the collective that adds in node order."""
        self.local, self.membership = local, membership
        self._strategy = strategy
        for row in set(range(local.rows)) - set(membership.alive):
            local.die(row)

    def compare(self, setting: str, value: str) -> None:
        """All nodes have one strategy object: there is nothing to compare."""

    def begin(self, step: int) -> None:
        """An inner step begins: those that are due are gone, or wait to heal."""
        self.now = step
        for node in self.membership.begin(step):
            self.local.die(node)

    def open(self, place: Place) -> StackedRound:
        """Heal the nodes that wait for it, then begin a round."""
        healed = self.membership.admit()
        for node, donor in healed:
            self._heal(node, donor)
        members = tuple(self.membership.alive)
        self._look_for_lost(members)
        newcomers = {node for node, _ in healed}
        counted = members
        if place is Place.AFTER:
            counted = tuple(node for node in members if node not in newcomers)
        opened = StackedRound(self, place, members, counted, self._strategy.opening)
        self._open.append(opened)
        for node in self.membership.strike(self.now):
            self.local.die(node)
            opened.failed = True
        return opened

    def take_over(self, carried: dict[str, Any]) -> NoReturn:
        """Refuse: a row that heals shares the rounds of its strategy.

        Raises:
            AssertionError: always.
        """
        raise AssertionError("rows have no rounds of their own")

    def _look_for_lost(self, members: tuple[int, ...]) -> None:
        """A round that is still open comes to nothing when a later one opens without a member."""
        now = {(node, self.membership.lives[node]) for node in members}
        for one in self._open:
            one.failed |= not one.lives <= now

    def _heal(self, node: int, donor: int) -> None:
        self.local.heal(node, donor)
        self.heals.append(HealRecord(self.now, node, donor, self._heal_bytes(donor)))
        for recipe in self._strategy.recipes:
            for tensors in recipe.own.values():
                for tensor in tensors:
                    tensor[node].zero_()
        with self.local.limited_to([node]):
            for recipe in self._strategy.recipes:
                recipe.settle_in()

    def _heal_bytes(self, donor: int) -> int:
        """What a real process would send: its model, its inner state, what all share, and what has
        arrived of the rounds that are open."""
        model = self.local.models[donor].state_dict()
        inner = self.local.inner.node_state(donor)
        shared, arrived = self._strategy.shared_state_dict(), self._strategy.open_rounds()
        return sum(_nbytes(of) for of in (model, inner, shared, arrived))

    def restores(self, recipe: int) -> bool:
        """Whether this recipe takes something back after a discarded round."""
        return type(self._strategy.recipes[recipe]).discard is not Recipe.discard

    def closed(self, one: StackedRound, record: RoundRecord) -> None:
        """Remember a round; whoever missed its commit waits to heal."""
        self._open.remove(one)
        self.rounds.append(record)
        if record.committed:
            for node in self.membership.miss(self.now):
                self.local.die(node)


class StackedRound(FormedAtOnce):
    """A round among nodes that are rows of one process."""

    bootstrap = final_sync = False

    def __init__(
        self,
        peers: StackedPeers,
        place: Place,
        members: tuple[int, ...],
        counted: tuple[int, ...],
        recipe: int,
    ) -> None:
        self.failed = False
        self.members, self.counted = members, counted
        self._peers, self._place, self._recipe = peers, place, recipe
        self._opened = peers.now
        self.lives = {(node, peers.membership.lives[node]) for node in members}
        self._kind = "average"
        self._sent = dict.fromkeys(members, 0)
        self._collectives = 0

    def average(
        self,
        tensors: Sequence[Tensor],
        codec: Codec | None = None,
        error_feedback: Sequence[Tensor] | None = None,
    ) -> _Ready:
        """Row by row in node order, as everywhere: `[rows, n]` → `[1, n]`."""
        if codec is not None:
            return self._average_encoded(tensors, codec, error_feedback)
        self._kind = "ordered" if self._peers.deterministic else "average"
        for tensor in tensors:
            self._count(tensor, self._kind, self.members)
        return _Ready([ordered_mean(tensor, self.counted) for tensor in tensors])

    def _average_encoded(
        self, tensors: Sequence[Tensor], codec: Codec, error_feedback: Sequence[Tensor] | None
    ) -> _Ready:
        self._kind = "quantized"
        for tensor in tensors:
            codec.check(tensor.dtype)
            self._count(tensor, "quantized", self.members, codec)
        owed = [None] * len(tensors) if error_feedback is None else error_feedback
        pairs = zip(tensors, owed, strict=True)
        return _Ready([self._encoded_mean(tensor, codec, left) for tensor, left in pairs])

    def _encoded_mean(self, tensor: Tensor, codec: Codec, error_feedback: Tensor | None) -> Tensor:
        # Members that are not counted sum a chunk too.
        which = [at for at, node in enumerate(self.members) if node in self.counted]
        rows = self._rows_of(self.members, tensor)
        if error_feedback is None:
            return quantized_mean(rows, codec, which)
        of_members = self._rows_of(self.members, error_feedback)
        mean = quantized_mean(rows, codec, which, of_members)
        if of_members is not error_feedback:
            error_feedback[list(self.members)] = of_members
        return mean

    def gather(self, tensors: Sequence[Tensor]) -> _Ready:
        """The rows of the nodes that are counted."""
        before = self._collectives
        self._kind = self._kind if before else "gather"
        for tensor in tensors:
            self._count(tensor, "gather", self.members)
        self._collectives = min(before + 1, self._collectives)  # they travel as one
        return _Ready([self._rows_of(self.counted, tensor) for tensor in tensors])

    @staticmethod
    def _rows_of(nodes: Sequence[int], tensor: Tensor) -> Tensor:
        if len(nodes) == tensor.shape[0]:
            return tensor
        return tensor.index_select(0, torch.tensor(nodes, device=tensor.device))

    @torch.no_grad()
    def average_within(
        self, tensors: Sequence[Tensor], islands: Callable[[int], list[list[int]]]
    ) -> _Ready:
        """Each island's mean in the rows of its nodes; other rows as they are."""
        self._kind = "islands"
        drawn = [[self.counted[at] for at in island] for island in islands(len(self.counted))]
        means = []
        for tensor in tensors:
            mean = tensor.clone()
            for nodes in drawn:
                self._count(tensor, "average", tuple(nodes))
                mean[nodes] = ordered_mean(tensor, nodes)
            self._collectives -= len(drawn) - 1  # they run at the same time
            means.append(mean)
        return _Ready(means)

    def carried(self) -> dict[str, Any]:
        """An empty dict, since nothing needs to travel: see `StackedPeers.take_over`."""
        return {}

    def fail(self, error: Exception) -> None:
        """Give the round up: its close will discard it."""
        self.failed = True

    def close(self) -> bool:
        """Yes, unless it was given up, voted down, or a member was lost."""
        committed = not self.failed and self._peers.membership.goes(self._peers.now)
        self._peers.closed(
            self,
            RoundRecord(
                step=self._peers.now,
                place=self._place,
                kind=self._kind,
                members=self.members,
                counted=self.counted,
                committed=committed,
                bytes_per_node=self._sent,
                collectives=self._collectives,
                recipe=self._recipe,
                restores=self._peers.restores(self._recipe),
                delay=self._peers.now - self._opened,
            ),
        )
        return committed

    def _count(
        self, tensor: Tensor, kind: str, among: tuple[int, ...], codec: Codec | None = None
    ) -> None:
        numel = tensor.shape[1:].numel()
        if not numel:
            return
        self._collectives += 1
        if codec is None:
            sent = bytes_of(kind, numel, tensor.element_size(), len(among))
        else:
            sent = mean_bytes(codec, numel, len(among))
        for node in among:
            self._sent[node] += sent


class _Ready(Handle):
    """What was averaged or gathered at once."""

    def __init__(self, values: list[Tensor]) -> None:
        self._values = values

    def wait(self) -> list[Tensor]:
        return self._values


def _nbytes(state: Any) -> int:
    """Of all tensors in dicts and lists."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        state = state.values()
    elif not isinstance(state, list | tuple):
        return 0
    return sum(_nbytes(inside) for inside in state)


def bytes_of(kind: str, numel: int, itemsize: int, members: int) -> int:
    """What each member sends: a ring's all-reduce, an ordered one in two phases, a gathering."""
    if kind == "ordered":
        return ordered_bytes(numel, itemsize, members)
    if kind == "gather":
        return (members - 1) * numel * itemsize
    return numel * itemsize * 2 * (members - 1) // members
