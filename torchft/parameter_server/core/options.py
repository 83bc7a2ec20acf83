"""The server's settings, and the few that all workers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from torchft.arguments import check_choice, check_integer, check_number
from torchft.errors import SettingsError
from torchft.parameter_server.core.delayed_nesterov import DelayedNesterov
from torchft.parameter_server.core.rules import Mode, Rules
from torchft.quantization import codec_names
from torchft.renamed import renamed_arguments
from torchft.strategies.optim_spec import OptimSpec
from torchft.strategies.parts.outer import FlatOuter

__all__ = ["OuterOptions", "ServerOptions", "SharedSettings", "check_shared"]

MOST = 1_000_000
"""Of inner steps between two submissions, and of fragments: more is a mistake, or malice."""


def check_shared(sync_every: int, codec: str, fragments: int, name: str = "fragments") -> None:
    """Refuse settings that no run can have; `name` is what the caller has for `fragments`.

    Raises:
        SettingsError: names the setting and its value.
    """
    check_integer("sync_every", sync_every, least=1, most=MOST)
    check_integer(name, fragments, least=1, most=MOST)
    check_choice("codec", codec, codec_names())
    if fragments > sync_every:
        raise SettingsError(
            f"{name}={fragments} do not fit into sync_every={sync_every} steps: each needs a step "
            "of its own"
        )


@dataclass(frozen=True)
class SharedSettings:
    """What must be equal at all workers. The server's word holds; what it leaves open is what the
    first worker asks for."""

    sync_every: int = 500
    """Inner steps between two submissions of a fragment."""
    codec: str = "bf16"
    """How numbers travel, both ways."""
    fragments: int = 1

    def __post_init__(self) -> None:
        check_shared(self.sync_every, self.codec, self.fragments)

    def differences(self, wished: Mapping[str, Any]) -> list[str]:
        """In words, what somebody wished for and does not get."""
        return [
            f"{name} {value}, not {wished[name]}"
            for name, value in asdict(self).items()
            if wished.get(name) not in (None, value)
        ]


@dataclass(frozen=True)
class OuterOptions:
    """SGD with Nesterov momentum, or its delayed form."""

    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    dn_buffer_size: int | None = None
    """Submissions to a turn of the delayed momentum, asynchronous only. None: as many as workers
    are expected; 0: momentum moves with every submission."""

    def __post_init__(self) -> None:
        check_number("outer_lr", self.lr, above=0)
        check_number("outer_momentum", self.momentum, least=0, below=1)
        if self.dn_buffer_size is not None:
            check_integer("dn_buffer_size", self.dn_buffer_size, least=0)

    @property
    def settings(self) -> dict[str, Any]:
        """The same as keyword arguments of torch's SGD."""
        nesterov = self.nesterov and self.momentum > 0
        return {"lr": self.lr, "momentum": self.momentum, "nesterov": nesterov}

    def changed(self, lr: float | None, momentum: float | None) -> OuterOptions:
        """The options with another learning rate or momentum; None keeps the old one.

        Raises:
            SettingsError: a value cannot be.
        """
        lr = self.lr if lr is None else lr
        return replace(self, lr=lr, momentum=self.momentum if momentum is None else momentum)

    def build(self, rules: Rules) -> FlatOuter | DelayedNesterov:
        """The outer step that a run with these options and `rules` takes.

        Raises:
            SettingsError: a delayed momentum was asked for, and rounds are not asynchronous.
        """
        if rules.mode is Mode.ASYNCHRONOUS:
            buffer = rules.workers if self.dn_buffer_size is None else self.dn_buffer_size
            if buffer:
                return DelayedNesterov(lr=self.lr, momentum=self.momentum, buffer=buffer)
        elif self.dn_buffer_size:
            raise SettingsError("dn_buffer_size is for asynchronous rounds: add --async")
        return FlatOuter(OptimSpec(torch.optim.SGD, **self.settings))


@renamed_arguments(outer="outer_optimizer")
@dataclass(frozen=True)
class ServerOptions:
    """All that `diloco server` takes, but the address and the tokens."""

    output_dir: Path
    rules: Rules
    outer_optimizer: OuterOptions = field(default_factory=OuterOptions)
    model: Path | None = None
    """Folder with safetensors to start from; None: the first worker's weights."""
    from_checkpoint: Path | None = None
    save_every: int = 10
    """Rounds between two checkpoints; 0: none is ever written."""
    save_total_limit: int = 3
    """Checkpoints that are kept; 0: all."""
    dylu: bool = False
    dylu_base_sync_every: int | None = None
    norm_bound: float = 10.0
    sync_every: int | None = None
    codec: str | None = None
    fragments: int | None = None

    def __post_init__(self) -> None:
        for name in ("save_every", "save_total_limit"):
            check_integer(name, getattr(self, name), least=0)
        for name in ("dylu_base_sync_every", "sync_every", "fragments"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1, most=MOST)
        check_number("norm_bound", self.norm_bound, least=0)
        if self.dylu and self.rules.mode is Mode.SYNCHRONOUS:
            raise SettingsError(
                "dylu gives slower workers fewer steps, which a synchronous round cannot use: "
                "choose --async or --mode decoupled"
            )
        self.outer_optimizer.build(self.rules)

    @property
    def fixed(self) -> dict[str, Any]:
        """The shared settings that these options fix, by name; the others are left open."""
        own = {field.name: getattr(self, field.name) for field in fields(SharedSettings)}
        return {name: value for name, value in own.items() if value is not None}

    def agree(self, wished: Mapping[str, Any]) -> SharedSettings:
        """The settings that the server and the first worker agree on; the server's come first.

        Raises:
            SettingsError: it asks for what cannot be.
        """
        names = [field.name for field in fields(SharedSettings)]
        asked = {name: wished[name] for name in names if wished.get(name) is not None}
        return SharedSettings(**{**asked, **self.fixed})
