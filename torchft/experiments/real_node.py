"""One node of an experiment in a process of its own: what `processes` runs in each of them.

The loop is that of the simulation, with one row, and `Replicated` runs the strategy.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchft.digest import digest
from torchft.peers import Handle, Place
from torchft.quantization import Codec
from torchft.replicated import Replicated
from torchft.simulator.events import Dies
from torchft.simulator.experiment import Experiment
from torchft.simulator.node import finite_losses, noted
from torchft.simulator.result import Result, mean_model
from torchft.simulator.seeds import kept_rng, seed_node
from torchft.simulator.simulated_time import forecast
from torchft.simulator.trained import Trained
from torchft.strategies.recipe import Recipe
from torchft.strategies.strategy import Strategy

if TYPE_CHECKING:
    from torchft.experiments.local_node import LocalNode
    from torchft.manager.peers import BackgroundRound, ManagerRound

__all__ = ["RealNode", "complete", "device_of", "to_bytes", "warm_up"]

_ROWS = 100
"""So many steps are told at once, if no round commits before."""


@dataclass
class RealNode:
    """The target of each process. It pickles as far as the experiment does."""

    experiment: Experiment
    deaths: Sequence[Dies]

    def __call__(self, node: LocalNode) -> dict[str, Any]:
        """Train to the end. What is left: `model`, the bytes of its state."""
        experiment = replace(self.experiment, device=device_of(self.experiment, node.number))
        with kept_rng(experiment.torch_device):
            return _Trainer(experiment, node, self._death_of(node)).train()

    def _death_of(self, node: LocalNode) -> Dies | None:
        mine = sorted((d for d in self.deaths if d.node == node.number), key=lambda d: d.step)
        return mine[node.life] if node.life < len(mine) else None


def device_of(experiment: Experiment, node: int) -> torch.device:
    """Several CUDA devices are taken in turn, unless one is named."""
    device = experiment.torch_device
    if device.type == "cuda" and experiment.device in (None, "cuda"):
        return torch.device("cuda", node % torch.cuda.device_count())
    return device


class _Trainer:
    """The training loop of one node."""

    def __init__(self, experiment: Experiment, node: LocalNode, death: Dies | None) -> None:
        self._experiment, self._node, self._death = experiment, node, death
        self._device = experiment.torch_device
        self._feed = experiment.feed()
        self._model = experiment.make_model()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._trained = Trained(self._model, trained)
        self._train_node = experiment.make_node(self._model, node.number)
        self._strategy = experiment.strategy
        self._clock = self._strategy.clock
        manager = node.connect()
        self._peers = _Watched(node, self._strategy, experiment.deterministic, death)
        self._replicated = Replicated(
            manager,
            self._model,
            None,
            self._strategy,
            samples=self._feed.samples(node.number),
            own_data=self._feed.own_data,
            max_steps=experiment.total_steps,
            peers=self._peers,
        )
        # Loaded after the rest, so that the clock is the donor's by then.
        manager.register_state_dict_fn("donor", self._healed_from, lambda: node.number)
        self._rows: list[dict[str, Any]] = []

    def train(self) -> dict[str, Any]:
        """From the first round to the last."""
        self._replicated.join()
        if self._peers.committed:  # the others had begun already
            self._keep({"step": self._clock.steps - 1})
        while self._clock.steps < self._experiment.total_steps:
            self._train_step()
        self._replicated.finish()  # also of one that came for the last round, and took no step
        self._report()
        self._feed.close()
        return {"model": to_bytes(self._model.state_dict())}

    def _train_step(self) -> None:
        self._die_before(self._clock.steps)
        self._node.wait_for_joins(self._clock.steps)
        self._replicated.zero_grad()
        step = self._clock.steps  # that of the others, after a heal
        losses = finite_losses({self._node.number: self._backward(step)}, step)
        row = {"step": step, "loss": losses[self._node.number], "lr": self._replicated.optimizer.lr}
        row["compute_s"] = self._compute_s
        self._replicated.step()
        if self._clock.steps >= self._experiment.total_steps:
            self._strategy.finish()
        self._keep(row)

    def _backward(self, step: int) -> Tensor:
        began = perf_counter()
        batch = self._feed.batch(self._node.number, step)
        seed_node(self._experiment.seed, self._node.number, step, self._device)
        with noted(f"node {self._node.number}, step {step + 1}"):
            loss = self._train_node.backward(batch, self._experiment.micro_batch_size)
        self._trained.check(self._node.number, step)
        self._compute_s = perf_counter() - began
        return loss

    def _die_before(self, step: int) -> None:
        death = self._death
        if death is not None and not death.in_round and step >= death.step:
            self._report()
            self._node.kill_self()

    def _keep(self, row: dict[str, Any]) -> None:
        """Remember a step, with the digest where a round committed."""
        committed, self._peers.committed = self._peers.committed, False
        if committed and self._experiment.digests:
            row["digest"] = self._digest()
        self._rows.append(row)
        if committed or len(self._rows) >= _ROWS:
            self._report()

    def _report(self) -> None:
        rows, self._rows = self._rows, []
        self._node.report(rows)

    def _digest(self) -> str:
        weights = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        return digest({"weights": weights, "shared": self._replicated.shared_state_dict()})

    def _healed_from(self, donor: int) -> None:
        if self._clock.steps:  # at the start all are equal, whoever gave whom what
            self._peers.healed_from = donor


class _Watched:
    """The manager as peers, which notes what a replay needs, and dies in a round if it is to."""

    def __init__(
        self, node: LocalNode, strategy: Strategy, deterministic: bool, death: Dies | None
    ) -> None:
        self.node = node
        self.averages = "ordered" if deterministic else "average"
        self.committed = False
        """A round did, since this was last reset."""
        self.healed_from: int | None = None
        """Whose state was loaded, for the record of the round that opened with that."""
        self.strategy, self._death = strategy, death
        self._peers = node.peers(deterministic=deterministic)

    def compare(self, setting: str, value: str) -> None:
        """As the peers do."""
        self._peers.compare(setting, value)

    def open(self, place: Place) -> _WatchedRound:
        """As the peers do."""
        opened = self._peers.open(place)
        self.node.joined()
        healed_from, self.healed_from = self.healed_from, None
        return _WatchedRound(self, place, opened, healed_from)

    def take_over(self, carried: dict[str, Any]) -> _WatchedRound:
        """As the peers do."""
        return _WatchedRound(self, Place.AFTER, self._peers.take_over(carried))

    def step(self, place: Place) -> int:
        """The inner step; after it the clock has counted it already."""
        return self.strategy.clock.steps - (place is Place.AFTER)

    def restores(self, recipe: int) -> bool:
        """Whether this recipe takes something back after a discarded round."""
        return type(self.strategy.recipes[recipe]).discard is not Recipe.discard

    def dies_in(self, step: int) -> bool:
        """Whether this process is to be killed in a round of `step`."""
        return self._death is not None and self._death.in_round and step >= self._death.step


class _WatchedRound:
    """A round, with its bytes."""

    def __init__(
        self,
        peers: _Watched,
        place: Place,
        real: ManagerRound | BackgroundRound,
        healed_from: int | None = None,
    ) -> None:
        self.bootstrap = real.bootstrap
        self._peers, self._place, self._real = peers, place, real
        self._kind, self._collectives = peers.averages, 0
        self._recipe = peers.strategy.opening
        self._opened = peers.step(place)
        self._healed = {} if healed_from is None else {"healed_from": healed_from}

    @property
    def final_sync(self) -> bool:
        return self._real.final_sync

    @property
    def formed(self) -> bool:
        return self._real.formed

    def meet(self) -> bool:
        return self._real.meet()

    @property
    def failed(self) -> bool:
        return self._real.failed

    def average(
        self,
        tensors: Sequence[Tensor],
        codec: Codec | None = None,
        error_feedback: Sequence[Tensor] | None = None,
    ) -> Handle:
        self._kind = self._kind if codec is None else "quantized"
        self._collectives += sum(tensor.numel() > 0 for tensor in tensors)
        return self._mortal(self._real.average(tensors, codec, error_feedback))

    def gather(self, tensors: Sequence[Tensor]) -> Handle:
        self._kind = self._kind if self._collectives else "gather"
        self._collectives += int(len(tensors) > 0)
        return self._mortal(self._real.gather(tensors))

    def average_within(
        self, tensors: Sequence[Tensor], islands: Callable[[int], list[list[int]]]
    ) -> Handle:
        return self._real.average_within(tensors, islands)

    def carried(self) -> dict[str, Any]:
        return self._real.carried()

    def fail(self, error: Exception) -> None:
        self._real.fail(error)

    def close(self) -> bool:
        self._peers.node.manager.note(
            inner_step=self._peers.step(self._place),
            opened=self._opened,
            **self._healed,
            place=self._place.name,
            recipe=self._recipe,
            restores=self._peers.restores(self._recipe),
            kind=self._kind,
            collectives=self._collectives,
            round_bytes=self._real.bytes_sent,
        )
        committed = self._real.close()
        self._peers.committed |= committed
        return committed

    def _mortal(self, handle: Handle) -> Handle:
        doomed = self._peers.dies_in(self._peers.step(self._place))
        return _LastWords(self._peers.node) if doomed else handle


class _LastWords(Handle):
    """What waits for the killer."""

    def __init__(self, node: LocalNode) -> None:
        self._node = node

    def wait(self) -> list[Tensor]:
        self._node.kill_self()
        raise AssertionError("killed, and still there")


def to_bytes(state: dict[str, Any]) -> bytes:
    """The state of a model, to be sent to the parent."""
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def _from_bytes(state: bytes) -> dict[str, Any]:
    """The state of a model, on the CPU."""
    loaded: dict[str, Any] = torch.load(io.BytesIO(state), map_location="cpu", weights_only=True)
    return loaded


def _take_models(result: Result, experiment: Experiment, ends: dict[int, Any]) -> None:
    """Put into `result` what the processes left, and their mean.

    Of a node that was killed and not started again, it is the model that it began with.
    """
    for node in range(experiment.num_nodes):
        model: nn.Module = experiment.make_model()
        if node in ends:
            model.load_state_dict(_from_bytes(ends[node]["model"]))
        result.models.append(model)
    result.alive = sorted(ends)
    living = [result.models[node] for node in result.alive]
    result.model = mean_model(living, experiment.remake_model)


def complete(
    result: Result, experiment: Experiment, ends: dict[int, Any], *, began: float, compute_s: float
) -> Result:
    """Add to `result` what is known when all processes have ended: models, times, a forecast.

    Args:
        result: what the nodes reported while they ran.
        experiment: what they ran.
        ends: node → what its process returned.
        began: `time.perf_counter()` at the start of the run, seconds.
        compute_s: seconds that the nodes spent in their inner steps, together.
    """
    with kept_rng(experiment.torch_device):
        _take_models(result, experiment, ends)
    experiment.warn_of_silence(result.rounds)
    result.seconds["train"] = perf_counter() - began
    result.seconds["steps"] = compute_s
    if experiment.network is not None:
        result.simulated = forecast(result, experiment.network)
    return result


def warm_up(experiment: Experiment) -> None:
    """Import what every process would import for itself, were it not imported before they fork."""
    model = experiment.make_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    experiment.inner.build([trained], experiment.total_steps).state_dict()
