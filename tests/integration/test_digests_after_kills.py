"""A node is killed and heals: a simulation that replays the step records has the same digests."""

from __future__ import annotations

import os
import signal

import pytest
from torch import Tensor

from torchft.simulator.events import Dies, Discards, Joins, Misses
from torchft.simulator.node import TrainNode
from torchft.verify.digests import STRATEGIES, Pair, compare

VICTIM, KILLED, BACK, STEPS = 2, 13, 24, 36


class KilledInForward(TrainNode):
    """The victim's process is killed in the middle of its step before KILLED."""

    passes = 0

    def loss(self, batch: Tensor) -> Tensor:
        self.passes += 1
        if self.node == VICTIM and self.passes == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(batch)


def _after_a_kill(name: str, *, in_round: bool, node_cls: type[TrainNode] = TrainNode) -> Pair:
    pair = compare(
        name,
        steps=STEPS,
        events=[Dies(VICTIM, KILLED, in_round=in_round), Joins(VICTIM, BACK)],
        node_cls=node_cls,
        method="fork",
    )
    assert pair.equal, f"they part at step {pair.first_difference}: {pair.simulated.events}"
    assert [heal.node for heal in pair.real.heals] == [VICTIM]
    (sent,), (counted,) = pair.real.heals, pair.simulated.heals
    assert counted.nbytes < sent.nbytes < 1.12 * counted.nbytes  # names and shapes travel too
    replayed = [type(event) for event in pair.simulated.events]
    assert replayed.count(Dies) == replayed.count(Joins) == 1
    last = pair.real.digests[-1][1]
    assert None not in last
    return pair


@pytest.mark.parametrize("name", ["all-reduce", "DiLoCo", "DiLoCo int8"])
def test_a_node_is_killed_in_a_round_and_heals(name: str) -> None:
    pair = _after_a_kill(name, in_round=True)
    assert Dies(VICTIM, 13 if name == "all-reduce" else 19, in_round=True) in pair.simulated.events
    lost = [one for one in pair.real.rounds if not one.committed]
    assert len(lost) == 1 and lost[0].members == (0, 1, 2, 3)
    assert len([one for one in pair.simulated.rounds if not one.committed]) == 1


@pytest.mark.parametrize("name", ["all-reduce", "DiLoCo"])
def test_a_node_is_killed_in_its_forward_pass_and_heals(name: str) -> None:
    _after_a_kill(name, in_round=False, node_cls=KilledInForward)


@pytest.mark.slow
@pytest.mark.parametrize("in_round", [True, False])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_survives_a_kill_alike(name: str, in_round: bool) -> None:
    node_cls = TrainNode if in_round else KilledInForward
    pair = _after_a_kill(name, in_round=in_round, node_cls=node_cls)
    # Where several rounds are open, those that had not arrived are told apart by their step.
    by_step = Misses if name == "Streaming in flight" else Discards | Misses
    assert not any(isinstance(event, by_step) for event in pair.simulated.events)
