"""The scenario of the parameter server: a worker is killed, another joins, the server is killed.

a and b train      b is killed      a goes on alone      c joins
the server is killed      a and c train on      it is started again      rounds close      end
"""

from __future__ import annotations

from torchft.demo.scenario import EndIn, KillProcess, RunSnapshot, Stage, StartProcess

__all__ = ["FIRST", "JOINER", "SERVER", "STAGES", "SURVIVORS", "VICTIM", "WORKERS"]

FIRST, VICTIM, JOINER = "a", "b", "c"
"""The workers; the second is killed, the third comes later."""
WORKERS = (FIRST, VICTIM, JOINER)
"""In the order of their shards."""
SURVIVORS = (FIRST, JOINER)
SERVER = "the server"

TOGETHER = 3
"""Rounds until the kill, and that are still to come when the end is told: nobody may miss it."""
ALONE = 2
"""Rounds without the victim, and after the server's return."""
DOWN_STEPS = 5
"""Steps that each worker is to train on without a server."""


def _both_trained(now: RunSnapshot, _: RunSnapshot) -> bool:
    return now.members >= {FIRST, VICTIM} and now.version >= TOGETHER


def _rounds_closed(now: RunSnapshot, began: RunSnapshot) -> bool:
    return now.version >= began.version + ALONE


def _joiner_took_part(now: RunSnapshot, _: RunSnapshot) -> bool:
    return JOINER in now.members and now.rounds.get(JOINER, 0) >= 2


def _survivors_trained_on(now: RunSnapshot, began: RunSnapshot) -> bool:
    taken = (now.steps.get(name, 0) - began.steps.get(name, 0) for name in SURVIVORS)
    return all(steps >= DOWN_STEPS for steps in taken)


STAGES = (
    Stage("until both workers have closed some rounds", _both_trained, KillProcess(VICTIM)),
    Stage("until the first has gone on alone", _rounds_closed, StartProcess(JOINER)),
    Stage("until the third has closed a round with it", _joiner_took_part, KillProcess(SERVER)),
    Stage(
        "until both have trained on without a server", _survivors_trained_on, StartProcess(SERVER)
    ),
    Stage("until rounds close again", _rounds_closed, EndIn(TOGETHER)),
)
"""What the controller goes through."""
