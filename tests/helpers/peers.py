"""N nodes as threads of one process: the smallest `Peers` there can be, with failures on a script.

    script = Script(nodes=3, no={2}, lost={1: 3}, joins={1: 5})
    results = World(script).run(train)        # train(node) once per node, each in a thread

Rounds are numbered from 1; round 0 is the opening one, when the script has it. Nothing here waits
for time to pass: a node waits for the others of its round, and a deadline only ends a broken test.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchft.peers import FormedAtOnce, Handle, Place
from torchft.quantization import Codec, quantized_mean

__all__ = ["Lost", "Node", "Script", "World", "mean"]

DEADLINE_S = 120.0


class Lost(BaseException):
    """This node's process is killed: nothing in it may catch that."""


@dataclass(frozen=True)
class Script:
    """What happens, by round."""

    nodes: int
    no: Collection[int] = ()
    """Rounds that are voted down."""
    lost: Mapping[int, int] = field(default_factory=dict)
    """Node → the round that it opens and does not close."""
    joins: Mapping[int, int] = field(default_factory=dict)
    """Node → the round that it comes in with, at first or again after it was lost."""
    unhealed: Mapping[int, int] = field(default_factory=dict)
    """Node → the round in which its heal fails; it heals in the next one."""
    opening: bool = False
    """All begin with a round in which nobody has anything to contribute."""

    def members(self, number: int) -> list[int]:
        """Who opens round `number`, in order."""
        return [node for node in range(self.nodes) if self._is_there(node, number)]

    def _is_there(self, node: int, number: int) -> bool:
        comes, goes = self.joins.get(node), self.lost.get(node)
        if comes is not None and number >= comes:
            return True
        if goes is not None:
            return number <= goes
        return comes is None

    def newcomers(self, number: int) -> list[int]:
        """Who heals when round `number` opens."""
        again = [node for node, failed in self.unhealed.items() if failed + 1 == number]
        return again + [node for node, comes in self.joins.items() if comes == number]

    def failed(self, number: int) -> bool:
        """A member is lost while the round is open."""
        return number in self.lost.values()

    def goes(self, number: int) -> bool:
        """The round commits."""
        return number not in self.no and not self.failed(number)

    def first_round(self, node: int) -> int:
        """Where a node that is there from the start begins."""
        return 0 if self.opening else 1


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Added one by one in order, then divided: the same bits wherever it is done."""
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total / len(tensors)


class World:
    """Where the nodes of a script meet."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self._board: dict[tuple[Any, ...], dict[int, Any]] = {}
        self._changed = threading.Condition()
        self._errors: list[BaseException] = []
        self.given_up: set[int] = set()
        """Rounds that a member gave up."""
        self.reasons: list[Exception] = []
        """Why, in the words of each."""

    def run(self, train: Callable[[Node], Any]) -> dict[int, Any]:
        """Run `train` for every node and return what each of the living returned.

        A node that is lost and joins again is two threads; the second one's result counts.
        """
        results: dict[int, Any] = {}
        lives = [(n, self.script.first_round(n)) for n in self.script.members(1)]
        lives += [(n, comes) for n, comes in self.script.joins.items()]

        def live(rank: int, number: int) -> None:
            try:
                results[rank] = train(Node(self, rank, number))
            except Lost:
                pass
            except BaseException as error:
                with self._changed:
                    self._errors.append(error)
                    self._changed.notify_all()

        threads = [threading.Thread(target=live, args=life, daemon=True) for life in lives]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        if self._errors:
            raise self._errors[0]
        assert not any(t.is_alive() for t in threads), "a node is stuck"
        return results

    def post(self, key: tuple[Any, ...], rank: int, value: Any) -> None:
        """Say something to the others."""
        with self._changed:
            self._board.setdefault(key, {})[rank] = value
            self._changed.notify_all()

    def give_up(self, number: int) -> None:
        """A member of round `number` will not go on with it."""
        with self._changed:
            self.given_up.add(number)
            self._changed.notify_all()

    def is_whole(self, key: tuple[Any, ...], number: int, ranks: Sequence[int]) -> bool:
        """Wait until all of `ranks` have spoken, or one has given the round up."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._errors or number in self.given_up or self._spoke(key) >= set(ranks),
                DEADLINE_S,
            )
            return number not in self.given_up

    def _spoke(self, key: tuple[Any, ...]) -> set[int]:
        return set(self._board.get(key, {}))

    def collect(self, key: tuple[Any, ...], ranks: Sequence[int]) -> list[Any]:
        """What all of `ranks` said, in that order."""
        with self._changed:
            there = self._changed.wait_for(
                lambda: self._errors or self._spoke(key) >= set(ranks), DEADLINE_S
            )
            assert not self._errors, "another node failed"
            assert there, f"{key}: {self._spoke(key)} came, of {ranks}"
            return [self._board[key][rank] for rank in ranks]


class Node:
    """One node: its `Peers`."""

    def __init__(self, world: World, rank: int, number: int) -> None:
        self.world = world
        self.script = world.script
        self.rank = rank
        self.next_round = number
        self.joins = number == self.script.joins.get(rank)
        """It comes when the others are there already, and heals."""
        self.compared: dict[str, str] = {}
        self.open_rounds: list[InProcessRound] = []
        self.watch: Callable[[], Any] | None = None
        """Taken when a round has opened and again before it closes: both must be equal."""
        self._state: list[tuple[Callable[[Any], None], Callable[[], Any]]] = []

    def register(self, load: Callable[[Any], None], save: Callable[[], Any]) -> None:
        """State that a newcomer gets."""
        self._state.append((load, save))

    def compare(self, setting: str, value: str) -> None:
        """What the others would compare."""
        self.compared[setting] = value

    def open(self, place: Place) -> InProcessRound:
        """Meet the members of the next round; newcomers load the first old member's state."""
        number, self.next_round = self.next_round, self.next_round + 1
        members = self.script.members(max(number, 1))
        newcomers = self.script.newcomers(number) if number else members[1:]
        donor = next(m for m in members if m not in newcomers)
        key = ("open", number)
        mine = self._save() if self.rank == donor else None
        self.world.post(key, self.rank, mine)
        state = self.world.collect(key, members)[members.index(donor)]
        unhealed = self.script.unhealed.get(self.rank) == number
        if self.rank in newcomers and not unhealed:
            for (load, _), values in zip(self._state, state, strict=True):
                load(copy.deepcopy(values))
        counted = members if place is Place.BEFORE else [m for m in members if m not in newcomers]
        for one in self.open_rounds:
            one.failed |= not set(one.members) <= set(members)
        opened = InProcessRound(self, number, members, counted)
        opened.failed = unhealed
        if not opened.bootstrap:
            self.open_rounds.append(opened)
        if self.watch is not None:
            opened.seen = self.watch()
        return opened

    def take_over(self, carried: dict[str, Any]) -> InProcessRound:
        """A round that the donor has open."""
        taken = InProcessRound(
            self, carried["number"], carried["members"], carried["participating"]
        )
        taken.failed = carried["failed"]
        self.open_rounds.append(taken)
        return taken

    def _save(self) -> list[Any]:
        return [copy.deepcopy(save()) for _, save in self._state]


class InProcessRound(FormedAtOnce):
    """One round of one node."""

    final_sync = False

    def __init__(self, node: Node, number: int, members: list[int], counted: list[int]) -> None:
        self.bootstrap = number == 0
        self.number = number
        self.members = members
        self.counted = counted
        self.seen: Any = None
        self.failed = False
        self._node = node
        self._collectives = 0

    def average(
        self,
        tensors: Sequence[Tensor],
        codec: Codec | None = None,
        error_feedback: Sequence[Tensor] | None = None,
    ) -> _Average:
        """Post this node's tensors; a newcomer's are zeros that do not count."""
        return _Average(self, self._post(tensors), list(tensors), codec, error_feedback)

    def gather(self, tensors: Sequence[Tensor]) -> _Gathering:
        """Post this node's rows."""
        return _Gathering(self, self._post(tensors), list(tensors))

    def average_within(
        self, tensors: Sequence[Tensor], islands: Callable[[int], list[list[int]]]
    ) -> _Within:
        """Post this node's tensors; a newcomer gets its own back."""
        drawn = islands(len(self.counted))
        assert sorted(at for island in drawn for at in island) == list(range(len(self.counted)))
        return _Within(self, self._post(tensors), list(tensors), drawn)

    @property
    def rank(self) -> int:
        """Of the node whose view this is."""
        return self._node.rank

    def _post(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        assert not self.bootstrap, "a bootstrap round is not used"
        if self.lost:
            raise Lost
        self._collectives += 1
        key = ("collective", self.number, self._collectives)
        # Copies: the others read them while this node's own are already the average.
        self._node.world.post(key, self._node.rank, [t.detach().clone() for t in tensors])
        return key

    @property
    def lost(self) -> bool:
        """This node ends here."""
        dies = self._node.script.lost.get(self._node.rank) == self.number
        return dies and not self._node.joins

    def carried(self) -> dict[str, Any]:
        """What a newcomer needs to close it."""
        return {
            "number": self.number,
            "members": self.members,
            "participating": self.counted,
            "failed": self.failed,
        }

    def fail(self, error: Exception) -> None:
        """Free the others."""
        self.failed = True
        self._node.world.reasons.append(error)
        self._node.world.give_up(self.number)

    def is_spoilt(self, key: tuple[Any, ...]) -> bool:
        """A member is lost, or gave the round up: nobody judges what is left then."""
        world = self._node.world
        spoilt = self._node.script.failed(self.number) or not world.is_whole(
            key, self.number, self.members
        )
        self.failed |= spoilt
        return spoilt

    def rows(self, key: tuple[Any, ...], of: Sequence[int] | None = None) -> list[list[Tensor]]:
        """What the counted sent, or others."""
        return self._node.world.collect(key, self.counted if of is None else of)

    def close(self) -> bool:
        """The vote, in the order of opening."""
        assert self._node.open_rounds.pop(0) is self, "rounds close in the order they opened"
        if self._node.watch is not None:
            assert self._node.watch() == self.seen, "something was written before the round closed"
        given_up = self.number in self._node.world.given_up
        return self._node.script.goes(self.number) and not given_up and not self.failed


class _Average(Handle):
    def __init__(
        self,
        over: InProcessRound,
        key: tuple[Any, ...],
        tensors: list[Tensor],
        codec: Codec | None,
        error_feedback: Sequence[Tensor] | None,
    ) -> None:
        self._round, self._key, self._tensors, self._codec = over, key, tensors, codec
        self._error_feedback = [None] * len(tensors) if error_feedback is None else error_feedback
        self._arrived = False

    def wait(self) -> list[Tensor]:
        if self._arrived:
            return self._tensors
        self._arrived = True
        if self._round.is_spoilt(self._key):
            # An abandoned collective leaves anything at all behind.
            return [tensor.fill_(torch.nan) for tensor in self._tensors]
        members = self._round.members
        rows = self._round.rows(self._key, self._round.counted if self._codec is None else members)
        columns = zip(*rows, strict=True)
        for tensor, column, owed in zip(self._tensors, columns, self._error_feedback, strict=True):
            tensor.copy_(mean(column) if self._codec is None else self._encoded(column, owed))
        return self._tensors

    def _encoded(self, column: Sequence[Tensor], error_feedback: Tensor | None) -> Tensor:
        assert self._codec is not None
        members = self._round.members
        which = [members.index(node) for node in self._round.counted]
        rows = torch.cat(list(column))
        if error_feedback is None:
            return quantized_mean(rows, self._codec, which)
        everybodys = torch.zeros(rows.shape, dtype=error_feedback.dtype)
        everybodys[members.index(self._round.rank)] = error_feedback[0]
        average = quantized_mean(rows, self._codec, which, everybodys)
        error_feedback.copy_(everybodys[members.index(self._round.rank)])
        return average


class _Gathering(Handle):
    def __init__(self, over: InProcessRound, key: tuple[Any, ...], tensors: list[Tensor]) -> None:
        self._round, self._key, self._tensors = over, key, tensors

    def wait(self) -> list[Tensor]:
        if self._round.is_spoilt(self._key):
            return self._tensors
        return [torch.cat(column) for column in zip(*self._round.rows(self._key), strict=True)]


class _Within(Handle):
    def __init__(
        self,
        over: InProcessRound,
        key: tuple[Any, ...],
        tensors: list[Tensor],
        islands: list[list[int]],
    ) -> None:
        self._round, self._key, self._tensors, self._islands = over, key, tensors, islands

    def wait(self) -> list[Tensor]:
        if self._round.is_spoilt(self._key):
            return [tensor.fill_(torch.nan) for tensor in self._tensors]
        if self._round.rank not in self._round.counted:
            return self._tensors
        rows = self._round.rows(self._key)
        mine = self._round.counted.index(self._round.rank)
        island = next(i for i in self._islands if mine in i)
        return [mean([column[at] for at in island]) for column in zip(*rows, strict=True)]
