"""A codec that breaks a promise is refused where it is given, before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.manager import InProcessManager
from helpers.peers import Node, Script, World
from torch import Tensor, nn
from unit.test_quantization import Halves

from torchft.errors import SettingsError
from torchft.local_sgd import DiLoCo
from torchft.quantization import Codec, codec_names, codec_of
from torchft.quantization.proof import prove


class IgnoresOut(Halves):
    def decode(self, *args: Any, out: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().decode(*args)


class OtherBytes(Halves):
    def encode(self, values: Tensor) -> Tensor:
        return values.float().contiguous().view(torch.uint8)


class NotBytes(Halves):
    def encode(self, values: Tensor) -> Tensor:
        return values.half()


class Raises(Halves):
    def encode(self, values: Tensor) -> Tensor:
        raise RuntimeError("out of codes")


class LosesNan(Halves):
    def encode(self, values: Tensor) -> Tensor:
        return super().encode(values.nan_to_num())


class Nameless(Halves):
    name = None  # type: ignore[assignment]


class Only32(Halves):
    def check(self, dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            raise SettingsError(f"it holds float32, not {dtype}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", [Halves(), *map(codec_of, codec_names())])
def test_what_keeps_its_promises_passes(codec: Codec, dtype: torch.dtype) -> None:
    prove(codec, dtype)


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        (IgnoresOut(), "leaves out as it was: write into it"),
        (
            OtherBytes(),
            r"gives torch.uint8 \[2, 28\], and encoded_bytes says torch.uint8 \[2, 14\]",
        ),
        (NotBytes(), r"gives torch.float16 \[2, 7\]"),
        (Raises(), "cannot encode and decode torch.float32 .*out of codes"),
        (LosesNan(), "NaN comes back as a number"),
        (Nameless(), "has no name"),
    ],
)
def test_what_breaks_one_is_told_which(codec: Codec, says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        prove(codec, torch.float32)


def test_a_door_refuses_before_the_first_round() -> None:
    def door(codec: Codec, dtype: torch.dtype) -> DiLoCo:
        model = nn.Linear(3, 2, dtype=dtype)
        inner, outer = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
        manager: Any = InProcessManager(Node(World(Script(1)), 0, 1))
        # What travels is of the shared state's dtype: here the parameters' own.
        return DiLoCo(manager, [model], inner, outer, 500, should_quantize=codec, shared_dtype=None)

    door(Only32(), torch.float32)
    with pytest.raises(SettingsError, match="it holds float32"):
        door(Only32(), torch.bfloat16)
    with pytest.raises(SettingsError, match="write into it"):
        door(IgnoresOut(), torch.float32)
