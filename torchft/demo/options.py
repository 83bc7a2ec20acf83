"""What can be asked of a demo run, checked when it is asked."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torchft import arguments
from torchft.arguments import check_choice, check_integer
from torchft.demo.group_scenario import Scenario
from torchft.errors import SettingsError

__all__ = ["CODECS", "STRATEGIES", "DemoOptions"]

STRATEGIES = ("ddp", "local_sgd", "diloco", "streaming")
CODECS = arguments.CODECS[1:]
"""Without fp32, which is what groups do when no codec is given."""

DEFAULT_STEPS = {"ddp": 240, "local_sgd": 60, "diloco": 60, "streaming": 60}
"""Committed steps; but for DDP `sync_every` inner steps lie between two of them."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What was asked for. Checked when it is made."""

    replicas: int = 3
    workers: int = 1
    """Ranks in each group."""
    strategy: str = "ddp"
    steps: int | None = None
    """None: what fits the strategy."""
    sync_every: int = 5
    """Inner steps between two synchronisations, streaming of two fragments."""
    codec: str | None = None
    """What the groups exchange travels as it encodes it; None: as it is."""
    kill: bool = True
    seed: int = 0
    keep: Path | None = None
    """Where logs and records stay; None: they go when the run was good."""
    corpus: tuple[Path, ...] = ()
    heartbeat_timeout_ms: int = 1500
    """Silence of a group after which the lighthouse takes it for dead."""
    timeout_s: float = 300.0
    """A run that is not over by then is given up."""

    def __post_init__(self) -> None:
        check_choice("strategy", self.strategy, STRATEGIES)
        if self.codec is not None:
            check_choice("codec", self.codec, CODECS)
        for name in ("replicas", "workers", "sync_every"):
            check_integer(name, getattr(self, name), least=1)
        check_integer("steps", self.target, least=1)
        if self.heartbeat_timeout_ms < 300:
            raise SettingsError(
                f"heartbeat_timeout_ms={self.heartbeat_timeout_ms}: groups tell every 100 ms that "
                "they live, and a busy machine delays that: use 300 or more"
            )
        _ = self.scenario  # refuses too few groups or steps for a kill

    @property
    def target(self) -> int:
        """How many steps the run has to commit."""
        return DEFAULT_STEPS[self.strategy] if self.steps is None else self.steps

    @property
    def scenario(self) -> Scenario | None:
        """Who is killed when; None where nobody is."""
        if not self.kill:
            return None
        return Scenario.from_seed(self.seed, groups=self.replicas, steps=self.target)

    @property
    def min_groups(self) -> int:
        """How many groups a quorum needs: one may be missing."""
        return max(1, self.replicas - 1)

    def to_json(self) -> str:
        """Return the options as the text that `from_json` reads."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> DemoOptions:
        """Return the options that `to_json` has written, in the process of a worker."""
        told = json.loads(text)
        keep, corpus = told["keep"] and Path(told["keep"]), tuple(map(Path, told["corpus"]))
        return cls(**{**told, "keep": keep, "corpus": corpus})
