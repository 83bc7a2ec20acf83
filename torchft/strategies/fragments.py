"""How a model is cut into fragments: in whole blocks, of about equal bytes, in one of two patterns.

    6 equal blocks, 2 fragments     sequential  0 0 0 1 1 1     one run of blocks each
                                    strided     0 1 0 1 0 1     dealt out like cards

A block is what one element of an `nn.ModuleList` or `nn.Sequential` trains, as the parameters'
names tell: `blocks.3.mlp.0.weight` is of the block `blocks.3`. A parameter that is in no such
element is a block alone. Where there are fewer blocks than fragments, the elements inside of
elements are blocks instead (`blocks.3.mlp.0`), and at the deepest each parameter.

Sequential: each boundary is the one between two blocks that is nearest to an equal share. Strided:
the next block goes to the fragment that has the fewest bytes so far, the first of those that are
equal; so equal blocks are dealt in turn, and a large one (an embedding) counts for several. Either
way no fragment is further from an equal share than the largest block is large, and the cut depends
on names and sizes alone, so all groups and runtimes cut alike.
(Streaming DiLoCo, whose fragments have these patterns: Douillard et al., arXiv 2501.18512.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torchft.arguments import check_choice
from torchft.errors import SettingsError
from torchft.strategies.local import Fragment

__all__ = ["PATTERNS", "SEQUENTIAL", "STRIDED", "cut"]

PATTERNS = SEQUENTIAL, STRIDED = "sequential", "strided"


def cut(
    names: Sequence[str], nbytes: Sequence[int], parts: int, pattern: str = SEQUENTIAL
) -> list[Fragment]:
    """`parts` fragments that have each parameter once; `names` and `nbytes` are the parameters'.

    Raises:
        SettingsError: there are fewer parameters than that, or no such pattern.
    """
    check_choice("pattern", pattern, PATTERNS)
    if not 1 <= parts <= len(names):
        raise SettingsError(
            f"{len(names)} parameters cannot be {parts} fragments: use 1 to {len(names)}"
        )
    blocks = _blocks(names, parts)
    sizes = [sum(nbytes[position] for position in block) for block in blocks]
    owners = (_in_runs if pattern == SEQUENTIAL else _dealt)(sizes, parts)
    held: list[list[int]] = [[] for _ in range(parts)]
    for block, owner in zip(blocks, owners, strict=True):
        held[owner].extend(block)
    return [Fragment(index, tuple(sorted(mine))) for index, mine in enumerate(held)]


def _blocks(names: Sequence[str], wanted: int) -> list[list[int]]:
    """Positions by block, in order: the largest blocks of which there are as many as `wanted`."""
    deepest = max(name.count(".") for name in names) + 2
    cuts = (_at_depth(names, depth) for depth in range(1, deepest + 1))
    return next(blocks for blocks in cuts if len(blocks) >= wanted)


def _at_depth(names: Sequence[str], depth: int) -> list[list[int]]:
    blocks: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        blocks.setdefault(_element(name, depth), []).append(position)
    return list(blocks.values())


def _element(name: str, depth: int) -> str:
    """The element of a list, `depth` lists deep, that has the parameter; else the parameter."""
    words = name.split(".")
    numbers = [at for at, word in enumerate(words) if word.isdecimal()]
    return name if len(numbers) < depth else ".".join(words[: numbers[depth - 1] + 1])


def _in_runs(sizes: Sequence[int], parts: int) -> list[int]:
    """The fragment of each block."""
    passed = [0, *accumulate(sizes)]
    cuts = [0]
    for number in range(1, parts):
        share = passed[-1] * number
        possible = range(cuts[-1] + 1, len(sizes) - (parts - number) + 1)
        cuts.append(min(possible, key=lambda at: abs(passed[at] * parts - share)))
    starts = set(cuts[1:])
    return list(accumulate(int(at in starts) for at in range(len(sizes))))


def _dealt(sizes: Sequence[int], parts: int) -> list[int]:
    """The fragment of each block. None stays empty: one that has nothing goes first."""
    owners: list[int] = []
    held = [(0, 0)] * parts
    for size in sizes:
        owner = held.index(min(held))
        held[owner] = (held[owner][0] + size, held[owner][1] + 1)
        owners.append(owner)
    return owners
