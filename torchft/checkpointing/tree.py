"""A state dict as plain JSON and a list of leaves, and back.

JSON's own values stand for themselves; everything else is a list that begins with its tag:

    {"w": tensor, 3: (1, None)}   →   ["dict", ["w", ["tensor", 0]], [3, ["tuple", 1, null]]]

Types are kept exactly: a tuple comes back as a tuple, a numpy scalar as that scalar. A type that
is not listed here is refused by name and place before anything is sent, because guessing would
heal a group into a slightly different state. Tensors come back on the CPU and without gradients.
Positions that hold the very same tensor memory (tied weights) share it again afterwards.

Of a DTensor the part of this rank travels, and how it is cut. It comes back over a mesh that equals
the donor's and cannot communicate; `own_mesh.py` puts it on the receiver's.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchft.checkpointing.layout import DTYPES, LayoutError, Leaf
from torchft.checkpointing.memory import SourceLeaf
from torchft.errors import MismatchError
from torchft.sharded import Sharding, is_dtensor, local_part, mesh_of

__all__ = [
    "Path",
    "check_cut",
    "decode",
    "encode",
    "in_words",
    "read_sharding",
    "same_places",
    "tensors_of",
    "write_sharding",
]

MAX_DEPTH = 100
_MAX_INT_BITS = 4096
_TENSORS = ("tensor", "parameter", "dtensor")
_MAPPINGS = {"dict": 0, "counter": 0, "ordered": 1, "defaultdict": 1}
_SEQUENCES = {"list": 0, "tuple": 0, "set": 0, "frozenset": 0, "deque": 1}
"""Tags of what holds other values, and how many fields stand before these."""
_TORCH_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_FACTORIES: dict[str, type] = {
    kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)
}
"""What a defaultdict that travels may make its values with: by name, since nothing is pickled."""

_MALFORMED = (
    *(TypeError, ValueError, ArithmeticError, LookupError),
    *(RuntimeError, AttributeError, AssertionError),
)
"""What our readers and torch raise where a tree names what its leaves are not."""

Json = Any
Path = tuple[object, ...]
"""Keys and positions that lead to a value."""


def encode(state: object) -> tuple[Json, list[SourceLeaf]]:
    """The tree of `state` and its leaves in order, which show the memory of `state`.

    Raises:
        TypeError: a value cannot travel; the message names its place.
    """
    encoder = _Encoder()
    return encoder.value(state, ()), encoder.leaves


def decode(tree: Json, leaves: Sequence[Tensor]) -> Any:
    """The state of which `encode` made `tree`; it views the memory of `leaves`.

    Raises:
        LayoutError: the tree is not one that `encode` makes.
        MismatchError: it has DTensors, and this process cannot have any.
    """
    try:
        return _Decoder(leaves).value(tree)
    except (LayoutError, MismatchError):
        raise
    except _MALFORMED as error:
        raise LayoutError(f"the header's tree is malformed: {str(error)[:200]}") from None


def same_places(tree: Json, template: Json) -> dict[int, int]:
    """Which tensor of `template` is in the place of which of `tree`, by index.

    Dicts are compared by key, sequences by position; what only one of them has is left out.

    Raises:
        MismatchError: a tensor is cut in another way, or only in one of them.
    """
    found: dict[int, int] = {}
    _compare(tree, template, (), found)
    return found


def in_words(path: Path) -> str:
    """The place of a value in a state dict, for an error: `state_dict['model']['w']`."""
    return f"state_dict{''.join(f'[{key!r}]' for key in path[:20])}"


def check_cut(path: Path, theirs: Sharding | None, ours: Sharding | None) -> None:
    """See that a tensor is cut alike at the donor and here; None: it is not cut.

    Raises:
        MismatchError: it is not.
    """
    if theirs == ours:
        return
    donor, here = ("a plain tensor" if cut is None else cut for cut in (theirs, ours))
    raise MismatchError(
        f"{in_words(path)} is {donor} at the donor and {here} here: shard the model alike in every "
        "group, over as many ranks"
    )


def _compare(tree: Json, template: Json, path: Path, found: dict[int, int]) -> None:
    match tree, template:
        case [str(kind), int(index), *cut], [str(other_kind), int(other), *own_cut] if (
            kind in _TENSORS and other_kind in _TENSORS
        ):
            check_cut(path, _cut_of(kind, cut), _cut_of(other_kind, own_cut))
            found.setdefault(index, other)
        case [str(kind), *pairs], [str(other_kind), *others] if (
            kind in _MAPPINGS and other_kind in _MAPPINGS
        ):
            known = {str(key): value for key, value in others[_MAPPINGS[other_kind] :]}
            for key, value in pairs[_MAPPINGS[kind] :]:
                _compare(value, known.get(str(key)), (*path, key), found)
        case [str(kind), *items], [str(other_kind), *others] if (
            kind in _SEQUENCES and other_kind in _SEQUENCES
        ):
            here = others[_SEQUENCES[other_kind] :]
            for i, (item, other) in enumerate(zip(items[_SEQUENCES[kind] :], here, strict=False)):
                _compare(item, other, (*path, i), found)


def _cut_of(kind: str, fields: Sequence[Json]) -> Sharding | None:
    return read_sharding(fields[0]) if kind == "dtensor" else None


def tensors_of(tree: Json, path: Path = ()) -> Iterator[tuple[Path, list[Json]]]:
    """Where in a tree its tensors are, and the list that stands for each, which may be changed.
    Keys in the paths are strings."""
    match tree:
        case [str(kind), *_] if kind in _TENSORS:
            yield path, tree
        case [str(kind), *pairs] if kind in _MAPPINGS:
            for key, value in pairs[_MAPPINGS[kind] :]:
                yield from tensors_of(value, (*path, str(key)))
        case [str(kind), *items] if kind in _SEQUENCES:
            for i, item in enumerate(items[_SEQUENCES[kind] :]):
                yield from tensors_of(item, (*path, str(i)))


def write_sharding(cut: Sharding) -> Json:
    """How a DTensor is cut, as JSON."""
    names = None if cut.names is None else list(cut.names)
    placements = [list(placement) for placement in cut.placements]
    return [list(cut.shape), list(cut.stride), list(cut.mesh), names, placements]


def read_sharding(fields: Json) -> Sharding:
    """The inverse.

    Raises:
        LayoutError: `fields` are none that `write_sharding` makes.
    """
    match fields:
        case [list(shape), list(stride), list(mesh), list() | None as names, list(placements)] if (
            all(type(n) is int and n >= 0 for n in (*shape, *stride, *mesh))
            and all(type(name) is str for name in names or ())
        ):
            placed = tuple(tuple(placement) for placement in placements)
            named = None if names is None else tuple(names)
            return Sharding(tuple(shape), tuple(stride), tuple(mesh), named, placed)
    raise LayoutError(f"the header describes a sharding as {str(fields)[:80]}")


class _Encoder:
    def __init__(self) -> None:
        self.leaves: list[SourceLeaf] = []
        # Where a tensor's memory already is a leaf: tied weights travel once.
        self._index: dict[tuple[object, ...], int] = {}
        # Where the ranks of a mesh already are a leaf.
        self._meshes: dict[object, int] = {}
        self._writers: dict[type, Callable[[Any, Path], Json]] = {
            dict: lambda value, path: self._pairs("dict", value, path),
            OrderedDict: self._ordered_dict,
            Counter: lambda value, path: self._pairs("counter", value, path),
            list: lambda value, path: self._items("list", value, path),
            tuple: lambda value, path: self._items("tuple", value, path),
            set: lambda value, path: self._items("set", value, path),
            frozenset: lambda value, path: self._items("frozenset", value, path),
            defaultdict: self._default_dict,
            deque: self._deque,
            timedelta: lambda value, _: [
                *("timedelta", value.days, value.seconds, value.microseconds),
            ],
            torch.Size: lambda value, path: self._items("size", value, path),
            int: self._int,
            complex: lambda value, path: ["complex", value.real, value.imag],
            bytes: lambda value, path: ["bytes", self._add(np.frombuffer(value, np.uint8), path)],
            torch.dtype: lambda value, path: ["dtype", self._dtype(value, path)],
            torch.device: lambda value, path: ["device", str(value)],
            Tensor: lambda value, path: ["tensor", self._tensor(value, path)],
            nn.Parameter: lambda value, path: [
                "parameter",
                self._tensor(value, path),
                value.requires_grad,
            ],
            np.ndarray: lambda value, path: ["array", self._add(value, path)],
        }

    def value(self, value: object, path: Path) -> Json:
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if len(path) > MAX_DEPTH:
            raise _refusal(path, f"nested deeper than {MAX_DEPTH} levels: does it contain itself?")
        writer = self._writers.get(kind)
        if writer is not None:
            return writer(value, path)
        if isinstance(value, np.generic):
            return ["scalar", self._add(np.asarray(value), path)]
        if is_dtensor(value):
            return self._dtensor(value, path)
        raise _refusal(path, _why_not(value))

    def _pairs(self, tag: str, value: dict[Any, Any], path: Path) -> Json:
        return [
            tag,
            *([self._key(key, path), self.value(v, (*path, key))] for key, v in value.items()),
        ]

    def _key(self, key: object, path: Path) -> Json:
        if isinstance(key, (str, int, float, bool, tuple, type(None))):
            return self.value(key, (*path, key))
        raise _refusal(path, f"the key {key!r} is a {_name(key)}; keys are strings or numbers")

    def _ordered_dict(self, value: OrderedDict[Any, Any], path: Path) -> Json:
        # nn.Module.state_dict() keeps the versions of its modules' state in this attribute.
        metadata = self.value(getattr(value, "_metadata", None), (*path, "_metadata"))
        tag, *pairs = self._pairs("ordered", value, path)
        return [tag, metadata, *pairs]

    def _default_dict(self, value: defaultdict[Any, Any], path: Path) -> Json:
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", None)
        if factory is not None and _FACTORIES.get(str(name)) is not factory:
            raise _refusal(
                path,
                f"a defaultdict of {factory!r} cannot travel, only one of "
                f"{', '.join(_FACTORIES)}: save dict(…) of it",
            )
        tag, *pairs = self._pairs("defaultdict", value, path)
        return [tag, name, *pairs]

    def _deque(self, value: deque[Any], path: Path) -> Json:
        tag, *items = self._items("deque", value, path)
        return [tag, value.maxlen, *items]

    def _items(self, tag: str, value: Iterable[object], path: Path) -> Json:
        return [tag, *(self.value(item, (*path, i)) for i, item in enumerate(value))]

    def _int(self, value: int, path: Path) -> Json:
        if value.bit_length() > _MAX_INT_BITS:
            raise _refusal(path, f"an integer of {value.bit_length()} bits is too large")
        return value

    def _dtype(self, dtype: torch.dtype, path: Path) -> str:
        if dtype not in _TORCH_DTYPE_NAMES:
            raise _refusal(
                path, f"{dtype} is not among the dtypes that travel: {', '.join(DTYPES)}"
            )
        return _TORCH_DTYPE_NAMES[dtype]

    def _tensor(self, tensor: Tensor, path: Path) -> int:
        if tensor.layout != torch.strided or tensor.device.type == "meta":
            what = "on the meta device" if tensor.is_meta else f"of layout {tensor.layout}"
            raise _refusal(path, f"a tensor {what} has no plain bytes")
        leaf = Leaf(self._dtype(tensor.dtype, path), tuple(tensor.shape))
        # Conjugated and negated views have the memory of their base, but not its values.
        lazily = (tensor.is_conj(), tensor.is_neg())
        place = (tensor.data_ptr(), tensor.device, tensor.dtype, *tensor.shape, *tensor.stride())
        if leaf.nbytes and (*place, *lazily) in self._index:
            return self._index[(*place, *lazily)]
        self._index[(*place, *lazily)] = len(self.leaves)
        self.leaves.append(SourceLeaf(leaf, tensor.detach()))
        return len(self.leaves) - 1

    def _dtensor(self, value: Any, path: Path) -> Json:
        try:
            cut = Sharding.of(value)
        except TypeError as error:
            raise _refusal(path, str(error)) from None
        local, mesh = local_part(value), value.device_mesh
        if type(local) is not Tensor:
            raise _refusal(path, f"in a DTensor, {_why_not(local)}")
        if mesh not in self._meshes:
            self._meshes[mesh] = self._add(mesh.mesh.numpy(), path)
        return [
            "dtensor",
            self._tensor(local, path),
            write_sharding(cut),
            [self._meshes[mesh], mesh.device_type],
            value.requires_grad if isinstance(value, nn.Parameter) else None,
        ]

    def _add(self, array: np.ndarray[Any, Any], path: Path) -> int:
        if array.dtype.name not in DTYPES:
            raise _refusal(path, f"numpy data of dtype {array.dtype} cannot travel")
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        self.leaves.append(SourceLeaf(Leaf(array.dtype.name, array.shape), native))
        return len(self.leaves) - 1


class _Decoder:
    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self._read_as_bytes: set[int] = set()
        self._meshes: dict[tuple[object, ...], Any] = {}
        self._readers: dict[str, Callable[..., Any]] = {
            "dict": self._pairs,
            "ordered": self._ordered_dict,
            "counter": lambda *pairs: Counter(self._pairs(*pairs)),
            "list": lambda *items: [self.value(item) for item in items],
            "tuple": lambda *items: tuple(self.value(item) for item in items),
            "set": lambda *items: {self.value(item) for item in items},
            "frozenset": lambda *items: frozenset(self.value(item) for item in items),
            "defaultdict": lambda name, *pairs: defaultdict(
                None if name is None else _FACTORIES[name], self._pairs(*pairs)
            ),
            "deque": lambda most, *items: deque((self.value(item) for item in items), most),
            "timedelta": timedelta,
            "size": lambda *items: torch.Size(items),
            "complex": complex,
            "bytes": self._bytes,
            "dtype": lambda name: DTYPES[name],
            "device": lambda name: torch.device(name),
            "tensor": self._tensor,
            "parameter": lambda i, grad: nn.Parameter(self._tensor(i), requires_grad=bool(grad)),
            "dtensor": self._dtensor,
            "array": lambda index: self._tensor(index).numpy(),
            "scalar": lambda index: self._tensor(index).numpy()[()],
        }

    def value(self, tree: Json) -> Any:
        if tree is None or type(tree) in (bool, int, float, str):
            return tree
        match tree:
            case [str(tag), *fields] if tag in self._readers:
                return self._readers[tag](*fields)
        raise LayoutError(f"the header's tree holds {str(tree)[:80]}")

    def _pairs(self, *pairs: Json) -> dict[Any, Any]:
        return {self.value(key): self.value(value) for key, value in pairs}

    def _ordered_dict(self, metadata: Json, *pairs: Json) -> OrderedDict[Any, Any]:
        ordered = OrderedDict(self._pairs(*pairs))
        if metadata is not None:
            ordered._metadata = self.value(metadata)  # type: ignore[attr-defined]
        return ordered

    def _tensor(self, index: object) -> Tensor:
        if type(index) is not int or not 0 <= index < len(self._leaves):
            raise LayoutError(f"the header's tree names the leaf {str(index)[:40]}")
        return self._leaves[index]

    def _dtensor(self, index: int, cut: Json, mesh: Json, grad: bool | None) -> Any:
        sharding = read_sharding(cut)
        made = sharding.join(self._tensor(index), self._mesh(sharding, *mesh))
        return made if grad is None else nn.Parameter(made, requires_grad=bool(grad))

    def _mesh(self, sharding: Sharding, index: int, device: str) -> Any:
        key = (index, device, sharding.names)
        if key not in self._meshes:
            ranks = self._tensor(index)
            if tuple(ranks.shape) != sharding.mesh or type(device) is not str:
                raise LayoutError(f"a mesh of {sharding.mesh} has ranks of {tuple(ranks.shape)}")
            self._meshes[key] = mesh_of(ranks, device, sharding.names)
        return self._meshes[key]

    def _bytes(self, index: int) -> bytes:
        leaf = self._tensor(index)
        # This is a copy: a leaf that many places name would take memory that no size declared.
        if index in self._read_as_bytes or leaf.dtype != torch.uint8:
            raise LayoutError(f"leaf {index} is no byte string of its own")
        self._read_as_bytes.add(index)
        return leaf.numpy().tobytes()


def _why_not(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {_name(value)} is a tensor subclass, which cannot travel as it is: unwrap it"
    return (
        f"a {_name(value)} cannot travel to a healing group, because nothing is pickled: leave it "
        "out of the state dict, or turn it into tensors, numbers, strings and containers of them"
    )


def _refusal(path: Path, why: str) -> TypeError:
    return TypeError(f"{in_words(path)}: {why}")


def _name(value: object) -> str:
    return type(value).__name__
