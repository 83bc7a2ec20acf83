"""The texts that the example learns: bytes, cut into windows, a part of them for each worker.

By default the sources of Python's standard library, which are on this machine. Else text files,
folders of them, or parquet files with a column of texts; or a data set of the Hugging Face hub,
such as TinyStories, which is downloaded when it is asked for, never otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from asked import Data
from torch import Tensor
from torch.utils.data import Dataset

from torchft.errors import SettingsError, UnreachableError
from torchft.toy.corpus import ByteCorpus
from torchft.toy.text import read_text

__all__ = ["Windows", "windows_of"]

_BETWEEN = b"\n\n"
"""Between two texts of a parquet file."""


class Windows(Dataset[dict[str, Tensor]]):
    """Rows of bytes, uint8 `[n, context]`, as a Trainer of a causal model wants them."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        tokens = self.rows[at].long()
        return {"input_ids": tokens, "labels": tokens}


def windows_of(data: Data, context: int) -> tuple[Windows, Windows]:
    """This shard's windows to train on, and held-out ones, which are the same for all shards.

    Raises:
        SettingsError: there is no text, or too little.
        UnreachableError: the hub.
    """
    corpus = ByteCorpus(_bytes(data), source=_name(data))
    mine = _rows(corpus.train, context)[data.shard_index :: data.num_shards]
    held_out = _rows(corpus.held_out, context)[: data.held_out_windows]
    if not len(mine) or not len(held_out):
        raise SettingsError(
            f"{corpus.source} is too short for {data.num_shards} shards of windows of {context} "
            "bytes: give more text, or fewer --num-shards"
        )
    return Windows(mine), Windows(held_out)


def _rows(stream: Tensor, context: int) -> Tensor:
    return stream[: len(stream) // context * context].view(-1, context)


def _name(data: Data) -> str:
    return data.hub or ", ".join(map(str, data.paths)) or "the Python standard library"


def _bytes(data: Data) -> bytes:
    if data.hub is not None:
        return _of_parquet(_downloaded(data), data)
    folders = [path for path in data.paths if path.is_dir()]
    parquet = [path for path in data.paths if path.suffix == ".parquet"]
    parquet += [file for folder in folders for file in sorted(folder.rglob("*.parquet"))]
    if not parquet:
        return read_text(data.paths)[: data.max_bytes]
    if len(parquet) < len(data.paths) - len(folders):
        raise SettingsError("data.paths has parquet files and others: give the one or the other")
    return _of_parquet(parquet, data)


def _of_parquet(files: list[Path], data: Data) -> bytes:
    """The texts of a column, until there are `max_bytes`."""
    found = bytearray()
    for text in _texts(files, data.column):
        found += text.encode() + _BETWEEN
        if len(found) >= data.max_bytes:
            break
    return bytes(found[: data.max_bytes])


def _texts(files: list[Path], column: str) -> Iterator[str]:
    parquet = _pyarrow_parquet()
    for path in files:
        try:
            file = parquet.ParquetFile(path)
            if column not in file.schema_arrow.names:
                raise SettingsError(
                    f"{path} has no column {column!r}; set data.column to one of "
                    f"{', '.join(file.schema_arrow.names)}"
                )
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (str(text) for text in batch.column(0).to_pylist() if text)
        except (OSError, ValueError) as error:  # pyarrow's own errors are of these kinds
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(f"cannot read {path}: {error}") from error


def _pyarrow_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise SettingsError(
            f"parquet files need pyarrow ({error}): install torchft with the extra `parquet`"
        ) from error
    return parquet


def _downloaded(data: Data) -> list[Path]:
    """The parquet files of a data set's training part."""
    assert data.hub is not None
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    except ImportError as error:
        raise SettingsError(
            f"the hub needs huggingface_hub ({error}), which comes with transformers: install "
            "torchft with the extra `transformers`"
        ) from error
    pattern = f"**{data.split}*.parquet"
    try:
        folder = snapshot_download(data.hub, repo_type="dataset", allow_patterns=[pattern])
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SettingsError(f"the hub has no data set {data.hub!r} for you: {error}") from error
    except Exception as error:  # the hub's client raises those of the HTTP library that it uses
        raise UnreachableError(
            f"cannot fetch {data.hub} from the hub ({type(error).__name__}: {error}). Check the "
            "network and HF_HUB_OFFLINE, or learn from files here with --data PATH"
        ) from error
    files = sorted(Path(folder).rglob(f"*{data.split}*.parquet"))
    if not files:
        raise SettingsError(f"{data.hub} has no file that matches {pattern}: set data.split")
    return files
