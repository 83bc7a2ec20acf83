"""What a launcher decides for the training script of one group; it travels as arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TrainOptions"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What the launcher decided for this group."""

    group: int
    groups: int
    strategy: str
    steps: int
    sync_every: int
    seed: int
    min_groups: int
    """Fewer groups than this commit nothing."""
    timeout_s: float
    """Deadline of a collective, a vote, a transfer of state."""
    quorum_timeout_s: float
    folder: Path
    """Where the last word goes."""
    codec: str = "none"
    """How averages travel."""
    corpus: tuple[Path, ...] = ()

    def to_arguments(self) -> list[str]:
        """The command line that `from_arguments` reads."""
        named = {name: value for name, value in vars(self).items() if name != "corpus"}
        flags = [f"--{name}={value}" for name, value in named.items()]
        return [*flags, *(f"--corpus={path}" for path in self.corpus)]

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> TrainOptions:
        """Made by `to_arguments`, so no more is checked than types."""
        parser = argparse.ArgumentParser(allow_abbrev=False)
        for name in ("group", "groups", "steps", "sync_every", "seed", "min_groups"):
            parser.add_argument(f"--{name}", type=int, required=True)
        for name in ("timeout_s", "quorum_timeout_s"):
            parser.add_argument(f"--{name}", type=float, required=True)
        parser.add_argument("--strategy", required=True)
        parser.add_argument("--codec", required=True)
        parser.add_argument("--folder", type=Path, required=True)
        parser.add_argument("--corpus", type=Path, action="append", default=[])
        typed = vars(parser.parse_args(arguments))
        return cls(**{**typed, "corpus": tuple(typed["corpus"])})
