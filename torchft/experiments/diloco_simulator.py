"""DiLoCo over simulated nodes, in the manner of diloco-sim.

    simulator = DilocoSimulator(
        model_cls=CNN, model_kwargs={"num_classes": 100},
        train_dataset=train_dataset, loss_fn=torch.nn.functional.cross_entropy,
    )
    result = simulator.train()

Here a model takes inputs and returns outputs, `loss_fn(output, y)` makes the loss of them, and the
data yields pairs `(x, y)`.

Every `diloco_interval` steps of the nodes, exactly, the outer optimizer steps, also after the very
last step if that is one of them. Steps that are left over after it are not synchronised: the
result's model is then the mean of the nodes' own.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchft.arguments import check_integer
from torchft.errors import SettingsError
from torchft.experiments.checkpoint import write_whole
from torchft.experiments.devices import usable_devices
from torchft.experiments.diloco_process import (
    DilocoProcess,
    DilocoProgram,
    EvalStats,
    TrainStats,
    overridden,
)
from torchft.experiments.loggers import Kind, Row
from torchft.experiments.trainer import Trainer
from torchft.simulator.copies import copied
from torchft.simulator.result import Result
from torchft.simulator.seeds import kept_rng, seed_everything
from torchft.strategies import DiLoCoStrategy, OptimSpec, SPARTADiLoCoStrategy, Strategy

__all__ = ["DilocoSimulator", "DilocoSimulatorConfig", "EvalStats", "TrainStats"]


def _outer_defaults() -> dict[str, Any]:
    return {"lr": 0.7, "nesterov": True, "momentum": 0.9}


@dataclass(kw_only=True)
class DilocoSimulatorConfig:
    """All options of a simulation, for `DilocoSimulator(config)`."""

    model_cls: Callable[..., nn.Module]
    loss_fn: Callable[[Any, Any], Tensor]
    train_dataset: Dataset[Any]
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    optimizer_kwargs: Mapping[str, Any] = field(default_factory=lambda: {"lr": 0.001})
    optimizer_cls: type[torch.optim.Optimizer] = torch.optim.AdamW
    num_nodes: int = 4
    diloco_interval: int = 500
    """Steps of each node between two outer steps."""
    batch_size: int = 16
    eval_dataset: Dataset[Any] | None = None
    eval_iters: int = 400
    """Batches of one evaluation."""
    eval_interval: int | None = 1000
    """Steps between two evaluations; None: `diloco_interval`."""
    ckpt_interval: int | None = None
    """Outer steps between two checkpoints, in `save_dir`."""
    save_dir: str | Path | None = None
    """Gets `model.pt`, the state dict of the trained model, and the checkpoints."""
    num_epochs: int = 1
    max_local_step: int | None = None
    """Steps of each node, if that ends before the epochs do."""
    outer_optimizer_cls: type[torch.optim.Optimizer] = torch.optim.SGD
    outer_optimizer_kwargs: Mapping[str, Any] = field(default_factory=_outer_defaults)
    cosine_anneal: bool = False
    """The inner rate falls along a half cosine to a tenth, at the end of the run."""
    warmup_steps: int = 0
    max_norm: float | None = None
    """Each node's gradient is clipped to this L2 norm."""
    max_minibatch_size: int | None = None
    """Samples that go through the model at once; their gradients are averaged."""
    p_sparta: float = 0.0
    """Share of the weights that SPARTA averages between outer steps."""
    sparta_interval: int = 1
    async_sparta_delay: int = 0
    """Only 0: what SPARTA averages is written back in the same step."""
    corr_interval: int | None = None
    """Steps between two comparisons of the nodes' weights, in `Result.correlations`."""
    model_path: str | Path | None = None
    """A state dict that all nodes start from."""
    wandb_project: str | None = None
    wandb_name: str | None = None
    run_name: str | None = None
    """Name of the folder of checkpoints; `wandb_name` where that is given."""
    port: int | None = None
    """For scripts that give one: simulated nodes have no ports."""
    devices: Sequence[int] | None = None
    """Numbers of CUDA devices; several: a real process for each node."""
    device: torch.device | str | None = None
    """By default the best that is there."""
    seed: int = 42
    resume: bool | str | Path = False
    """Go on from the newest checkpoint of `run_name` in `save_dir`, or from a file or folder."""
    train_loss_hook: Callable[[TrainStats], None] | None = None
    """Called after each step."""
    eval_loss_hook: Callable[[EvalStats], None] | None = None
    """Called twice for each evaluation: with the local figures and with the global ones."""

    def check(self) -> None:
        """Refuse what this class alone knows to be wrong; the Trainer refuses the rest.

        Raises:
            SettingsError: which option, and what would do.
        """
        for name in ("num_nodes", "diloco_interval", "batch_size", "eval_iters"):
            check_integer(name, getattr(self, name), least=1)
        for name in ("eval_interval", "ckpt_interval", "max_minibatch_size", "max_local_step"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        self._check_calls()
        if self.async_sparta_delay:
            raise SettingsError(
                f"async_sparta_delay={self.async_sparta_delay}: SPARTA works without a delay here; "
                "leave it out"
            )
        if self.save_dir is None and (self.ckpt_interval is not None or self.resume is True):
            raise SettingsError("checkpoints need a folder: give save_dir=…")

    def _check_calls(self) -> None:
        if isinstance(self.model_cls, nn.Module):
            name = type(self.model_cls).__name__
            raise SettingsError(f"model_cls is a {name}: give the class, and model_kwargs={{…}}")
        _check_callable("model_cls", self.model_cls)
        _check_callable("loss_fn", self.loss_fn)
        for hook in ("train_loss_hook", "eval_loss_hook"):
            if getattr(self, hook) is not None:
                _check_callable(hook, getattr(self, hook))
        for name in ("model_kwargs", "optimizer_kwargs", "outer_optimizer_kwargs"):
            if not isinstance(getattr(self, name), Mapping):
                raise SettingsError(f"{name}={getattr(self, name)!r}: give a dict of arguments")


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise SettingsError(f"{name}={value!r}: give a function")
    if name != "model_cls" and isinstance(value, type) and issubclass(value, nn.Module):
        raise SettingsError(f"{name} is the class {value.__name__}: give an instance of it")


class DilocoSimulator(DilocoProcess):
    """`train()` runs it. Options as keywords, or as one `DilocoSimulatorConfig`.

    Required: `model_cls`, `loss_fn`, `train_dataset`. Usual ones, with what they are by default:

        model_kwargs             {}              num_nodes          4
        optimizer_cls            AdamW           diloco_interval    500
        optimizer_kwargs         {lr 0.001}      batch_size         16
        outer_optimizer_cls      SGD             num_epochs         1
        outer_optimizer_kwargs   {lr 0.7, nesterov, momentum 0.9}
        eval_dataset             None            max_local_step     None
        eval_iters               50              cosine_anneal      False
        ckpt_interval, save_dir  None            train_loss_hook, eval_loss_hook   None

    All others of the config may be given too. Two defaults differ between the two forms: a config
    has `eval_iters=400` and `eval_interval=1000`; with keywords there is an evaluation of 50
    batches after every outer step.

    Raises:
        TypeError: an option that there is not, or one that is missing.
        SettingsError: a value that cannot work.
    """

    def __init__(self, config: DilocoSimulatorConfig | None = None, /, **options: Any) -> None:
        if config is None:
            config = DilocoSimulatorConfig(**{"eval_iters": 50, "eval_interval": None, **options})
        elif options:
            raise TypeError(f"give a config or keywords, not both: {', '.join(options)}")
        if not isinstance(config, DilocoSimulatorConfig):
            raise TypeError(f"a {type(config).__name__} is no DilocoSimulatorConfig")
        config.check()
        if usable_devices(config.devices) is not config.devices:
            config = dataclasses.replace(config, devices=None)
        if config.port is not None:
            warnings.warn(f"port={config.port} is not needed: nodes have no ports", stacklevel=2)
        self.config = config
        self.result: Result | None = None
        """Of the last `train`."""
        self.model: nn.Module | None = None
        """The trained model, after `train`: the mean of all nodes."""

    def load_model(self, path: str | Path) -> None:
        """All nodes will start from this state dict."""
        self.config = dataclasses.replace(self.config, model_path=path)

    def train(self) -> Result:
        """Run to the end, over a real process for each node where a subclass has methods of its
        own: see `diloco_process`."""
        config, own = self.config, bool(overridden(self))
        trainer = Trainer(
            _copyable(self._paired),
            config.train_dataset,
            None if own else config.eval_dataset,
            device=config.device,
            devices=config.devices,
        )
        interval = config.ckpt_interval
        try:
            trainer.fit(
                config.num_epochs,
                DilocoProgram(copy.copy(self)) if own else self._strategy(),
                config.num_nodes,
                max_steps=config.max_local_step,
                batch_size=config.batch_size,
                minibatch_size=config.max_minibatch_size or config.batch_size,
                val_size=config.eval_iters * config.batch_size,
                val_interval=config.eval_interval or config.diloco_interval,
                correlation_interval=config.corr_interval,
                checkpoint_interval=None if own else interval and interval * config.diloco_interval,
                save_dir=config.save_dir or ".",
                run_name=config.run_name or config.wandb_name,
                wandb_project=config.wandb_project,
                logger=[_Hooks(config.train_loss_hook, config.eval_loss_hook)],
                seed=config.seed,
                resume=config.resume,
                processes=own or len(config.devices or ()) > 1,
            )
        finally:  # of a run that broke off, what it had got by then
            self.result = None if trainer.result is None else _unwrapped(trainer.result)
        assert self.result is not None
        self.model = self.result.model
        self._keep()
        return self.result

    def _paired(self) -> nn.Module:
        return _Paired(self._build_model(), self.config.loss_fn)

    def _build_model(self) -> nn.Module:
        config = self.config
        with kept_rng(torch.device("cpu")):
            seed_everything(config.seed)
            model = _made(config)
        if config.model_path is not None:
            try:
                model.load_state_dict(
                    torch.load(config.model_path, map_location="cpu", weights_only=True)
                )
            except (OSError, RuntimeError) as error:
                raise SettingsError(f"model_path={config.model_path}: {error}") from error
        return model

    def _strategy(self) -> Strategy:
        config = self.config
        inner = OptimSpec(config.optimizer_cls, **config.optimizer_kwargs)
        outer = OptimSpec(config.outer_optimizer_cls, **config.outer_optimizer_kwargs)
        common: dict[str, Any] = {"H": config.diloco_interval, "max_norm": config.max_norm}
        if config.warmup_steps or config.cosine_anneal:
            common["lr_scheduler"] = "lambda_cosine"
            common["lr_scheduler_kwargs"] = {
                "warmup_steps": config.warmup_steps,
                "cosine_anneal": config.cosine_anneal,
            }
        if not config.p_sparta:
            return DiLoCoStrategy(inner, outer, **common)
        return SPARTADiLoCoStrategy(
            inner,
            outer,
            p_sparta=config.p_sparta,
            sparta_interval=config.sparta_interval,
            **common,
        )

    def _keep(self) -> None:
        if self.config.save_dir is not None and self.model is not None:
            write_whole(Path(self.config.save_dir) / "model.pt", self.model.state_dict())


def _documented() -> inspect.Signature:
    """The keywords of `DilocoSimulator`, with what they are by default there."""
    own: dict[str, Any] = {"eval_iters": 50, "eval_interval": None}
    parameters = [
        inspect.Parameter("config", inspect.Parameter.POSITIONAL_ONLY, default=None),
    ]
    for one in dataclasses.fields(DilocoSimulatorConfig):
        default = one.default
        if one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        elif default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        parameters.append(
            inspect.Parameter(
                one.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=own.get(one.name, default),
                annotation=one.type,
            )
        )
    return inspect.Signature(parameters)


DilocoSimulator.__signature__ = _documented()  # type: ignore[attr-defined]


class _Paired(nn.Module):
    """A model that takes the batch and returns its loss, made of one that takes inputs."""

    def __init__(self, net: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.net = net
        self._loss_fn = loss_fn

    def forward(self, batch: Any) -> Tensor:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            parts = f" of {len(batch)}" if isinstance(batch, Sized) else ""
            raise SettingsError(
                f"the data yields a {type(batch).__name__}{parts}: here it must be pairs (x, y), "
                "for loss_fn(model(x), y)"
            )
        x, y = batch
        loss = self._loss_fn(self.net(x), y)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise SettingsError(
                f"loss_fn returned a {type(loss).__name__}{shape}: it must return one number, as "
                'with reduction="mean"'
            )
        return loss


def _copyable(make: Callable[[], nn.Module]) -> nn.Module | Callable[[], nn.Module]:
    """The model that all nodes get copies of; where it has none, what makes it for each."""
    model = make()
    try:
        copied(model)
    except SettingsError:
        return make
    return model


def _made(config: DilocoSimulatorConfig) -> nn.Module:
    try:
        return config.model_cls(**config.model_kwargs)
    except TypeError as error:
        given = ", ".join(f"{name}={value!r}" for name, value in config.model_kwargs.items())
        raise SettingsError(
            f"model_cls cannot be made with model_kwargs ({given}): {error}"
        ) from error


def _unwrapped(result: Result) -> Result:
    """The user's own models instead of ours around them."""
    result.models = [_net(model) for model in result.models]
    result.model = None if result.model is None else _net(result.model)
    return result


def _net(model: nn.Module) -> nn.Module:
    assert isinstance(model, _Paired)
    return model.net


class _Hooks:
    """A logger that calls the user's functions."""

    def __init__(
        self,
        train: Callable[[TrainStats], None] | None,
        evaluation: Callable[[EvalStats], None] | None,
    ) -> None:
        self._train, self._evaluation = train, evaluation

    def start(self, config: Mapping[str, Any], past: Sequence[tuple[Kind, Row]]) -> None:
        """Nothing to open; hooks have seen the past of a run that resumes."""

    def log(self, kind: Kind, row: Row) -> None:
        """Call whoever waits for it."""
        if kind == "train" and self._train is not None:
            self._train(TrainStats(row["train_loss"], row["train_perplexity"]))
        elif kind == "validation" and self._evaluation is not None:
            for name, glob in (("local", False), ("global", True)):
                stats = EvalStats(row[f"{name}_loss"], row[f"{name}_perplexity"], glob)
                self._evaluation(stats)

    def close(self) -> None:
        """Do nothing, since there is nothing to close."""
