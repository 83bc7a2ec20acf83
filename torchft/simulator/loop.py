"""The training loop of all nodes, in one process.

for each step:   who is gone, who waits to heal
                 strategy.begin()                   rounds for gradients open
                 each living node: batch, seed, forward, backward
                 strategy.step()                    as on any real group
                 strategy.finish()                  after the last one: what is in flight closes
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from time import perf_counter, process_time
from typing import Any

from torch import Tensor, nn

from torchft.digest import digest
from torchft.peers import Place
from torchft.simulator.events import Membership
from torchft.simulator.experiment import Experiment
from torchft.simulator.node import finite_losses, noted
from torchft.simulator.peers import StackedPeers
from torchft.simulator.result import Result, StepRow, mean_model
from torchft.simulator.round_records import HealRecord, RoundRecord
from torchft.simulator.seeds import kept_rng, seed_node
from torchft.simulator.simulated_time import forecast
from torchft.simulator.stacked import StackedLocal
from torchft.simulator.threads import one_thread

__all__ = ["Simulation", "run_stacked"]


def run_stacked(
    experiment: Experiment,
    *,
    on_step: Callable[[Simulation], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> Result:
    """Run it to its end.

    `on_step` is called before the first step and after each. `resume` is what
    `Simulation.state_dict` gave; the run goes on from there, bit for bit.

    Raises:
        SettingsError: it cannot run; before the first step where that can be known.
        NodeError: a loss is not finite.
    """
    started = perf_counter()
    experiment.check()
    # Real processes have a thread each, and bits depend on that.
    one = one_thread() if experiment.deterministic else nullcontext()
    with one, kept_rng(experiment.torch_device):
        run = Simulation(experiment)
        try:
            if resume is not None:
                run.load_state_dict(resume)
            run.result.seconds["setup"] = perf_counter() - started
            run.train(on_step)
        finally:
            run.end()
    result = run.result
    experiment.warn_of_silence(result.rounds)
    result.seconds["train"] = perf_counter() - started - result.seconds["setup"]
    if experiment.network is not None:
        result.simulated = forecast(result, experiment.network)
    return result


class Simulation:
    """A run of an experiment that stands between two steps."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.step = 0
        """Steps that are finished."""
        self.total_steps = experiment.total_steps
        self.device = experiment.torch_device
        self.strategy = experiment.strategy
        self.feed = experiment.feed()
        self.local = StackedLocal(
            experiment.make_model(),
            experiment.num_nodes,
            experiment.inner,
            self.total_steps,
            remake=None if isinstance(experiment.model, nn.Module) else experiment.remake_model,
        )
        events = experiment.all_events()
        self.peers = StackedPeers(
            self.local,
            Membership(experiment.num_nodes, events),
            self.strategy,
            deterministic=experiment.deterministic,
        )
        self.local.own_data = self.feed.own_data
        self.local.samples = [self.feed.samples(node) for node in range(experiment.num_nodes)]
        self.strategy.bind(self.local, self.peers)
        recipes = self.strategy.recipes
        self.local.grads_at_home = any(recipe.place is Place.BEFORE for recipe in recipes)
        self.nodes = [experiment.make_node(m, n) for n, m in enumerate(self.local.models)]
        self.result = Result(
            experiment.num_nodes,
            events=events,
            models=self.local.models,
            rounds=self.peers.rounds,
            heals=self.peers.heals,
        )

    def train(self, on_step: Callable[[Simulation], None] | None = None) -> None:
        """From where it is to the end."""
        if on_step is not None:
            on_step(self)
        while self.step < self.total_steps:
            wall, cpu = perf_counter(), process_time()
            self.train_step()
            self._spend("steps", perf_counter() - wall)
            self._spend("steps_cpu", process_time() - cpu)
            if on_step is not None:
                on_step(self)
        self.local.frozen.check(self.step)
        living = [self.local.models[node] for node in self.local.alive]
        self.result.model = mean_model(living, self.experiment.remake_model)

    def end(self) -> None:
        """Also where it broke off: the models in `result` stand by themselves from now on."""
        self.feed.close()
        self.result.alive = list(self.local.alive)
        self.local.move_out()

    def _spend(self, what: str, seconds: float) -> None:
        self.result.seconds[what] = self.result.seconds.get(what, 0.0) + seconds

    def train_step(self) -> None:
        """One inner step of every node."""
        rounds = len(self.peers.rounds)
        self.peers.begin(self.step)
        self.strategy.begin()
        losses = finite_losses(self._backward(), self.step)
        self.result.history.append(StepRow(self.step, losses, self.local.lr))
        self.strategy.step()
        if self.step + 1 == self.total_steps:
            self.strategy.finish()
        self.local.frozen.check_after(self.step)
        if self.experiment.digests and any(r.committed for r in self.peers.rounds[rounds:]):
            self.result.digests.append((self.step, self.digests()))
        self.step += 1

    def _backward(self) -> dict[int, Tensor]:
        seed, pieces = self.experiment.seed, self.experiment.micro_batch_size
        losses = {}
        for node in self.local.alive:
            batch = self.feed.batch(node, self.step)
            self.local.zero_row(node)
            seed_node(seed, node, self.step, self.device)
            with noted(f"node {node}, step {self.step + 1}"):
                losses[node] = self.nodes[node].backward(batch, pieces)
            self.local.check_trained(node, self.step)
            self.local.keep_generators(node)
        return losses

    def digests(self) -> list[str | None]:
        """Each living node's: its weights, and what all share."""
        shared = self.strategy.shared_state_dict()
        return [
            digest({"weights": self.local.row_views(node), "shared": shared})
            if node in self.local.alive
            else None
            for node in range(self.local.rows)
        ]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors, which share storage, and plain data.

        Raises:
            PhaseError: a round is in flight.
        """
        return {
            "step": self.step,
            "local": self.local.state_dict(),
            "strategy": self.strategy.state_dict(),
            "membership": self.peers.membership.state_dict(),
            "history": [asdict(row) for row in self.result.history],
            "rounds": [{**asdict(r), "place": r.place.name} for r in self.peers.rounds],
            "heals": [asdict(heal) for heal in self.peers.heals],
            "digests": list(self.result.digests),
            "seconds": dict(self.result.seconds),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse, into a run of the same experiment."""
        self.step = state["step"]
        self.local.load_state_dict(state["local"])
        self.strategy.load_state_dict(state["strategy"])
        # Checkpoints up to 1.0.0-alpha.1 call it "attendance".
        members = "membership" if "membership" in state else "attendance"
        self.peers.membership.load_state_dict(state[members])
        self.result.history[:] = [StepRow(**row) for row in state["history"]]
        self.peers.rounds[:] = [
            RoundRecord(**{**record, "place": Place[record["place"]]}) for record in state["rounds"]
        ]
        self.peers.heals[:] = [HealRecord(**heal) for heal in state["heals"]]
        self.result.digests[:] = [(step, list(of)) for step, of in state["digests"]]
        self.result.seconds.update(state["seconds"])
