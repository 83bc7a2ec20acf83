"""One run of a sweep: what it is, and what it leaves. Both are JSON, so that a sweep can go on.

The records of rounds, heals and deaths are kept whole: simulated time on any network follows
from them, without another run.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from torchft.atomic import replacing
from torchft.errors import SettingsError
from torchft.experiments.config import SimulateConfig, StrategyConfig, needed, whole
from torchft.peers import Place
from torchft.simulator.events import Dies, Event
from torchft.simulator.network import NetworkModel
from torchft.simulator.round_records import HealRecord, RoundRecord
from torchft.simulator.simulated_time import Forecast, forecast_records

__all__ = ["RunReport", "RunSpec", "key_of", "read_report", "write_report"]

ANOTHER_MATTER = (
    *("strategies", "nodes", "sync_every", "lr", "seeds", "steps", "equal"),  # in the specification
    *("network", "networks", "faults", "target_loss"),  # of these only the events change learning
)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One combination of what is swept."""

    strategy: StrategyConfig
    nodes: int
    sync_every: int | None
    """None: this strategy has no H."""
    lr: float
    seed: int
    steps: int

    @property
    def group(self) -> RunSpec:
        """The name of its combination, which is the same for all seeds."""
        return replace(self, seed=0)

    def __str__(self) -> str:
        every = "" if self.sync_every is None else f", every {self.sync_every}"
        return f"{self.strategy.shown}, {self.nodes} nodes{every}, lr {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The figures that one run of a sweep leaves behind."""

    spec: RunSpec
    parameters: int
    """Numbers that the model has."""
    losses: list[dict[int, float]]
    """By step: the training loss of each node that computed."""
    validations: list[tuple[int, float]]
    """Steps that were done, and the loss of the mean model on held-out samples then."""
    rounds: list[RoundRecord]
    heals: list[HealRecord]
    deaths: list[Dies]
    final_lr: float
    train_s: float
    """Wall time of the steps, without validation."""
    cpu_s: float
    """Processor time of the same."""

    @property
    def final_loss(self) -> float:
        """Of the mean model on held-out samples at the end."""
        return self.validations[-1][1]

    @property
    def train_losses(self) -> list[float]:
        """The mean over the nodes, by step."""
        return [sum(row.values()) / len(row) for row in self.losses]

    @property
    def steps_per_s(self) -> float:
        """Steps of all nodes together per second of wall time, here."""
        return len(self.losses) / self.train_s

    @property
    def bytes_by_step(self) -> list[float]:
        """Mean bytes that a node has sent in rounds until the end of each step."""
        sent = [0.0] * len(self.losses)
        for record in self.rounds:
            sent[record.step] += sum(record.bytes_per_node.values()) / self.spec.nodes
        return list(accumulate(sent))

    @property
    def bytes_per_node(self) -> float:
        """Mean bytes that a node sent in rounds."""
        return self.bytes_by_step[-1] if self.losses else 0.0

    def forecast(self, network: NetworkModel) -> Forecast:
        """The simulated time that this run takes on `network`."""
        node_steps = sum(map(len, self.losses))
        return forecast_records(
            num_nodes=self.spec.nodes,
            losses=self.losses,
            rounds=self.rounds,
            heals=self.heals,
            deaths=self.deaths,
            network=network,
            measured_s=self.cpu_s / node_steps,
        )


def key_of(config: SimulateConfig, spec: RunSpec, events: list[Event]) -> str:
    """A name for the run's file: readable, and another one whenever the run would be another."""
    settings = {k: v for k, v in whole(config).items() if k not in ANOTHER_MATTER}
    of_strategy = {"name": spec.strategy.name, "options": spec.strategy.options}
    described = {
        "settings": settings,
        "spec": {**asdict(spec), "strategy": of_strategy},
        "events": [[type(event).__name__, asdict(event)] for event in events],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    every = "" if spec.sync_every is None else f"-every{spec.sync_every}"
    readable = f"{spec.strategy.name}-nodes{spec.nodes}{every}-lr{spec.lr:g}-seed{spec.seed}"
    return f"{re.sub('[^A-Za-z0-9._-]', '_', readable)}-{digest.hexdigest()[:10]}"


def write_report(report: RunReport, path: Path) -> None:
    """All of it at once: a file of that name is whole."""
    plain = asdict(report)
    for record in plain["rounds"]:
        record["place"] = record["place"].name
    with replacing(path) as draft:
        draft.write_text(json.dumps(plain))


def read_report(path: Path, spec: RunSpec) -> RunReport:
    """The inverse; the specification is the one that it was looked up by.

    Raises:
        SettingsError: the file is not one of ours.
    """
    pydantic = needed("pydantic")
    try:
        plain: dict[str, Any] = json.loads(path.read_text())
        for record in plain["rounds"]:
            record["place"] = Place[record["place"]]
        report: RunReport = pydantic.TypeAdapter(RunReport).validate_python({**plain, "spec": spec})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"{path} is no finished run ({error}): delete it, or give another --out"
        ) from error
    return report
