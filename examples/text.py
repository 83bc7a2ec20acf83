"""Text as tokens: bytes, characters, byte pairs, or numbers that another program wrote.

standard_library()                       the sources of this Python, for want of better
tokenised(text, Bytes())                 a vocabulary of 256
tokenised(text, Characters.of(text))     one token a character
tokenised(text, BytePairs.load(path))    GPT-2's, when its files are there
memmapped(path)                          uint16, read from disk as it is needed
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = [
    "BytePairs",
    "Bytes",
    "Characters",
    "TextError",
    "Tokenizer",
    "Windows",
    "memmapped",
    "read",
    "standard_library",
    "tokenised",
]

Tokens = np.ndarray[Any, Any]

GPT2_VOCABULARY = 50_304
"""GPT-2's 50 257, rounded up to a multiple of 64."""
_LOOKED_THROUGH = 1_000_000  # tokens of a file that may be far larger than memory


class TextError(ValueError):
    """There is no text, or it does not fit what it is to be used for."""


class Tokenizer(Protocol):
    """Between text and tokens."""

    vocab_size: int

    def encode(self, text: str) -> Sequence[int] | Tokens: ...

    def decode(self, tokens: Sequence[int]) -> str: ...


class Bytes:
    """UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode(), dtype=np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@dataclass(frozen=True)
class Characters:
    """The characters of a text, in order; token 0 stands for all others."""

    symbols: str

    @classmethod
    def of(cls, text: str) -> Self:
        """Those that `text` has."""
        return cls("\N{REPLACEMENT CHARACTER}" + "".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> list[int]:
        number = {symbol: at for at, symbol in enumerate(self.symbols)}
        return [number.get(character, 0) for character in text]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.symbols[token] for token in tokens)


class BytePairs:
    """By the `tokenizers` library."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()

    @classmethod
    def load(cls, path: Path) -> Self:
        """A tokenizer.json, or a folder with that or with GPT-2's vocab.json and merges.txt.

        Raises:
            TextError: no such files.
        """
        from tokenizers import ByteLevelBPETokenizer, Tokenizer

        whole = path / "tokenizer.json" if path.is_dir() else path
        if whole.is_file():
            return cls(Tokenizer.from_file(str(whole)))
        vocab, merges = path / "vocab.json", path / "merges.txt"
        if not (vocab.is_file() and merges.is_file()):
            raise TextError(
                f"{path} is no tokenizer: give a tokenizer.json, or a folder with vocab.json and "
                "merges.txt"
            )
        return cls(ByteLevelBPETokenizer(str(vocab), str(merges)))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens))
        return text


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of `block` tokens that do not overlap, each with the tokens that follow."""

    def __init__(self, tokens: Tokens, block: int) -> None:
        self.tokens, self.block = tokens, block
        if len(self) < 1:
            raise TextError(
                f"{len(tokens)} tokens hold no window of {block} and the token after it: give "
                "more text or a smaller block_size"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.block

    def __getitem__(self, window: int) -> tuple[Tensor, Tensor]:
        at = window * self.block
        both = torch.from_numpy(self.tokens[at : at + self.block + 1].astype(np.int64))
        return both[:-1], both[1:]


def read(paths: Sequence[Path]) -> str:
    """All files, one after the other.

    Raises:
        TextError: one is not there.
    """
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise TextError(f"no such file: {', '.join(missing)}")
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def standard_library(limit: int = 1_500_000) -> str:
    """The first `limit` characters of the modules of this Python, by name."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= limit:
            break
    return text[:limit]


def tokenised(text: str, tokenizer: Tokenizer) -> Tokens:
    """As small as the vocabulary allows."""
    small = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    return np.asarray(tokenizer.encode(text), dtype=small)


def memmapped(path: Path, vocab_size: int = GPT2_VOCABULARY) -> Tokens:
    """A file of uint16, as nanoGPT's preparation scripts write it.

    Raises:
        TextError: it is not there, or holds tokens beyond the vocabulary.
    """
    if not path.is_file() or path.stat().st_size < 2:
        raise TextError(f"{path} holds no tokens: it is missing or empty")
    tokens: Tokens = np.memmap(path, dtype=np.uint16, mode="r")
    highest = int(tokens[:_LOOKED_THROUGH].max())
    if highest >= vocab_size:
        raise TextError(f"{path} has token {highest}, beyond a vocabulary of {vocab_size}")
    return tokens
