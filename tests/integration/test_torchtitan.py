"""torchtitan on replica groups: its calls, in its order, on models that FSDP2 shards.

The short tests make the calls that torchtitan makes. The slow ones run torchtitan 0.3.0 itself, as
it is on the package index: of its `experiments/torchft` the manager, the optimizers, LocalSGD and
DiLoCo, and its own tests of the checkpoints. Its trainer, which wants a GPU, is not run.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from helpers.upstream import REPOSITORY, CannotFetch, fetched
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from world import HERE, Group, World

import torchft
from torchft import settings
from torchft.digest import digest

RANKS, STEPS, SYNC_EVERY = 2, 6, 2
PACKAGES = (
    "torchtitan==0.3.0",
    "torchdata==0.11.0",
    "torch_checkpointing==0.1.1",
    "spmd_types==0.2.3",
    "tyro==1.0.17",
    "einops==0.8.2",
)


class Calls:
    """The calls that torchtitan makes, without it. `method` is its `semi_sync_method`."""

    def __init__(self, group: Group, model: nn.Module, method: str | None) -> None:
        assert importlib.util.find_spec("torchft") is not None
        self.manager = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=20)),
            min_replica_size=2,
            load_state_dict=None,
            state_dict=None,
            use_async_quorum=method is None,
            replica_id=f"torchtitan_ft_{group.number}",
        )
        self.optimizer: Any = Container(model)
        if method is None:
            self.replicate_pg = torchft.process_group.ManagedProcessGroup(self.manager)
            self.replicate_pg.register("dp_replicate")
            self.optimizer = torchft.Optimizer(self.manager, self.optimizer)
            model.apply(self._hook)
        self.model, self.method = model, method
        self.manager.set_state_dict_fns(self.load, self.save)

    def _hook(self, module: nn.Module) -> None:
        if isinstance(module, FSDPModule):
            module.set_all_reduce_hook(
                lambda out: dist.all_reduce(out, group=self.replicate_pg, op=dist.ReduceOp.AVG)
            )

    def save(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def context(self) -> AbstractContextManager[Any]:
        if self.method == "local_sgd":
            return torchft.local_sgd.LocalSGD(
                manager=self.manager,
                model=self.model,
                optimizer=self.optimizer,
                sync_every=SYNC_EVERY,
            )
        if self.method == "diloco":
            fragments = [self.model]
            return torchft.local_sgd.DiLoCo(
                manager=self.manager,
                model_fragments=fragments,
                inner_optimizer=self.optimizer,
                outer_optimizer=[
                    torch.optim.SGD(part.parameters(), lr=0.7, momentum=0.9, nesterov=True)
                    for part in fragments
                ],
                sync_every=SYNC_EVERY,
                should_quantize=False,
                fragment_sync_delay=0,
                fragment_update_alpha=0.0,
            )
        return nullcontext()

    def mean_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return funcol.wait_tensor(funcol.all_reduce(loss, "AVG", group=self.replicate_pg))


class Container(torch.optim.Optimizer):
    """A list of optimizers as one, whose own groups are there for torch's hooks alone."""

    def __init__(self, model: nn.Module) -> None:
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05)]
        super().__init__(list(model.parameters()), {"lr": 0.05})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"all": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, one in zip(self.optimizers, state["all"], strict=True):
            optimizer.load_state_dict(one)


class Titan:
    """torchtitan's own classes around the model."""

    def __init__(self, group: Group, model: nn.Module, method: str | None) -> None:
        from torchtitan.components.optimizer import ParamGroupConfig
        from torchtitan.distributed import utils
        from torchtitan.experiments.torchft.config.job_config import FaultTolerance
        from torchtitan.experiments.torchft.optimizer import TorchFTOptimizersContainer

        self.config = FaultTolerance(
            enable=True,
            process_group="gloo",
            process_group_timeout_ms=20_000,
            replica_id=group.number,
            group_size=2,
            min_replica_size=2,
            semi_sync_method=method,
            sync_steps=SYNC_EVERY,
        )
        self.ft_manager = self.config.build()
        self.manager, self.model, self.utils = self.ft_manager.manager, model, utils
        self.ft_manager.maybe_set_all_reduce_hook([model])
        every = ParamGroupConfig(
            pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 0.05}
        )
        config = TorchFTOptimizersContainer.Config(param_groups=[every], implementation="for-loop")
        self.optimizer = config.build(model_parts=[model], ft_manager=self.ft_manager)
        self.optimizer.init_cache_state_dict()
        self.manager.set_state_dict_fns(self.load, self.save)

    def save(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def context(self) -> AbstractContextManager[Any]:
        from torchtitan.experiments.torchft.manager import maybe_semi_sync_training

        return maybe_semi_sync_training(
            self.config, self.ft_manager, self.model, n_layers=2, optimizer=self.optimizer
        )

    def mean_loss(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.utils.dist_mean(loss, None, self.ft_manager.loss_sync_pg))


def model_of(group: Group) -> nn.Module:
    """A model that FSDP2 shards over the ranks of this group, with weights of its own."""
    store = dist.PrefixStore("fsdp", group._store)
    dist.init_process_group("gloo", store=store, rank=group.rank, world_size=RANKS)
    torch.manual_seed(group.number)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,), mesh_dim_names=("fsdp",)))


def under_torchrun(group: Group) -> None:
    """The variables by which torchrun and its user tell a script where it is."""
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(group.rank), str(RANKS)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = HERE, str(group._store.port)
    os.environ[settings.LIGHTHOUSE] = group.world.wait("lighthouse")


def trains(kind: Callable[..., Any], method: str | None, *paths: Path) -> Callable[[Group], Any]:
    """A story: train `STEPS` steps. Its end: commits, the last mean loss, the model's digest."""

    def story(group: Group) -> Any:
        sys.path[:0] = [str(path) for path in paths]
        under_torchrun(group)
        model, loss = model_of(group), torch.zeros(())
        job = kind(group, model, method)
        with job.context():
            for step in range(STEPS):
                job.optimizer.zero_grad()
                torch.manual_seed(1000 * group.number + step)
                local = model(torch.randn(4, 3)).square().mean()
                local.backward()
                job.optimizer.step()
                if method is None:
                    loss = job.mean_loss(local.detach())
        return job.manager.current_step(), float(loss), digest(model.state_dict())

    return story


def check(ends: list[Any], method: str | None) -> None:
    """Every step or round was committed, and equal ranks of the groups hold equal shards."""
    assert [end[0] for end in ends] == [STEPS if method is None else STEPS // SYNC_EVERY] * 4
    assert [end[1:] for end in ends[:RANKS]] == [end[1:] for end in ends[RANKS:]]


@pytest.mark.parametrize("method", [None, "local_sgd", "diloco"])
def test_the_calls_of_torchtitan(tmp_path: Path, method: str | None) -> None:
    story = trains(Calls, method)
    check(World(tmp_path, min_replicas=2).run(story, story, ranks=RANKS), method)


@pytest.fixture(scope="module")
def torchtitan() -> Path:
    try:
        return fetched(PACKAGES, REPOSITORY / ".venv-torchtitan")
    except CannotFetch as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "local_sgd", "diloco"])
def test_torchtitan_itself(tmp_path: Path, torchtitan: Path, method: str | None) -> None:
    story = trains(Titan, method, torchtitan)
    check(World(tmp_path, min_replicas=2).run(story, story, ranks=RANKS), method)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchtitans_own_tests_of_its_checkpoints(torchtitan: Path) -> None:
    path = torchtitan / "torchtitan/experiments/torchft/tests/test_torchft_checkpoint.py"
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{torchtitan}"}
    done = subprocess.run(
        [*command, path], env=environment, cwd=torchtitan, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
