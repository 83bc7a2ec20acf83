"""Which state dicts travel, that they come back exactly, and that the others are named."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor, Partial

from torchft.checkpointing.layout import DTYPES, LayoutError, Leaf, blocks_of_part
from torchft.checkpointing.memory import fresh_memory, tensors_in
from torchft.checkpointing.own_mesh import on_own_mesh
from torchft.checkpointing.tree import decode, encode, same_places
from torchft.digest import digest
from torchft.errors import MismatchError
from torchft.sharded import Sharding, local_part, mesh_of


def travel(state: Any) -> Any:
    """As on the wire, without one: JSON text, and each leaf's bytes copied into a fresh block."""
    tree, sources = encode(state)
    leaves = tuple(source.leaf for source in sources)
    received: dict[int, Tensor] = {}
    for block in blocks_of_part(leaves, 0, 1):
        memory = fresh_memory(block.nbytes)
        for index, offset in zip(block.leaves, block.offsets, strict=True):
            data = sources[index].bytes()
            memory[offset : offset + len(data)] = data
        received.update(tensors_in(memory, block, leaves))
    return decode(json.loads(json.dumps(tree)), [received[i] for i in range(len(leaves))])


def same_bits(a: Tensor, b: Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (2, 3, 5)])
def test_every_dtype_and_shape_keeps_its_bits(name: str, shape: tuple[int, ...]) -> None:
    dtype = DTYPES[name]
    count = Leaf(name, shape).nbytes
    high = 2 if dtype == torch.bool else 256
    bits = torch.randint(0, high, (count,), dtype=torch.uint8)
    tensor = bits.view(dtype).reshape(shape)
    assert same_bits(travel({"t": tensor})["t"], tensor)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t.T, id="transposed"),
        pytest.param(lambda t: t[::2, 1:], id="strided"),
        pytest.param(lambda t: t[0].expand(5, 4), id="expanded"),
        pytest.param(lambda t: t.flatten()[3:7], id="offset"),
    ],
)
def test_a_view_travels_as_its_values(view: Any) -> None:
    tensor = view(torch.arange(24.0).reshape(6, 4))
    assert same_bits(travel(tensor), tensor.contiguous())


def test_conjugated_and_negated_views_travel_as_their_values() -> None:
    base = torch.tensor([1 + 2j, 3 - 4j])
    got = travel([base, base.conj(), base.conj().imag])
    for received, sent in zip(got, [base, base.conj(), base.conj().imag], strict=True):
        assert torch.equal(received, sent.resolve_conj().resolve_neg())


def test_tied_weights_travel_once_and_are_tied_again() -> None:
    weight = torch.arange(6.0)
    state = {"embedding": weight, "head": weight.detach(), "row": weight[:3]}
    assert len(encode(state)[1]) == 2
    got = travel(state)
    got["embedding"].zero_()
    assert got["head"].sum() == 0
    assert torch.equal(got["row"], torch.arange(3.0)), "another view travels as its own values"


def test_received_tensors_are_writable_and_need_no_gradient() -> None:
    got = travel([torch.ones(3, requires_grad=True)])[0]
    got += 1
    assert not got.requires_grad


PLAIN: list[Any] = [
    None,
    True,
    0,
    -(2**127),
    1.5,
    float("inf"),
    -0.0,
    "text \ud800 \U0001f525",
    b"bytes",
    b"",
    1 + 2j,
    [1, [2, []]],
    (1, (None,)),
    {"a": {3: "int key", None: "none", ("t", 1): "tuple", True: "bool", 1.5: "float"}},
    {1, 2},
    torch.Size([2, 3]),
    torch.bfloat16,
    torch.device("cpu", 0),
    Counter({30: 1}),
    frozenset({1, ("a", 2)}),
    defaultdict(int, a=2),
    defaultdict(None, {3: [1.5]}),
    deque([1, [2]], maxlen=4),
    deque(),
    timedelta(days=-3, seconds=5, microseconds=7),
    OrderedDict(b=1, a=2),
    np.float32(1.5),
    np.bool_(True),
    np.int64(-7),
    np.complex128(1 - 1j),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_a_plain_value_comes_back_with_its_type(value: Any) -> None:
    got = travel({"value": value})["value"]
    assert type(got) is type(value)
    assert got == value
    assert repr(got) == repr(value)


def test_what_a_container_does_besides_holding_values_travels_too() -> None:
    got = travel({"counts": defaultdict(list), "last": deque([1, 2], maxlen=2)})
    assert got["counts"]["new"] == []
    got["last"].append(3)
    assert list(got["last"]) == [2, 3]


def test_nan_comes_back_as_nan() -> None:
    assert np.isnan(travel(float("nan")))


def test_dicts_keep_their_order() -> None:
    assert list(travel({"z": 1, "a": 2, "m": 3})) == ["z", "a", "m"]


def test_numpy_arrays_come_back_as_arrays() -> None:
    for sent in (np.arange(6, dtype=">i4").reshape(2, 3).T, np.zeros((0, 2)), np.array(1.5)):
        got = travel(sent)
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, sent)
        assert got.dtype == sent.dtype.newbyteorder("=")


def test_a_trained_model_and_optimizer_load_again() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = build()
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    got = travel({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    assert got["model"]._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    healed, healed_optimizer = build()
    healed.load_state_dict(got["model"])
    healed_optimizer.load_state_dict(got["optimizer"])
    assert all(
        same_bits(a, b) for a, b in zip(healed.parameters(), model.parameters(), strict=True)
    )
    assert str(healed_optimizer.state_dict()) == str(optimizer.state_dict())


def test_a_parameter_stays_one() -> None:
    got = travel(nn.Parameter(torch.ones(2), requires_grad=False))
    assert type(got) is nn.Parameter
    assert not got.requires_grad


plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(plain_values)
def test_any_plain_tree_comes_back_equal(state: Any) -> None:
    got = travel(state)
    assert got == state
    assert repr(got) == repr(state)


class Point(NamedTuple):
    x: int


class Wrapped(Tensor):
    pass


CANNOT: list[tuple[Any, str]] = [
    (object(), "a object cannot travel.*nothing is pickled"),
    (lambda: None, "function"),
    (Point(1), "Point"),
    (defaultdict(lambda: 0), "a defaultdict of <function.*save dict"),
    (defaultdict(Point), "a defaultdict of <class.*Point.*save dict"),
    (np.array(["text"]), "numpy data of dtype <U4"),
    (np.array([None]), "numpy data of dtype object"),
    (torch.zeros(2).as_subclass(Wrapped), "Wrapped is a tensor subclass"),
    (torch.zeros(2, device="meta"), "meta device"),
    (torch.zeros(2).to_sparse(), "sparse_coo"),
    (torch.bits8, "bits8 is not among"),
    ({object(): 1}, "the key <object.*keys are"),
    (1 << 5000, "integer of 5001 bits"),
]


@pytest.mark.parametrize(("value", "why"), CANNOT, ids=lambda x: type(x).__name__)
def test_what_cannot_travel_is_named_with_its_place(value: Any, why: str) -> None:
    with pytest.raises(TypeError, match=rf"state_dict\['user'\]\[1\](\['inner'\])?.*{why}"):
        encode({"user": [0, value], "after": 1})


def test_a_state_that_contains_itself_is_an_error() -> None:
    state: list[Any] = []
    state.append(state)
    with pytest.raises(TypeError, match="contain itself"):
        encode(state)


TAGS = (
    *("dict", "ordered", "counter", "list", "tuple", "set", "size", "complex", "bytes"),
    *("dtype", "device", "tensor", "parameter", "array", "scalar"),
    *("frozenset", "defaultdict", "deque", "timedelta"),
)
nonsense = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.floats(),
    lambda inner: st.lists(
        inner | st.sampled_from(TAGS),
        max_size=4,
    ),
    max_leaves=15,
)


@given(nonsense)
def test_a_malformed_tree_is_a_layout_error_and_nothing_else(tree: Any) -> None:
    leaves = [
        torch.zeros(2),
        torch.zeros((), dtype=torch.bfloat16),
        torch.zeros(3, dtype=torch.uint8),
    ]
    with contextlib.suppress(LayoutError):
        decode(tree, leaves)


def test_a_tree_deeper_than_any_stack_is_a_layout_error() -> None:
    tree: Any = None
    for _ in range(100_000):
        tree = ["list", tree]
    with pytest.raises(LayoutError):
        decode(tree, [])


def test_one_byte_leaf_cannot_be_copied_many_times() -> None:
    with pytest.raises(LayoutError, match="byte string of its own"):
        decode(["list", ["bytes", 0], ["bytes", 0]], [torch.zeros(3, dtype=torch.uint8)])


def cut_over(
    ranks: int, part: Tensor, *, names: tuple[str, ...] | None = ("fsdp",), rows: int | None = None
) -> Any:
    """The first rank's part of a DTensor whose rows are dealt to `ranks`."""
    mesh = mesh_of(torch.arange(ranks), "cpu", names)
    shape = (rows or ranks * part.shape[0], *part.shape[1:])
    sharding = Sharding(shape, (part.shape[1], 1), (ranks,), names, (("shard", 0),))
    return sharding.join(part, mesh)


class TestDTensors:
    part = torch.arange(6.0).reshape(2, 3)

    def test_a_part_travels_with_how_it_is_cut(self) -> None:
        sent = cut_over(2, self.part, rows=3)
        got = travel({"w": sent})["w"]
        assert same_bits(local_part(got), self.part)
        assert Sharding.of(got) == Sharding.of(sent)
        assert str(Sharding.of(got)) == "[3, 3] as shard(0) over fsdp=2"

    def test_a_parameter_comes_back_as_one(self) -> None:
        got = travel({"w": nn.Parameter(cut_over(2, self.part), requires_grad=False)})["w"]
        assert isinstance(got, nn.Parameter)
        assert not got.requires_grad

    def test_it_gets_the_mesh_of_the_tensor_in_its_place(self) -> None:
        own = cut_over(2, torch.zeros(2, 3))
        got = on_own_mesh(travel({"w": [cut_over(2, self.part)]}), {"w": [own]})["w"][0]
        assert got.device_mesh is own.device_mesh
        assert same_bits(local_part(got), self.part)

    def test_a_moment_that_is_not_there_yet_gets_the_mesh_of_the_weights(self) -> None:
        own = cut_over(2, torch.zeros(2, 3))
        state = {"w": cut_over(2, self.part), "m": cut_over(2, self.part + 1)}
        got = on_own_mesh(travel(state), {"w": own})
        assert got["m"].device_mesh is own.device_mesh

    @pytest.mark.parametrize(
        ("own", "here"),
        [
            (torch.zeros(4, 3), "a plain tensor here"),
            (cut_over(4, torch.zeros(1, 3)), r"\[4, 3\] as shard\(0\) over fsdp=4 here"),
            (cut_over(2, torch.zeros(2, 3), rows=3), r"\[3, 3\] as shard\(0\) over fsdp=2 here"),
            (cut_over(2, torch.zeros(2, 3), names=None), r"\[4, 3\] as shard\(0\) over 2 here"),
        ],
    )
    def test_one_that_is_cut_in_another_way_here_is_named(self, own: Tensor, here: str) -> None:
        sent = {"model": {"w": cut_over(2, self.part)}}
        named = rf"state_dict\['model'\]\['w'\] is .* over fsdp=2 at the donor and {here}"
        with pytest.raises(MismatchError, match=named):
            on_own_mesh(travel(sent), {"model": {"w": own}})
        with pytest.raises(MismatchError, match=named):
            same_places(encode(sent)[0], encode({"model": {"w": own}})[0])

    def test_a_mesh_that_is_not_here_is_named(self) -> None:
        with pytest.raises(MismatchError, match="there is no such mesh here"):
            on_own_mesh(travel({"m": cut_over(2, self.part)}), {"w": cut_over(4, self.part)})

    def test_an_older_torch_that_has_no_rank_here_says_what_to_do(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tree, sources = encode(cut_over(2, self.part))
        leaves = [torch.as_tensor(source.source) for source in sources]

        class Mesh:
            def __init__(self, device: str, mesh: Tensor) -> None: ...

        monkeypatch.setattr(device_mesh, "DeviceMesh", Mesh)
        with pytest.raises(MismatchError, match="in every group or in none"):
            decode(tree, leaves)

    def test_a_partial_sum_cannot_travel(self) -> None:
        mesh = mesh_of(torch.arange(2), "cpu", None)
        partial = DTensor.from_local(self.part, mesh, [Partial()], run_check=False)
        with pytest.raises(TypeError, match="has no values of its own: redistribute"):
            encode({"w": partial})

    @pytest.mark.parametrize(
        "fields",
        [
            [[4, 3], [3, 1], [2], ["fsdp"], [["shard", 0], ["shard", 1]]],
            [[4, 3], [3, 1], [2], ["fsdp"], [["eval", 0]]],
            [[4, 3], [3, 1], [3], ["fsdp"], [["shard", 0]]],
            [[-4, 3], [3, 1], [2], None, [["shard", 0]]],
            "fsdp",
        ],
    )
    def test_a_header_that_contradicts_itself_is_refused(self, fields: Any) -> None:
        tree = ["dtensor", 0, fields, [1, "cpu"], None]
        with pytest.raises(LayoutError):
            decode(tree, [self.part, torch.arange(2)])

    def test_equal_parts_have_equal_digests_and_other_cuts_others(self) -> None:
        assert digest({"w": cut_over(2, self.part)}) == digest({"w": cut_over(2, self.part)})
        others = [self.part, cut_over(2, self.part + 1), cut_over(2, self.part, rows=3)]
        assert digest({"w": cut_over(2, self.part)}) not in [digest({"w": w}) for w in others]
