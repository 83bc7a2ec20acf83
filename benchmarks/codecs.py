"""How fast numbers become fewer bytes and numbers again, on one core.

Each codec encodes fp32 numbers, decodes them into memory that is there already, and decodes them
onto a sum. A speed counts the fp32 side: 64 MiB encoded in 64 ms are 1.05 GB/s. Beside it stands a
plain copy of the same numbers, taken in turn with it.

Seconds are those that the thread had a core for, so that others who use the machine count little.
Their use of its memory does count: the best of several turns is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from harness.cli import Findings, option, run
from harness.figures import Figure, Floor
from harness.spread import Spread, in_turns

from torchft.quantization import Codec, codec_names, codec_of

Act = Callable[[], object]


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    mib: int = option(64, "MiB of fp32 numbers")
    turns: int = option(7, "how often each is timed; the best counts")


def measure(options: Options) -> Findings:
    """One codec after the other, each beside copies of its own."""
    torch.set_num_threads(1)
    numbers = torch.randn(options.mib << 18, generator=torch.Generator().manual_seed(0))
    figures: list[Figure] = []
    details: dict[str, object] = {}
    for codec in map(codec_of, codec_names()):
        if codec.name == "fp32":
            continue  # it does nothing
        spreads = _speeds(codec, numbers, options.turns)
        copy = Floor("a copy", spreads.pop("copy").max)
        for act, speeds in spreads.items():
            name = f"{codec.name}: {act.replace('_', ' ')}"
            figures.append(Figure(f"codecs.{codec.name}.{act}", name, speeds.max, "GB/s", copy))
        size = codec.encoded_bytes(numbers.numel()) / numbers.nbytes
        figures.append(Figure(f"codecs.{codec.name}.size", f"{codec.name}: bytes", size, "of fp32"))
        details[codec.name] = {act: asdict(speeds) for act, speeds in spreads.items()}
    return Findings(figures, details)


def _speeds(codec: Codec, numbers: torch.Tensor, turns: int) -> dict[str, Spread]:
    """GB/s of everything, in turns."""
    encoded, out = codec.encode(numbers), torch.zeros_like(numbers)
    acts: dict[str, Act] = {
        "copy": lambda: out.copy_(numbers),
        "encode": lambda: codec.encode(numbers),
        "decode": lambda: codec.decode(encoded, numbers.numel(), out=out),
        "decode_and_add": lambda: codec.decode_add_(out, encoded),
    }
    found = in_turns(turns, acts.values(), clock=time.thread_time)
    gigabytes = numbers.nbytes / 1e9
    return {
        name: Spread.of([gigabytes / one for one in seconds])
        for name, seconds in zip(acts, found, strict=True)
    }


if __name__ == "__main__":
    raise SystemExit(run("codecs", __doc__, Options(), Options(mib=1, turns=2), measure))
