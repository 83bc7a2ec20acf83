"""What the example is asked to do: a YAML file, flags over it. Unknown keys are errors.

For the `diloco` section: flag over `DILOCO_*` variable (what `diloco worker` was given) over file.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from torchft.arguments import at_least
from torchft.errors import SettingsError

__all__ = ["Asked", "Data", "Diloco", "Model", "Train", "command_line", "read"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """A Llama, made anew. The default has 1.3 million parameters."""

    context: int = Field(128, ge=2)  # bytes
    width: int = Field(128, ge=2)
    layers: int = Field(6, ge=1)
    heads: int = Field(4, ge=1)
    seed: int = 0


class Data(Section):
    """None of `paths` and `hub`: the standard library's sources."""

    paths: tuple[Path, ...] = ()
    hub: str | None = None  # a data set's name, such as roneneldan/TinyStories
    split: str = "train"  # part of its files' names
    column: str = "text"  # of parquet files
    max_bytes: int = Field(64 << 20, ge=1)
    held_out_windows: int = Field(64, ge=1)
    num_shards: int = Field(1, ge=1)
    shard_index: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Data:
        if self.shard_index >= self.num_shards:
            raise ValueError(f"shard {self.shard_index} of {self.num_shards}: they count from 0")
        if self.paths and self.hub:
            raise ValueError("give paths or hub, not both")
        return self


class Train(Section):
    """Of the Trainer."""

    max_steps: int = Field(2000, ge=1)
    batch: int = Field(8, ge=1)  # windows in a micro batch
    accumulate: int = Field(1, ge=1)  # micro batches in a step
    lr: float = Field(2e-3, gt=0)
    warmup_steps: int = Field(20, ge=0)
    log_every: int = Field(10, ge=1)  # steps
    save_every: int = Field(500, ge=0)  # steps; 0: never
    seed: int = 0


class Diloco(Section):
    """What is None comes from its variable, or is the default."""

    server: str | None = None
    sync_every: int | None = Field(None, ge=1)
    num_fragments: int | None = Field(None, ge=1)
    worker_id: str | None = None
    codec: str | None = None
    dylu: bool | None = None
    heartbeat_interval_s: float | None = Field(None, ge=0)


class Asked(Section):
    """The whole of it; `diloco` None: a run that has no server."""

    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    diloco: Diloco | None = None
    output_dir: Path = Path("out/parameter_server")


_VARIABLES = {
    "server": "DILOCO_SERVER",
    "sync_every": "DILOCO_SYNC_EVERY",
    "num_fragments": "DILOCO_NUM_FRAGMENTS",
    "worker_id": "DILOCO_WORKER_ID",
    "codec": "DILOCO_CODEC",
    "dylu": "DILOCO_DYLU",
    "heartbeat_interval_s": "DILOCO_HEARTBEAT_INTERVAL",
}
"""Field → the variable that `diloco worker` sets for it, which goes over the file."""


def command_line() -> argparse.ArgumentParser:
    """`train.py -p DIR -t CONFIG.yaml train …`; a flag that is not typed leaves the file's word."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Train a tiny causal model on stories.")
    add = parser.add_argument
    add("-p", "--project", type=Path, default=here, metavar="DIR", help="with the YAML files")
    add("-t", "--template", default="default.yaml", metavar="FILE", help="default default.yaml")
    add("verb", nargs="?", choices=["train"], default="train")
    add("--output-dir", type=Path, metavar="DIR")
    add("--data", type=Path, action="append", metavar="PATH", help="text or parquet; repeatable")
    add("--hub", metavar="NAME", help="a data set of the hub, such as roneneldan/TinyStories")
    add("--num-shards", type=at_least(1), metavar="N", help="parts of the texts")
    add("--shard-index", type=at_least(0), metavar="I", help="the part to train on, from 0")
    add("--max-steps", type=at_least(1), metavar="N")
    add("--log-every", type=at_least(1), metavar="N")
    add("--resume", action="store_true", help="from the newest checkpoint in the output folder")
    add("--end-file", type=Path, metavar="FILE", help="end at the outer step that it holds")
    server = parser.add_argument_group("parameter server")
    server.add_argument("--diloco-server", metavar="HOST:PORT")
    server.add_argument("--diloco-sync-every", type=at_least(1), metavar="H")
    server.add_argument("--diloco-worker-id", metavar="ID")
    server.add_argument("--diloco-no-bf16", action="store_const", const="fp32", help="send fp32")
    server.add_argument("--diloco-dylu", action="store_const", const=True)
    server.add_argument("--diloco-heartbeat", type=float, metavar="S", help="seconds; 0: none")
    server.add_argument("--diloco-fragments", type=at_least(1), metavar="N")
    return parser


def read(typed: argparse.Namespace) -> Asked:
    """The file, and what was typed over it.

    Raises:
        SettingsError: a file that cannot be read, a key or a value that cannot be.
    """
    path = typed.project / typed.template
    try:
        text = path.read_text()
        held = yaml.safe_load(text) or {}
        if not isinstance(held, dict):
            raise SettingsError(f"{path} holds no sections, but {str(held)[:40]!r}")
        asked = Asked(**held)
        return Asked(**_over(asked, typed))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}; see -p and -t") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is no YAML: {error}") from error
    except ValidationError as error:
        raise SettingsError(f"{path}: {_said(error)}") from error


def _over(asked: Asked, typed: argparse.Namespace) -> dict[str, Any]:
    train = {"max_steps": typed.max_steps, "log_every": typed.log_every}
    data = {
        "paths": typed.data,
        "hub": typed.hub,
        "num_shards": typed.num_shards,
        "shard_index": typed.shard_index,
    }
    found = {
        **asked.model_dump(),
        "data": _with(asked.data, data),
        "train": _with(asked.train, train),
        "diloco": _diloco(asked.diloco, typed),
    }
    if typed.output_dir is not None:
        found["output_dir"] = typed.output_dir
    elif found["data"]["num_shards"] > 1:
        found["output_dir"] = Path(f"{asked.output_dir}_shard{found['data']['shard_index']}")
    return found


def _diloco(section: Diloco | None, typed: argparse.Namespace) -> dict[str, Any] | None:
    flags = {
        "server": typed.diloco_server,
        "sync_every": typed.diloco_sync_every,
        "num_fragments": typed.diloco_fragments,
        "worker_id": typed.diloco_worker_id,
        "codec": typed.diloco_no_bf16,
        "dylu": typed.diloco_dylu,
        "heartbeat_interval_s": typed.diloco_heartbeat,
    }
    if section is None:
        if any(value is not None for value in flags.values()) or _is_set("server"):
            raise SettingsError(
                f"{typed.template} has no `diloco` section, so it trains without a server: take "
                "another file, or no --diloco-… flag and no DILOCO_SERVER"
            )
        return None
    held = {name: v for name, v in section.model_dump().items() if not _is_set(name)}
    return {**held, **{name: value for name, value in flags.items() if value is not None}}


def _is_set(name: str) -> bool:
    return bool(os.environ.get(_VARIABLES[name]))


def _with(section: Section, flags: Mapping[str, Any]) -> dict[str, Any]:
    typed = {name: value for name, value in flags.items() if value is not None}
    return {**section.model_dump(), **typed}


def _said(error: ValidationError) -> str:
    wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return "; ".join(wrong)
