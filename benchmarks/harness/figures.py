"""What a benchmark found. A figure stands beside its floor: the same machine, in the same run,
doing only what no implementation could leave out. Their ratio is what can be compared."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Figure", "Floor", "Result", "gaps"]


@dataclass(frozen=True)
class Floor:
    """What cannot be undercut, in the unit of its figure."""

    name: str
    value: float


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    key: str
    """Finds its goal in `goals.GOALS`."""
    name: str
    """For people; says also in which case it was taken."""
    value: float
    unit: str
    floor: Floor | None = None
    spread: float | None = None
    """Standard deviation of what `value` is the mean of."""

    @classmethod
    def mean(
        cls, key: str, name: str, values: Sequence[float], unit: str, floor: Floor | None = None
    ) -> Figure:
        """The mean of `values`, one a seed, and its spread."""
        spread = statistics.stdev(values) if len(values) > 1 else None
        return cls(key, name, statistics.fmean(values), unit, floor, spread)

    @property
    def ratio(self) -> float | None:
        """How often the floor fits into the value; None without a floor."""
        return self.value / self.floor.value if self.floor and self.floor.value else None


def gaps(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    """Per cent above the others' losses, seed by seed."""
    return [100 * (mine / theirs - 1) for mine, theirs in zip(losses, others, strict=True)]


@dataclass(frozen=True)
class Result:
    """All that one run of a benchmark found."""

    benchmark: str
    figures: tuple[Figure, ...]
    details: dict[str, Any]
    """Everything else that was measured, such as whole distributions. JSON can hold it."""
    machine: dict[str, Any] = field(default_factory=dict)
    """What it was taken on."""

    def to_json(self) -> str:
        """One line."""
        figures = [{**asdict(figure), "ratio": figure.ratio} for figure in self.figures]
        return json.dumps({**asdict(self), "figures": figures})

    @classmethod
    def from_json(cls, line: str) -> Result:
        """What `to_json` wrote."""
        raw = json.loads(line)
        return cls(**{**raw, "figures": tuple(_figure(one) for one in raw["figures"])})


def _figure(raw: dict[str, Any]) -> Figure:
    floor = Floor(**raw["floor"]) if raw["floor"] else None
    return Figure(raw["key"], raw["name"], raw["value"], raw["unit"], floor, raw["spread"])
