"""What `torchft simulate` runs: one value, read from YAML or TOML, flags over it.

A file says what differs from the defaults; `difference` gives that back. Settings that hold a list
are swept: every combination is a run. What cannot be is refused before anything runs, with the
nearest known name for one that is not known.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from torchft.arguments import check_integer, check_number
from torchft.errors import SettingsError
from torchft.renamed import renamed_arguments, say_renamed, with_new_names
from torchft.simulator.faults import FaultEvent, FaultSchedule, RandomFailures
from torchft.simulator.network import NetworkModel, NodeProfile
from torchft.simulator.weather import split_weather

__all__ = [
    "DATA",
    "MODELS",
    "STRATEGIES",
    "SimulateConfig",
    "StrategyConfig",
    "difference",
    "from_mapping",
    "needed",
    "read_config",
    "read_part",
    "read_settings",
    "renamed_settings",
    "whole",
]

STRATEGIES = {
    "all_reduce": "torchft.strategies:SimpleReduceStrategy",
    "fedavg": "torchft.strategies:FedAvgStrategy",
    "local_sgd": "torchft.strategies:LocalSGDStrategy",
    "diloco": "torchft.strategies:DiLoCoStrategy",
    "streaming": "torchft.strategies:StreamingDiLoCoStrategy",
    "sparta": "torchft.strategies:SPARTAStrategy",
    "sparta_diloco": "torchft.strategies:SPARTADiLoCoStrategy",
    "demo": "torchft.strategies:DeMoStrategy",
    "topk": "torchft.strategies:TopKStrategy",
}
"""By name: what makes it, as a configuration would write one of its own."""
MODELS = ("mlp", "cnn", "gpt")
DATA = ("digits", "stdlib-text")

EVERYDAY = NetworkModel(
    nodes=(NodeProfile(step_s=0.1, up_bps=100e6, down_bps=100e6, latency_s=0.02),)
)
"""The network unless another is given: a tenth of a second a step, 100 Mbit/s, 20 ms."""


@dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """The name and the settings of one strategy in a sweep."""

    name: str
    """A known one, or "package.module:factory", which is called with the options."""
    label: str = ""
    """In tables and plots; by default the name. Two entries of one name need two labels."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further arguments, as the strategy takes them; `outer_optimizer: {lr: 0.4}` is an
    optimizer, by default SGD."""

    @property
    def shown(self) -> str:
        """What it is called in tables."""
        return self.label or self.name


@renamed_arguments(every="sync_every")
@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """A sweep: each strategy with each of nodes, sync_every, lr and seeds."""

    strategies: tuple[StrategyConfig, ...] = (
        StrategyConfig(name="all_reduce"),
        StrategyConfig(name="fedavg"),
        StrategyConfig(name="diloco"),
    )
    nodes: tuple[int, ...] = (4,)
    sync_every: tuple[int, ...] = (20,)
    """H: inner steps between synchronisations, for the strategies that have it."""
    lr: tuple[float, ...] = (1e-3,)
    seeds: tuple[int, ...] = (0,)

    model: str = "mlp"
    """mlp, cnn, gpt, or "package.module:factory" of a module that takes a batch and returns its
    loss."""
    model_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model."""
    data: str | None = None
    """digits, stdlib-text, a path to text, or "package.module:factory" of a pair of data sets, for
    training and validation. None: what the model is for."""
    optimizer: str = "adamw"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the inner optimizer besides `lr`."""
    max_norm: float | None = None
    """Each node's gradient is clipped to this L2 norm."""

    steps: int = 300
    """Inner steps of each node; see `equal`."""
    batch_size: int = 64
    """Of each node."""
    micro_batch_size: int | None = None
    equal: Literal["tokens", "steps"] = "tokens"
    """When nodes are swept. tokens: with more nodes than the fewest, proportionally fewer steps, so
    that each run sees the same number of samples. steps: the same steps, so more samples."""
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0

    validate_every: int = 50
    """Steps between validations of the mean model; there is one at the end too."""
    val_samples: int = 2048

    device: str = "cpu"
    autocast: bool = False
    deterministic: bool = False
    """Average as `deterministic=True` does over real processes, and count its bytes."""

    network: NetworkModel | None = EVERYDAY
    """Speeds and links, for simulated time. None: there is no simulated time."""
    networks: dict[str, NetworkModel] = field(default_factory=dict)
    """Further networks by name: simulated time on each."""
    faults: FaultSchedule | None = None
    """Failures and joins."""
    target_loss: float | None = None
    """Time-to-loss is the time to this training loss. None: what every run of the sweep reached."""

    def __post_init__(self) -> None:
        for name in ("strategies", "nodes", "sync_every", "lr", "seeds"):
            _check_swept(name, getattr(self, name))
        for name in ("steps", "batch_size", "micro_batch_size", "validate_every", "val_samples"):
            if (value := getattr(self, name)) is not None:
                check_integer(name, value, least=1)
        for name, least in (("nodes", 1), ("sync_every", 1), ("seeds", 0)):
            check_integer(name, min(getattr(self, name)), least=least)
        check_number("lr", min(self.lr), above=0)
        check_integer("warmup_steps", self.warmup_steps, least=0)
        _check_names("model", self.model, MODELS)
        for strategy in self.strategies:
            _check_names("strategies", strategy.name, STRATEGIES)

    @property
    def all_networks(self) -> dict[str, NetworkModel]:
        """All networks by name; the setting `network` is the first, under that name."""
        first = {} if self.network is None else {"network": self.network}
        return {**first, **self.networks}


def from_mapping(given: Mapping[str, Any], *, source: str = "the configuration") -> SimulateConfig:
    """A checked configuration from what a file or flags say.

    Raises:
        SettingsError: a setting that there is not, or a value that cannot be; names all of them.
    """
    pydantic = needed("pydantic")
    adapter = pydantic.TypeAdapter(SimulateConfig)
    try:
        return adapter.validate_python(_spread(given))
    except pydantic.ValidationError as error:
        said = "; ".join(_in_words(one) for one in error.errors())
        raise SettingsError(f"{source}: {said}") from None


def read_config(path: str | Path) -> dict[str, Any]:
    """What a configuration file says. Networks and faults may be files of their own, named relative
    to it.

    Raises:
        SettingsError: a file cannot be read, or is neither YAML nor TOML.
    """
    given, folder = read_settings(path), Path(path).parent
    for name in ("network", "faults", "weather"):
        if name in given:
            given[name] = _part(given[name], folder)
    if isinstance(given.get("networks"), dict):
        given["networks"] = {k: _part(one, folder) for k, one in given["networks"].items()}
    return given


def read_part(path: str | Path) -> dict[str, Any]:
    """What a file of a network or of faults says. A trace is named relative to it.

    Raises:
        SettingsError: as `read_config`.
    """
    given: dict[str, Any] = _part(read_settings(path), Path(path).parent)
    return given


def _part(given: Any, folder: Path) -> Any:
    if isinstance(given, str):
        return read_part(folder / given)
    if isinstance(given, dict) and isinstance(given.get("trace"), str):
        return {**given, "trace": folder / given["trace"]}
    return given


def read_settings(path: str | Path) -> dict[str, Any]:
    """A YAML or TOML file of names and values.

    Raises:
        SettingsError: the file cannot be read as settings.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from error
    loaded = _loaded(path, text)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise SettingsError(
            f"{path} holds a {type(loaded).__name__}, no settings: write `name: value`"
        )
    return loaded


def _loaded(path: Path, text: str) -> object:
    suffix = path.suffix.lower()
    if suffix == ".toml":
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SettingsError(f"{path} is no TOML: {error}") from error
    if suffix not in (".yaml", ".yml"):
        raise SettingsError(f"{path}: call it .yaml, .yml or .toml, so that it is clear what it is")
    yaml = needed("yaml")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is no YAML: {error}") from error


def needed(module: str) -> ModuleType:
    """A library of the extra `simulate`.

    Raises:
        SettingsError: it is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SettingsError(
            f"`torchft simulate` needs {module}, which is not installed ({error}): install "
            "torchft[simulate]"
        ) from error


def difference(config: SimulateConfig) -> dict[str, Any]:
    """Only what differs from the defaults, as a file would say it."""
    return _plain(config, brief=True)


def whole(config: SimulateConfig) -> dict[str, Any]:
    """Every setting, as a file would say it."""
    return _plain(config, brief=False)


def _plain(config: SimulateConfig, *, brief: bool) -> dict[str, Any]:
    adapter = needed("pydantic").TypeAdapter(SimulateConfig)
    dumped = adapter.dump_python(config, exclude_defaults=brief, warnings=False)
    plain: dict[str, Any] = json.loads(json.dumps(dumped, default=str))
    return plain


def renamed_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Put what one file, or all flags, say under the names of now.

    Raises:
        SettingsError: something is given under both names.
    """
    what = "torchft simulate"
    named = with_new_names(what, given, {"every": "sync_every"}, settings=True)
    if "weather" in named:
        both = not named.keys().isdisjoint(("network", "faults"))
        say_renamed(what, "weather", "network and faults", both=both, settings=True)
        old = named.pop("weather")
        network, faults = split_weather(old) if isinstance(old, Mapping) else (old, None)
        named |= {"network": network, "faults": faults}
    return named


def _spread(given: Mapping[str, Any]) -> dict[str, Any]:
    """A single value where a list is swept, and a name where a strategy stands, are fine."""
    spread = renamed_settings(given)
    for name in ("strategies", "nodes", "sync_every", "lr", "seeds"):
        value = spread.get(name)
        if value is not None and not isinstance(value, list | tuple):
            spread[name] = [value]
    if "strategies" in spread and spread["strategies"] is not None:
        spread["strategies"] = [
            {"name": one} if isinstance(one, str) else one for one in spread["strategies"]
        ]
    return spread


def _in_words(error: Mapping[str, Any]) -> str:
    where = [part for part in error["loc"] if not str(part).startswith("function-")]
    name = ".".join(str(part) for part in where)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_at(where[:-1])
        near = difflib.get_close_matches(str(where[-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"there is no setting {name}: {hint}"
    said = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("value_error", "missing") else f", not {error['input']!r}"
    return f"{name}: {said}{given}" if name else said


def _known_at(where: Sequence[object]) -> list[str]:
    """The settings that there are at a place."""
    homes: dict[str, type] = {
        "strategies": StrategyConfig,
        "network": NetworkModel,
        "networks": NetworkModel,
        "faults": FaultSchedule,
        "nodes": NodeProfile,
        "events": FaultEvent,
        "failures": RandomFailures,
    }
    named = [homes[part] for part in where if isinstance(part, str) and part in homes]
    return sorted(one.name for one in dataclasses.fields(named[-1] if named else SimulateConfig))


def _check_swept(name: str, values: Sequence[Any]) -> None:
    _check(len(values) > 0, f"{name} is empty: give at least one")
    keys = [value.shown if isinstance(value, StrategyConfig) else value for value in values]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    hint = ": give each a label of its own" if name == "strategies" else ""
    _check(not twice, f"{name} has {', '.join(twice)} twice{hint}")


def _check_names(setting: str, name: str, known: Collection[str]) -> None:
    if name in known or ":" in name:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    own = "your own is written package.module:factory"
    raise SettingsError(f"{setting}: nothing is called {name!r}: {hint} ({own})")


def _check(good: bool, otherwise: str) -> None:
    if not good:
        raise SettingsError(otherwise)


_OWNERS: tuple[Any, ...] = (
    SimulateConfig,
    StrategyConfig,
    NetworkModel,
    FaultSchedule,
    NodeProfile,
    FaultEvent,
    RandomFailures,
)
for _owner in _OWNERS:
    _owner.__pydantic_config__ = {"extra": "forbid"}  # pydantic reads this: no key is passed over
