"""The quantised all-reduce in one process: what it refuses, how near its mean is, what it sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.magnitudes import rows_of
from torch.distributed import ReduceOp

from torchft.collectives import QuantizedMean, allreduce_quantized
from torchft.errors import PhaseError, SettingsError
from torchft.ordered import ordered_bytes, ordered_mean
from torchft.quantization import codec_names, codec_of, mean_bytes, quantized_mean


class Unasked:
    """A group that nothing may be sent to."""

    generation = None

    def size(self) -> int:
        return 2


def test_what_cannot_be_averaged_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="floating-point numbers, not torch"):
        QuantizedMean(Unasked(), torch.ones(2, dtype=torch.int32), [0, 1], "int8")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="'int5': it must be one of"):
        QuantizedMean(Unasked(), torch.ones(2), [0, 1], "int5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cast it before"):
        QuantizedMean(Unasked(), torch.ones(2).double(), [0, 1], "fp32")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", codec_names())
def test_a_mean_is_as_near_as_both_codings_allow(name: str) -> None:
    codec, rows = codec_of(name), rows_of(5, 5005)
    chunks = rows.view(5, 5, 1001)
    mean = chunks.double().mean(0)
    found = quantized_mean(rows, codec).view(5, 1001)
    # The second coding sees a mean that the first one has moved.
    first = codec.error_bound(chunks).mean(0)
    second = codec.error_bound(mean.abs().float() + first)
    rounding = 1e-6 * rows.abs().max()
    assert ((found - mean).abs() <= first + second + rounding).all()
    assert name == "fp32" or ((found - mean).abs() > second / 4).any()


def test_the_fp32_codec_is_the_ordered_mean() -> None:
    rows = rows_of(4, 131)
    mean = quantized_mean(rows.view(4, 1, 131), codec_of("fp32"), [3, 0])
    assert torch.equal(mean, ordered_mean(rows.view(4, 1, 131), [3, 0]))
    assert mean_bytes(codec_of("fp32"), 131, 4) == ordered_bytes(131, 4, 4)


def test_other_operations_streams_and_futures_are_refused() -> None:
    group: Any = Unasked()
    with pytest.raises(NotImplementedError, match="SUM or AVG"):
        allreduce_quantized([torch.ones(2)], ReduceOp.MAX, group)
    with pytest.raises(SettingsError, match="sync_stream"):
        allreduce_quantized([torch.ones(2)], ReduceOp.SUM, group, object())  # type: ignore[arg-type]
    with pytest.raises(PhaseError, match="who waits"):
        allreduce_quantized([torch.empty(0)], ReduceOp.SUM, group).get_future()


def test_a_quarter_of_the_bytes_travels() -> None:
    whole = ordered_bytes(1 << 20, 4, 8)
    assert mean_bytes(codec_of("int8"), 1 << 20, 8) < 0.27 * whole
    assert mean_bytes(codec_of("int4"), 1 << 20, 8) < 0.15 * whole
    assert mean_bytes(codec_of("int4"), 0, 8) == mean_bytes(codec_of("int4"), 9, 1) == 0
