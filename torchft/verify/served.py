"""The same strategy through the parameter server: real server, real workers, and its simulation.

    pair = compare_served("DiLoCo int8", steps=200, nodes=4)

Each node is a process with a `DiLoCoWorker`, and one more process has the server; they speak HTTP
over the loopback. After every step that ended with an update, each node's digest (its weights, and
the base that it shares with the server) must be that of the simulated node; in the end the server's
own weights and momentum must be the simulated ones, too.

Without a codec the simulated side is the strategy itself. A codec works otherwise at a server than
among peers: what goes up is encoded once, what comes down is an encoded difference, and what either
loses is sent later. `ServedDiLoCo` says that as a recipe.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchft.atomic import replacing
from torchft.digest import digest
from torchft.experiments.local_nodes import LocalNode, LocalNodes, NodeStart
from torchft.ordered import ordered_mean
from torchft.quantization import Codec, Identity, codec_of
from torchft.retry import wait_until
from torchft.simulator.experiment import Experiment
from torchft.simulator.loop import Simulation, run_stacked
from torchft.simulator.node import finite_losses
from torchft.simulator.seeds import kept_rng, seed_node
from torchft.strategies.diloco import DiLoCoRecipe
from torchft.strategies.local import Fragment
from torchft.strategies.model_local import ModelLocal
from torchft.strategies.optim_spec import OptimSpec
from torchft.strategies.parts.deltas import rounding_lost
from torchft.strategies.recipe import By
from torchft.strategies.strategy import Strategy

if TYPE_CHECKING:
    from torchft.parameter_server.core.options import ServerOptions
    from torchft.parameter_server.worker.worker import DiLoCoWorker

__all__ = ["Served", "ServedDiLoCo", "ServedPair", "compare_served"]

Digests = dict[int, list[str]]
"""Inner step → each node's digest."""

_LOOK_S = 0.01
_START_S = 60.0
_PATIENCE_S = 60.0
"""A busy machine starves a process for seconds: nobody is taken for silent before."""


class ServedDiLoCo(DiLoCoRecipe):
    """DiLoCo as the parameter server takes it.

    d ← decoded(encoded(b - w))         what the server hears of a node; b is what all hold
    backup ← outer(backup, mean of d)
    b ← b + decoded(encoded(backup - b))
    w ← b + (w - b_before + d)          what the encoding lost stays in the weights

    Of weights in half precision w - b is what they moved from b as they hold it, and what of the
    bracket they cannot hold is kept beside them, as a worker does.
    """

    by = By.GATHER

    def __init__(
        self, outer: OptimSpec, sync_every: int, encoding: Codec, fragments: int = 1
    ) -> None:
        super().__init__(outer, sync_every, fragments=fragments, backup_device=None)
        self._encoding = encoding
        self.bases: list[list[Tensor]] = []
        """What nodes hold, by fragment."""

    def setup(self) -> None:
        """Remember the weights that all nodes start from."""
        super().setup()
        self.bases = [[flat.clone() for flat in backup.flats] for backup in self.backups]
        for at, backup in enumerate(self.backups):
            rows = [(self.local.rows, flat.shape[1]) for flat in backup.flats]
            self.own[f"hidden_{at}"] = [torch.zeros(of, dtype=torch.bfloat16) for of in rows]

    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], Any]:
        """The delta as the server decodes it; the draft is what the encoding lost, negated."""
        deltas = self.local.delta(fragment, self.bases[fragment.index])
        for delta, hidden in zip(deltas, self.own[f"hidden_{fragment.index}"], strict=True):
            delta.sub_(hidden)
        heard = [self._heard(delta) for delta in deltas]
        return heard, [said - delta for said, delta in zip(heard, deltas, strict=True)]

    def apply(self, fragment: Fragment, received: list[Tensor]) -> list[Tensor]:
        """Take the outer step, and add the encoded difference to what all nodes hold."""
        weights = super().apply(fragment, [ordered_mean(rows) for rows in received])
        bases = self.bases[fragment.index]
        for base, new in zip(bases, weights, strict=True):
            base.add_(self._heard(new - base))
        return bases

    def apply_locally(self, fragment: Fragment, update: list[Tensor], draft: Any) -> None:
        """Set the weights to what all nodes hold, plus what the encoding lost."""
        kept = list(zip(update, draft, strict=True))
        self.local.set_weights(fragment, [base + unheard for base, unheard in kept])
        dtypes = self.backups[fragment.index].own_dtypes
        hidden = self.own[f"hidden_{fragment.index}"]
        for (base, unheard), dtype, out in zip(kept, dtypes, hidden, strict=True):
            if dtype != base.dtype:
                out.copy_(rounding_lost(base, unheard, _rounds_to(dtype)))

    def _heard(self, numbers: Tensor) -> Tensor:
        encoded = self._encoding.encode(numbers.contiguous())
        return self._encoding.decode(encoded, numbers.shape[-1])


def _rounds_to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda numbers: numbers.to(dtype).float()


@dataclass(frozen=True)
class Served:
    """A strategy that the server knows too."""

    sync_every: int
    fragments: int
    codec: str

    def strategy(self, named: Strategy) -> Strategy:
        """What is simulated in the place of `named`."""
        codec = codec_of(self.codec)
        if isinstance(codec, Identity):
            return named
        outer = named.settings["outer_optimizer"]
        recipe = ServedDiLoCo(outer, self.sync_every, codec, self.fragments)
        return Strategy([recipe], inner=named.inner)


@dataclass(frozen=True)
class ServedPair:
    """The same experiment, through a server and simulated."""

    real: Digests
    simulated: Digests
    server_ends_equal: bool
    """Weights and momentum of the server's last checkpoint are the simulated ones."""

    @property
    def first_difference(self) -> int | None:
        """The first step whose digests are not all equal. None: there is none."""
        steps = sorted(self.real.keys() | self.simulated.keys())
        return next((s for s in steps if self.real.get(s) != self.simulated.get(s)), None)

    @property
    def equal(self) -> bool:
        """Every digest of every node and the server's end, and there are some."""
        return bool(self.real) and self.first_difference is None and self.server_ends_equal


def compare_served(
    experiment: Experiment, served: Served, *, method: str | None = None
) -> ServedPair:
    """Run server and workers, then simulate. `experiment` has the strategy by its name.

    Raises:
        SettingsError, NodeFailed: it cannot run, or a process failed.
    """
    with tempfile.TemporaryDirectory(prefix="torchft-") as folder:
        processes = _Processes(experiment, served, Path(folder))
        real = processes.run(method)
        simulated, shared = _simulated(experiment, served)
        return ServedPair(real, simulated, digest(_saved(Path(folder))) == digest(shared))


# ---------------------------------------------------------------------- the simulated side


def _simulated(experiment: Experiment, served: Served) -> tuple[Digests, list[dict[str, Any]]]:
    strategy = served.strategy(experiment.strategy)
    (recipe,) = strategy.recipes
    assert isinstance(recipe, DiLoCoRecipe)
    found: Digests = {}
    rounds = [0]

    def look(run: Simulation) -> None:
        if len(run.peers.rounds) > rounds[-1]:
            rounds.append(len(run.peers.rounds))
            nodes = range(experiment.num_nodes)
            bases = _bases(recipe)
            found[run.step - 1] = [_digest(run.local.row_views(node), bases) for node in nodes]

    run_stacked(replace(experiment, strategy=strategy, digests=False), on_step=look)
    shared = [
        {
            "weights": recipe.backups[f.index].flats[0],
            "outer": _whole([recipe.outer.state_dict(f)]),
        }
        for f in recipe.fragments
    ]
    return found, shared


def _bases(recipe: DiLoCoRecipe) -> list[Tensor]:
    """What all nodes hold, by fragment."""
    if isinstance(recipe, ServedDiLoCo):
        return [flats[0] for flats in recipe.bases]
    return [backup.flats[0] for backup in recipe.backups]


def _digest(weights: Mapping[str, Tensor], bases: list[Tensor]) -> str:
    return digest({"weights": weights, "bases": bases})


# ---------------------------------------------------------------------- the real side


@dataclass
class _Processes:
    """What each process does: the last one serves, all others train."""

    experiment: Experiment
    served: Served
    folder: Path

    def run(self, method: str | None) -> Digests:
        """Inner step → each worker's digest."""
        self._warm_up()
        nodes = range(self.experiment.num_nodes + 1)
        preload = ["torchft.verify.served", "torchft.parameter_server.server.server"]
        starts = [NodeStart(node) for node in nodes]
        told = LocalNodes(self, starts, self.folder, method=method, preload=preload).run()
        told.pop(self.experiment.num_nodes)
        steps = sorted({step for of in told.values() for step in of})
        return {step: [of.get(step, "-") for _, of in sorted(told.items())] for step in steps}

    def __call__(self, node: LocalNode) -> dict[int, str] | None:
        if node.number == self.experiment.num_nodes:
            self._serve()
            return None
        with kept_rng(self.experiment.torch_device):
            return self._train(node)

    def _warm_up(self) -> None:
        """What every process would import for itself, were it not imported before they fork."""
        import torchft.parameter_server.server.server  # noqa: F401

        with kept_rng(self.experiment.torch_device):
            trained = [p for p in self.experiment.make_model().parameters() if p.requires_grad]
            self.experiment.inner.build([trained], self.experiment.total_steps).state_dict()

    def _serve(self) -> None:
        """Until all workers have left."""
        from torchft.parameter_server.server.server import DiLoCoServer
        from torchft.parameter_server.worker.client import DiLoCoClient

        with DiLoCoServer(self._options()) as server:
            with replacing(self.folder / "port") as draft:
                draft.write_text(server.address)
            client = DiLoCoClient(server.address)
            while client.get("/v1/status")["departures"].get("left") != self.experiment.num_nodes:
                time.sleep(_LOOK_S)
            client.close()

    def _options(self) -> ServerOptions:
        from torchft.parameter_server.core.options import OuterOptions, ServerOptions
        from torchft.parameter_server.core.rules import Rules

        outer = self.experiment.strategy.settings["outer_optimizer"].kwargs
        rules = Rules(self.experiment.num_nodes, grace_s=_PATIENCE_S)
        return ServerOptions(self.folder / "server", rules, OuterOptions(**outer))

    def _address(self) -> str:
        path = self.folder / "port"
        if not wait_until(path.exists, _START_S):
            raise TimeoutError(f"no server within {_START_S:g} s")
        return path.read_text()

    def _train(self, node: LocalNode) -> dict[int, str]:
        experiment = self.experiment
        feed, model = experiment.feed(), experiment.make_model()
        trained = [p for p in model.parameters() if p.requires_grad]
        inner = experiment.inner.build([trained], experiment.total_steps)
        local = ModelLocal([model], inner)
        one = experiment.make_node(model, node.number)
        worker = self._worker(model, inner.optimizer, node.name)
        found: dict[int, str] = {}
        worker.start()
        for step in range(experiment.total_steps):
            batch, before = feed.batch(node.number, step), worker.sync_count
            local.zero_grads()
            seed_node(experiment.seed, node.number, step, experiment.torch_device)
            loss = one.backward(batch, experiment.micro_batch_size)
            finite_losses({node.number: loss}, step)
            local.inner_step()
            if worker.sync_count > before:
                weights = dict(zip(local.names, local.parameters, strict=True))
                found[step] = _digest(weights, list(worker.bases.values()))
        worker.stop(submit=False)
        feed.close()
        return found

    def _worker(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, name: str
    ) -> DiLoCoWorker:
        from torchft.parameter_server.worker.worker import DiLoCoWorker

        return DiLoCoWorker(
            model,
            optimizer,
            self._address(),
            worker_id=name,
            sync_every=self.served.sync_every,
            num_fragments=self.served.fragments,
            codec=self.served.codec,
            in_flight=0,
        )


def _saved(folder: Path) -> list[dict[str, Any]]:
    """Weights and momentum, by fragment, that the server saved at its end."""
    from torchft.parameter_server.server.checkpoints import Checkpoints

    saved = Checkpoints(folder / "server" / "checkpoints", 0).newest()
    assert saved is not None
    return [{"weights": row["weights"], "outer": _whole(row["outer"])} for row in saved[1]["rows"]]


def _whole(outer: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of SGD optimizers, each over a part of a row, as that of one."""
    momenta = [state["state"][0]["momentum_buffer"].reshape(-1) for state in outer]
    return {"momentum": torch.cat(momenta), "settings": outer[0]["param_groups"]}
