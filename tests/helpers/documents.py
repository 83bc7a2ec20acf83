"""Fenced blocks of the project's documents: what they hold, and what can be checked of each kind.

```python   run, one block after the other, as one program
```diff     run twice: with the lines that go away, and with those that come
```sh       each command is one that exists, with flags that it takes
```text     a picture or an output; anything
"""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

KINDS = ("python", "diff", "sh", "text", "toml", "yaml")

OTHERS = {"cd", "sed", "export", "kill", "pip", "tc", "torchx", "wait"}
"""Commands of others that the documents may name."""

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a document."""

    document: str
    line: int
    kind: str
    text: str

    @property
    def where(self) -> str:
        """`document:line`, for messages."""
        return f"{self.document}:{self.line}"


def documents() -> list[Path]:
    """All documents that users read."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(document: Path, *, under: str = "") -> list[Block]:
    """The blocks of a document, or of its section `under`."""
    text = document.read_text()
    if under:
        text = text.split(f"\n## {under}\n")[1].split("\n## ")[0]
    name = str(document.relative_to(ROOT))
    return [
        Block(name, text.count("\n", 0, found.start()) + 1, found[2], _dedent(found[3], found[1]))
        for found in _FENCE.finditer(text)
    ]


def _dedent(text: str, indent: str) -> str:
    return re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) if indent else text


def before_and_after(diff: str) -> tuple[str, str]:
    """The two programs of a diff."""
    lines = diff.splitlines()
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    return "\n".join(before) + "\n", "\n".join(after) + "\n"


def commands_in(shell: str) -> list[list[str]]:
    """The words of each command, without variables before it and what runs beside it."""
    found = []
    for line in shell.replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|\|", line):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words and words[-1] == "&":
                words.pop()
            if words and words[0] == "uv":
                words = words[2:]
            if words:
                found.append(words)
    return found


def trouble_with(words: list[str]) -> str | None:
    """Why a command of the documents could not be typed; None: it can."""
    name, *rest = words
    if name in OTHERS or name.startswith("$"):
        return None
    if name == "make":
        made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
        target = rest[0] if rest else "help"
        return None if target in made else f"the Makefile has no target {target}"
    if name in ("python", "python3", "torchrun"):
        scripts = [word for word in rest if word.endswith(".py")]
        if "-m" in rest or all((ROOT / one).exists() or one == "train.py" for one in scripts):
            return None
        return f"no script {scripts}"
    return _trouble_with_ours(name, rest)


def _trouble_with_ours(name: str, rest: list[str]) -> str | None:
    if name == "torchft_lighthouse":
        known = {"--min_replicas", "--join_timeout_ms", "--heartbeat_timeout_ms", "--bind"}
        known |= {"--quorum_tick_ms", "--version", "--help"}
        unknown = {word.split("=")[0] for word in rest if word.startswith("--")} - known
        return f"torchft_lighthouse has no {unknown}" if unknown else None
    if name not in ("torchft", "diloco"):
        return f"no command of ours, and not in {sorted(OTHERS)}: {name}"
    from torchft.cli.main import parser

    if rest and "--" in rest:
        rest = [*rest[: rest.index("--") + 1], "true"]
    try:
        parser().parse_args(rest if name == "torchft" else ["diloco", *rest])
    except SystemExit as end:
        return None if end.code == 0 else f"{name} {' '.join(rest)} is refused"
    except argparse.ArgumentError as error:
        return str(error)
    return None
