"""All that a run is made from, refused before its first step where it cannot work.

    Experiment(model, dataset, strategy=Strategy([DiLoCoRecipe(outer, 20)], inner=Inner()),
               num_nodes=4, max_steps=300, batch_size=64)

One value describes it for every runtime: rows of one process, or real processes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchft.arguments import check_choice, check_integer
from torchft.errors import SettingsError
from torchft.renamed import say_renamed
from torchft.seeds import seed64
from torchft.simulator.copies import copied
from torchft.simulator.events import Event, check_events, check_list
from torchft.simulator.faults import FaultSchedule
from torchft.simulator.feed import Feed
from torchft.simulator.network import NetworkModel
from torchft.simulator.node import TrainNode
from torchft.simulator.program import SPMDStrategy
from torchft.simulator.seeds import kept_rng, seed_everything
from torchft.simulator.weather import Weather
from torchft.strategies.checks import check_recipes
from torchft.strategies.inner import Inner
from torchft.strategies.strategy import Strategy

__all__ = ["Experiment"]

_MODEL = 1 << 34


@dataclass(kw_only=True)
class Experiment:
    """`check` says whether it can run."""

    model: nn.Module | Callable[[], nn.Module]
    """Takes a batch and returns its loss. It is copied for each node, never trained itself."""
    train_dataset: Any
    """A data set, tensors, or a factory `(rank, num_nodes, is_training) -> data set`."""
    strategy: Strategy
    num_nodes: int
    val_dataset: Any = None
    max_steps: int | None = None
    """Inner steps of each node."""
    num_epochs: int | None = None
    """Passes of all nodes together through the data. With both, whichever ends first."""
    batch_size: int = 16
    """Of each node."""
    micro_batch_size: int | None = None
    """How many samples go through the model at once. None: the batch."""
    seed: int = 42
    shuffle: bool = True
    device: torch.device | str | None = None
    """None: the first of CUDA, MPS and CPU that is there."""
    autocast: bool | torch.dtype = False
    """True: bfloat16."""
    deterministic: bool = False
    """Average in node order also where processes talk, so that all runtimes compute equal bits, if
    each has one thread: processes have, and a Trainer sees to it."""
    digests: bool = False
    """Take each node's digest after every step in which a round committed."""
    node_cls: type[TrainNode] = TrainNode
    dataloader_kwargs: Mapping[str, Any] | None = None
    events: Sequence[Event] = ()
    network: NetworkModel | None = None
    """Speeds and links, for the simulated time of the run."""
    faults: FaultSchedule | None = None
    """Failures and joins besides `events`."""
    weather: InitVar[Weather | None] = None
    """Deprecated: network and faults in one."""
    _feed: Feed | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self, weather: Any) -> None:
        if weather is None:
            return
        if not isinstance(weather, Weather):
            raise SettingsError(f"weather={weather!r}: give network=NetworkModel(…)")
        both = self.network is not None or self.faults is not None
        say_renamed(f"{__name__}.Experiment", "weather", "network and faults", both=both)
        self.network, self.faults = weather, weather.faults

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            SettingsError: which setting, and what would do.
        """
        for name in ("num_nodes", "batch_size", "micro_batch_size", "max_steps", "num_epochs"):
            value = getattr(self, name)
            if value is not None or name in ("num_nodes", "batch_size"):
                check_integer(name, value, least=1)
        check_integer("seed", self.seed)
        if self.max_steps is None and self.num_epochs is None:
            raise SettingsError("say how long to train: max_steps or num_epochs")
        if not isinstance(self.strategy, Strategy):
            raise SettingsError(f"strategy is {_what(self.strategy)}, not a Strategy")
        if not isinstance(self.strategy, SPMDStrategy):
            check_recipes(self.strategy.recipes)
        if not isinstance(self.model, nn.Module) and not callable(self.model):
            raise SettingsError(f"model is {_what(self.model)}, not a torch module")
        _check_model_factory(self.model)
        if not (isinstance(self.node_cls, type) and issubclass(self.node_cls, TrainNode)):
            if isinstance(self.node_cls, TrainNode):
                name = type(self.node_cls).__name__
                raise SettingsError(f"node_cls is a {name}, and must be the class: give {name}")
            raise SettingsError(f"node_cls={self.node_cls!r} is no subclass of TrainNode")
        self._check_types()
        self.inner.try_out(self.torch_device)
        _ = self.autocast_dtype
        self.feed().check()
        check_events(self.num_nodes, self.all_events())
        self._warn_of_late_events()

    def _check_types(self) -> None:
        for name in ("shuffle", "deterministic", "digests"):
            check_choice(name, getattr(self, name), (True, False))
        check_list(self.events)
        for name, kind in (("network", NetworkModel), ("faults", FaultSchedule)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise SettingsError(f"{name}={value!r}: give a torchft.simulator.{kind.__name__}")

    def _warn_of_late_events(self) -> None:
        """No error: a run that stops early and resumes has the events of the whole."""
        for event in self.events:
            if event.step >= self.total_steps:
                warnings.warn(
                    f"{event} does not happen: the run ends after {self.total_steps} steps, and "
                    "events count from 0",
                    UserWarning,
                    stacklevel=4,
                )

    def warn_of_silence(self, rounds: Sequence[object]) -> None:
        """At the end: say so if the nodes never talked to each other."""
        if rounds or self.num_nodes == 1:
            return
        warnings.warn(
            f"{self.strategy!r} opened no round in {self.total_steps} steps, so the "
            f"{self.num_nodes} nodes trained each for itself: synchronise more often (a smaller "
            "H), or train for more steps",
            UserWarning,
            stacklevel=3,
        )

    @property
    def torch_device(self) -> torch.device:
        """Where it runs.

        Raises:
            SettingsError: such a device is not there.
        """
        if self.device is None:
            return torch.device(_best_device())
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise SettingsError(f"device={self.device!r}: {error}") from None
        _check_device(device)
        return torch.device("cuda", device.index or 0) if device.type == "cuda" else device

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """None: no autocast.

        Raises:
            SettingsError: a type that needs its losses scaled.
        """
        if self.autocast not in (False, True, torch.bfloat16):
            raise SettingsError(f"autocast={self.autocast}: use True or torch.bfloat16")
        return torch.bfloat16 if self.autocast else None

    @property
    def inner(self) -> Inner:
        """How each node steps.

        Raises:
            SettingsError: the strategy does not say.
        """
        if self.strategy.inner is None:
            raise SettingsError(
                "the strategy has no inner optimizer: give Strategy(…, inner=Inner(OptimSpec(…)))"
            )
        return self.strategy.inner

    @property
    def total_steps(self) -> int:
        """How many inner steps each node takes."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.num_epochs is not None:
            limits.append(self.num_epochs * self.feed().batches_per_epoch)
        return min(limits)

    def feed(self) -> Feed:
        """The training batches. The same object at every call, so a factory is asked once."""
        if self._feed is None:
            self._feed = Feed(
                self.train_dataset,
                num_nodes=self.num_nodes,
                batch_size=self.batch_size,
                shuffle=self.shuffle,
                seed=self.seed,
                dataloader_kwargs=self.dataloader_kwargs,
            )
        return self._feed

    def all_events(self) -> list[Event]:
        """All failures and joins of the run: those of `events`, then those of `faults`."""
        events = list(self.events)
        if self.faults is not None:
            events += self.faults.to_events(self.num_nodes, self.total_steps, self.network)
        return events

    def make_model(self) -> nn.Module:
        """What every node starts from, on the device: a copy, or from the factory, seeded.

        Raises:
            SettingsError: the factory makes something else, or a parameter has no numbers yet.
        """
        if isinstance(self.model, nn.Module):
            model = copied(self.model)
        else:
            seed_everything(seed64(self.seed, _MODEL, 0))
            model = self.model()
            if not isinstance(model, nn.Module):
                raise SettingsError(f"the model factory made {_what(model)}, no torch module")
            if isinstance(self.model, type) and not list(model.parameters()):
                raise SettingsError(
                    f"model is {_what(self.model)}; as it is, it makes a module without parameters"
                )
        _check_filled(model)
        if not model.training:
            model.train()  # the whole was left in evaluation mode; parts of it stay as they are
        return model.to(self.torch_device)

    def remake_model(self) -> nn.Module:
        """The same while a run goes on, whose random numbers stay as they are."""
        with kept_rng(self.torch_device):
            return self.make_model()

    def make_node(self, model: nn.Module, node: int) -> TrainNode:
        """One node's forward and backward pass."""
        made = self.node_cls(
            model, node=node, device=self.torch_device, autocast=self.autocast_dtype
        )
        made.batch_size = self.batch_size
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_feed": None}


def _what(value: object) -> str:
    """What somebody gave, for a message; a class is told how it becomes an instance."""
    if isinstance(value, type):
        return f"the class {value.__name__}: give an instance, {value.__name__}(…)"
    return f"a {type(value).__name__}"


def _check_model_factory(model: nn.Module | Callable[[], nn.Module]) -> None:
    if isinstance(model, nn.Module):
        return
    try:
        inspect.signature(model).bind()
    except TypeError as error:
        raise SettingsError(
            f"the model factory {getattr(model, '__name__', model)!r} is called without arguments "
            f"({error}): give a module, or functools.partial(…) with its arguments"
        ) from None
    except ValueError:
        return  # written in C: it has no signature to look at


def _check_filled(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise SettingsError(
                f"{name} has no shape before its first batch: send one batch through the model"
            )
        if tensor.is_meta:
            raise SettingsError(
                f"{name} is on the device meta, without numbers: build the model on the CPU, or "
                "call to_empty and initialise it"
            )


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda:0"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(f"device={str(device)!r}, but CUDA is not there: use device='cpu'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"device={str(device)!r}: there are {torch.cuda.device_count()}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError(f"device={str(device)!r}, but MPS is not there: use device='cpu'")
    if device.type not in ("cpu", "cuda", "mps"):
        raise SettingsError(f"device={str(device)!r}: use cpu, cuda or mps")
