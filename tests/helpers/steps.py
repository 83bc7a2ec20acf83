"""Steps without a manager: what belongs to a step alone is tried out on these."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

from torchft.ledger import Ledger
from torchft.manager.begin import QuorumGroup
from torchft.manager.fingerprint import Fingerprint
from torchft.manager.listeners import StepListeners
from torchft.manager.live_state import LiveState
from torchft.manager.plan import Options, WorldSizeMode
from torchft.manager.progress import Progress
from torchft.manager.registered import Registered
from torchft.manager.starting_state import StartingState
from torchft.manager.step import Context, Step

__all__ = ["SilentLog", "a_context", "lone_step", "parts"]


class SilentLog:
    """Says and records nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def a_context(
    pg: Any = None,
    *,
    timeout: timedelta = timedelta(seconds=1),
    progress: Progress | None = None,
    ledger: Ledger | None = None,
) -> Context:
    """What the steps of a manager share that nobody made. `pg` is abandoned with a broken step."""
    pg = pg or SimpleNamespace(abort=lambda: None, errored=lambda: None, shutdown=lambda: None)
    options = Options(1, True, WorldSizeMode.DYNAMIC, timeout, timeout, timeout, None)
    log: Any = SilentLog()
    at = progress or Progress(fresh=False)
    return Context(QuorumGroup(pg), options, at, ledger or Ledger(), log)


def lone_step(ledger: Ledger | None = None, pg: Any = None) -> Step:
    """A step that has begun and has no quorum."""
    return Step(a_context(pg, ledger=ledger))


def parts(context: Context, client: Any, *, rank: int = 0, world_size: int = 1) -> tuple[Any, ...]:
    """What `Steps` is made of, for a rank whose manager server is `client`."""
    group = SimpleNamespace(
        client=client,
        rank=rank,
        world_size=world_size,
        replica_id="g:1",
        name="g",
        leave=lambda: None,
        end=lambda _: None,
    )
    transport = SimpleNamespace(bytes_sent=0, bytes_received=0, shutdown=lambda wait: None)
    state = LiveState(timedelta(seconds=1))
    fingerprint, starting = Fingerprint(context.options), StartingState(state, Registered())
    return context, group, transport, state, fingerprint, StepListeners(), starting
