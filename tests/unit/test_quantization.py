"""Every codec keeps the promises of `torchft.quantization.codec`, whatever it is given."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchft.digest import digest
from torchft.errors import SettingsError
from torchft.quantization import (
    BFloat16,
    Codec,
    Float8,
    Identity,
    Int4,
    Int8,
    codec_names,
    codec_of,
    default_codec,
)
from torchft.quantization import blockwise as blockwise_module
from torchft.quantization.codec import into

CODECS: list[Codec] = [
    *(Identity(), BFloat16(), Float8(), Int8(), Int4()),
    *(Float8(32), Int8(16), Int4(16), Int4(1024)),
]
BLOCKWISE = [codec for codec in CODECS if isinstance(codec, blockwise_module.Blockwise)]
SHORT = [Float8(16), Int8(16), Int4(16)]
SIZES = (0, 1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1009)
FP32 = torch.finfo(torch.float32)

every_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, FP32.tiny, -FP32.tiny, 1e-45, -1e-40, FP32.max, FP32.min]),
)


def _rows(count: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(100 * count + n)
    exponents = torch.randint(-9, 10, (count, n), generator=generator)
    return (torch.randn(count, n, generator=generator) * 2.0**exponents).to(dtype)


def _bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def _round_trip(codec: Codec, values: Tensor) -> Tensor:
    return codec.decode(codec.encode(values), values.shape[-1])


# ---------------------------------------------------------------------- what is lost


@every_codec
@given(values=st.lists(numbers, min_size=1, max_size=70))
@settings(max_examples=60, deadline=None)
@example(values=[FP32.max] * 3 + [1.0])
@example(values=[FP32.tiny, -FP32.tiny / 2, 1e-45])
@example(values=[2.0**-116 * 127, 2.0**-116 * 126, 1e-36, -1e-37])
@example(values=[1e30, *([1e-3] * 20)])
@example(values=[0.0, -0.0])
def test_numbers_come_back_within_the_bound(codec: Codec, values: list[float]) -> None:
    row = torch.tensor([values])
    found, bound = _round_trip(codec, row), codec.error_bound(row)
    assert found.shape == bound.shape == row.shape
    # In fp64, where the difference itself is exact.
    finite = bound.isfinite()
    assert ((found.double() - row.double()).abs() <= bound.double())[finite].all()
    assert found[finite].isfinite().all()


@every_codec
def test_the_bound_is_not_far_off(codec: Codec) -> None:
    values = _rows(8, 4096)
    error, bound = (_round_trip(codec, values) - values).abs(), codec.error_bound(values)
    assert (error <= bound).all()
    assert codec.name == "fp32" or (error / bound).max() > 0.9


@pytest.mark.parametrize("codec", BLOCKWISE, ids=lambda codec: codec.name)
def test_the_largest_of_a_block_stays_what_it_was(codec: Codec) -> None:
    values = torch.tensor([FP32.max, 1.0, 1e-32, 0.3]).repeat_interleave(codec.block)[None]
    values[0, 1 :: codec.block] = 0.0
    found = _round_trip(codec, values)
    assert torch.allclose(found, values, rtol=1e-6, atol=0)
    assert found.isfinite().all()


@every_codec
def test_what_was_decoded_is_encoded_to_the_same_again(codec: Codec) -> None:
    once = _round_trip(codec, _rows(50, 999))
    assert torch.equal(_round_trip(codec, once), once)
    ones = torch.full((2, 300), -1.0)
    assert torch.equal(_round_trip(codec, ones), ones)


@every_codec
def test_zeros_stay_zeros(codec: Codec) -> None:
    found = _round_trip(codec, torch.tensor([[0.0, -0.0] * 300]))
    assert (found == 0).all()


@pytest.mark.parametrize("flush", [False, True])
def test_bytes_and_numbers_do_not_depend_on_how_tiny_ones_are_treated(flush: bool) -> None:
    row = torch.full((1, 300), 1e-40)
    row[0, ::3], row[0, 1::5] = 1e-39, -7e-39
    row[0, 256], row[0, 257] = 2.0**-106, 2.0**-116
    for codec in BLOCKWISE:
        plain = codec.encode(row), _round_trip(codec, row)
        torch.set_flush_denormal(flush)
        try:
            treated = codec.encode(row), _round_trip(codec, row)
        finally:
            torch.set_flush_denormal(False)
        assert [_bits(one) for one in plain] == [_bits(one) for one in treated]


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_can_be_seen_in_what_is_decoded(codec: Codec, bad: float) -> None:
    for at in (0, 700, 999):
        row = _rows(1, 1000)
        row[0, at] = bad
        found = _round_trip(codec, row)
        assert not found[0, at].isfinite()
        # Only its own block is lost with it.
        block = getattr(codec, "block", 1)
        others = torch.arange(1000) // block != at // block
        assert found[0, others].isfinite().all()


@pytest.mark.parametrize("codec", BLOCKWISE, ids=lambda codec: codec.name)
def test_which_nan_it_was_leaves_no_trace_in_the_bytes(codec: Codec) -> None:
    row = _rows(1, 40).repeat(4, 1)
    row[:, 5] = torch.tensor([float("nan"), float("inf"), float("-inf"), -float("nan")])
    first, *others = codec.encode(row)
    assert all(torch.equal(first, other) for other in others)


def test_bf16_says_where_it_overflows() -> None:
    row = torch.tensor([FP32.max, -FP32.max, 3.38e38])
    assert BFloat16().error_bound(row).isinf().tolist() == [True, True, False]
    assert _round_trip(BFloat16(), row).isinf().tolist() == [True, True, False]


def test_halves_are_rounded_to_even() -> None:
    steps = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert Int8().encode(steps)[0, 4:].view(torch.int8).tolist() == [127, 0, 2, 2, 0, -2, -2]
    steps = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10]])
    decoded = [448.0, 16.0, 20.0, -16.0, 0.0, 2 * 2.0**-9]
    assert _round_trip(Float8(), steps)[0].tolist() == pytest.approx(decoded, rel=1e-6)


# ---------------------------------------------------------------------- bytes


@every_codec
def test_a_row_has_the_bytes_that_were_promised(codec: Codec) -> None:
    for n in SIZES:
        encoded = codec.encode(_rows(3, n))
        assert encoded.dtype == torch.uint8 and encoded.is_contiguous()
        assert encoded.shape == (3, codec.encoded_bytes(n))
        assert codec.decode(encoded, n).shape == (3, n)


def test_how_small_they_are() -> None:
    of_fp32 = {codec.name: codec.bytes_per_element / 4 for codec in map(codec_of, codec_names())}
    assert of_fp32["fp32"] == 1 and of_fp32["bf16"] == 0.5
    assert of_fp32["fp8"] <= 0.27 and of_fp32["int8"] <= 0.27 and of_fp32["int4"] <= 0.15
    # A single number still needs its scale.
    assert [Int8().encoded_bytes(n) for n in (0, 1, 256, 257)] == [0, 5, 260, 265]
    assert [Int4().encoded_bytes(n) for n in (0, 1, 2, 63, 65)] == [0, 5, 5, 36, 41]


@pytest.mark.parametrize("codec", [*CODECS[:5], *SHORT], ids=lambda codec: codec.name)
def test_a_row_is_encoded_alike_alone_and_among_others(codec: Codec) -> None:
    for n in SIZES:
        rows = _rows(7, n)
        together = codec.encode(rows)
        assert torch.equal(codec.encode(rows.view(7, 1, n)).view_as(together), together)
        for row, encoded in zip(rows, together, strict=True):
            assert torch.equal(codec.encode(row), encoded)
        found = codec.decode(together, n)
        alone = torch.stack([codec.decode(encoded, n) for encoded in together])
        assert _bits(found) == _bits(alone)


@pytest.mark.parametrize("codec", SHORT, ids=lambda codec: codec.name)
def test_tiles_leave_no_trace(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {n: _rows(5, n) for n in (9, 16, 40, 127, 128, 300)}
    whole = {n: codec.encode(row) for n, row in rows.items()}
    decoded = {n: codec.decode(wire, n) for n, wire in whole.items()}
    monkeypatch.setattr(blockwise_module, "TILE", 64)
    for n, row in rows.items():
        assert torch.equal(codec.encode(row), whole[n])
        assert torch.equal(codec.decode(whole[n], n), decoded[n])


@every_codec
def test_no_rows_and_no_numbers(codec: Codec) -> None:
    for shape in ((0,), (0, 5), (4, 0), (2, 0, 3), (0, 0)):
        encoded = codec.encode(torch.empty(shape))
        assert encoded.shape == (*shape[:-1], codec.encoded_bytes(shape[-1]))
        assert codec.decode(encoded, shape[-1]).shape == shape


def _fixed_rows() -> Tensor:
    """The same on every machine, which random numbers are not."""
    mixed = torch.arange(3 * 3001, dtype=torch.int64) * 2654435761 % (1 << 32)
    sizes = (mixed & 0xFFFF).to(torch.float32) * 2.0 ** ((mixed >> 16) % 41 - 20)
    sizes[5000:5600] *= 2.0**-110
    return torch.where((mixed >> 30) > 1, -sizes, sizes).view(3, 3001)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fp32", "fdd0fb271f202d9e"),
        ("bf16", "1d9a018e840b4f1f"),
        ("fp8", "b1777ac587040fbe"),
        ("int8", "fe2d93681fda81bc"),
        ("int4", "443191d0aa84cebf"),
    ],
)
def test_the_bytes_are_those_of_every_other_version(name: str, expected: str) -> None:
    codec, rows = codec_of(name), _fixed_rows()
    encoded = codec.encode(rows)
    assert digest([encoded, codec.decode(encoded, 3001)])[:16] == expected


# ---------------------------------------------------------------------- how it is called


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@every_codec
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_dtypes_are_the_fp32_of_them(codec: Codec, dtype: torch.dtype) -> None:
    rows = _rows(3, 300, dtype)
    if isinstance(codec, Identity) and dtype == torch.float64:
        with pytest.raises(ValueError, match="cast it before"):
            codec.encode(rows)
        return
    encoded = codec.encode(rows)
    assert torch.equal(encoded, codec.encode(rows.float()))
    found = codec.decode(encoded, 300, dtype)
    assert found.dtype == dtype
    assert _bits(found) == _bits(codec.decode(encoded, 300).to(dtype))


@every_codec
def test_decoding_into_a_tensor_and_onto_one(codec: Codec) -> None:
    for n, dtype in itertools.product((1, 17, 300), DTYPES):
        encoded = codec.encode(_rows(3, n))
        plain = codec.decode(encoded, n, dtype)
        out = torch.empty(3, n, dtype=dtype)
        assert codec.decode(encoded, n, out=out) is out and torch.equal(out, plain)
        total = _rows(3, n, dtype)
        expected = total + codec.decode(encoded, n)
        assert codec.decode_add_(total, encoded) is total
        assert _bits(total) == _bits(expected.to(dtype))


@every_codec
def test_strides_do_not_matter(codec: Codec) -> None:
    rows = _rows(6, 34)
    apart = torch.empty(34, 12).T[::2]
    apart.copy_(rows)
    encoded = codec.encode(apart)
    assert torch.equal(encoded, codec.encode(rows))
    # A piece of a larger buffer that begins at an odd byte.
    buffer = torch.zeros(encoded.numel() + 1, dtype=torch.uint8)
    buffer[1:] = encoded.view(-1)
    plain = codec.decode(encoded, 34)
    assert torch.equal(codec.decode(buffer[1:].view(encoded.shape), 34), plain)
    assert torch.equal(codec.decode(encoded.T.contiguous().T, 34), plain)
    for out in (torch.zeros(34, 6).T, torch.zeros(34, 3, 2).permute(2, 1, 0)):
        given = encoded.view(*out.shape[:-1], -1)
        assert torch.equal(codec.decode(given, 34, out=out).reshape(6, 34), plain)
        assert torch.equal(codec.decode_add_(out, given).reshape(6, 34), plain + plain)


@every_codec
def test_nothing_of_autograd_and_nothing_of_the_input_is_touched(codec: Codec) -> None:
    rows = _rows(2, 40).requires_grad_()
    before = rows.detach().clone()
    encoded = codec.encode(rows)
    copy = encoded.clone()
    assert not codec.decode(encoded, 40).requires_grad
    codec.decode_add_(torch.zeros(2, 40), encoded)
    assert torch.equal(rows, before) and torch.equal(encoded, copy)


@every_codec
def test_what_is_no_row_of_it_is_refused(codec: Codec) -> None:
    with pytest.raises(ValueError, match="floating-point"):
        codec.encode(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="at least one dimension"):
        codec.encode(torch.tensor(1.0))
    encoded = codec.encode(torch.zeros(2, 20))
    for wrong in (encoded[:, :-1], encoded.to(torch.int16), encoded[0, 0]):
        with pytest.raises(ValueError, match="encoded rows here are uint8"):
            codec.decode(wrong, 20)
    with pytest.raises((ValueError, RuntimeError)):
        codec.decode(encoded, 20, out=torch.empty(3, 20))


# ---------------------------------------------------------------------- which one


def test_a_codec_is_found_by_name() -> None:
    assert codec_names() == ("fp32", "bf16", "fp8", "int8", "int4")
    assert all(codec_of(name).name == name for name in codec_names())
    own = Int4(128)
    assert codec_of(own) is own and own.name == "int4/128"


def test_an_unknown_name_is_told_which_there_are() -> None:
    with pytest.raises(SettingsError, match=r"codec='int3': it must be one of fp32, .*int4"):
        codec_of("int3")


@pytest.mark.parametrize("block", [0, 8, 100, 8192])
def test_a_block_that_does_not_fit_is_refused(block: int) -> None:
    with pytest.raises(SettingsError, match=f"block is {block}"):
        Int8(block)


def test_what_to_quantize_means_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_codec("cpu").name == "int8"
    for capability, name in (((8, 9), "int8"), ((9, 0), "fp8"), ((12, 0), "fp8")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert default_codec(torch.device("cuda", 0)).name == name


class Halves(Codec):
    """What a user might write: the one that the documentation shows."""

    name = "halves"

    def encoded_bytes(self, n: int) -> int:
        return 2 * n

    def encode(self, values: Tensor) -> Tensor:
        return values.half().view(torch.uint8)

    def decode(
        self,
        encoded: Tensor,
        n: int,
        dtype: torch.dtype = torch.float32,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        return into(out, encoded.view(torch.float16).to(dtype))


def test_a_codec_of_ones_own_needs_three_methods() -> None:
    codec = codec_of(Halves())
    assert codec.bytes_per_element == 2 and repr(codec) == "<codec halves>"
    total = torch.ones(2, 3)
    codec.decode_add_(total, codec.encode(torch.full((2, 3), 0.5)))
    assert total.tolist() == [[1.5] * 3] * 2
    with pytest.raises(NotImplementedError, match="states no bound"):
        codec.error_bound(total)
