"""One short text that is equal exactly when two states are.

Groups that have committed the same steps have the same state, bit for bit. Equal digests of the
weights and the outer state are how that is shown after kills and heals.

What counts: the values, their types, dtypes and shapes, and the bytes of tensors, so that -0.0 is
not 0.0. What does not: the order of a dict's keys, the device, strides and shared memory. Of a
DTensor the part of this rank counts, and how it is cut: equal ranks of two groups have equal ones.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchft.sharded import Sharding, is_dtensor, local_part

__all__ = ["digest"]

Update = Callable[[bytes | memoryview], None]

_PLAIN = (bool, int, float, complex, str, timedelta, torch.dtype, torch.device)


def digest(tree: object) -> str:
    """SHA-256 of a nested state, as 64 hexadecimal digits.

    `tree` is made of tensors, numpy arrays and scalars, None, bool, int, float, complex, str,
    bytes, timedelta, dtypes, devices, and of dicts, lists, tuples, deques and sets of them.

    Raises:
        TypeError: it holds something else; the message names its place.
    """
    return _hash(tree, ()).hex()


def _hash(value: object, path: tuple[object, ...]) -> bytes:
    hasher = hashlib.sha256()
    _feed(value, path, hasher.update)
    return hasher.digest()


def _feed(value: object, path: tuple[object, ...], update: Update) -> None:
    if is_dtensor(value):
        _feed_dtensor(value, path, update)
    elif isinstance(value, Tensor):
        _feed_tensor(value, path, update)
    elif isinstance(value, np.ndarray | np.generic):
        _feed_array(np.asarray(value), path, update)
    elif isinstance(value, Mapping):
        _open(update, "map", len(value))
        for key in sorted(value, key=lambda key: (type(key).__name__, repr(key))):
            _feed(key, (*path, key), update)
            _feed(value[key], (*path, key), update)
    elif isinstance(value, set | frozenset):
        _open(update, "set", len(value))
        for part in sorted(_hash(item, path) for item in value):
            update(part)
    elif isinstance(value, list | tuple | deque):
        _open(update, "sequence", len(value))
        for index, item in enumerate(value):
            _feed(item, (*path, index), update)
    else:
        _feed_plain(value, path, update)


def _feed_tensor(tensor: Tensor, path: tuple[object, ...], update: Update) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise _refusal(path, f"a {type(tensor).__name__} has no plain bytes: give its local tensor")
    _open(update, f"{tensor.dtype} {tuple(tensor.shape)}", tensor.numel())
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    update(plain.reshape(-1).view(torch.uint8).numpy().data)


def _feed_dtensor(value: Any, path: tuple[object, ...], update: Update) -> None:
    try:
        cut = Sharding.of(value)
    except TypeError as error:
        raise _refusal(path, str(error)) from None
    _open(update, f"sharded {cut}", len(cut.mesh))
    _feed_tensor(local_part(value), path, update)


def _feed_array(array: np.ndarray[Any, Any], path: tuple[object, ...], update: Update) -> None:
    if array.dtype.kind not in "biufc":
        raise _refusal(path, f"numpy data of dtype {array.dtype}")
    _open(update, f"numpy.{array.dtype.name} {array.shape}", array.size)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    update(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data)


def _feed_plain(value: object, path: tuple[object, ...], update: Update) -> None:
    if isinstance(value, bytes):
        text = value
    elif value is None or isinstance(value, _PLAIN):
        text = repr(value).encode()
    else:
        raise _refusal(path, f"a {type(value).__name__} has no digest")
    _open(update, type(value).__name__, len(text))
    update(text)


def _open(update: Update, kind: str, length: int) -> None:
    """Say what follows and how long it is, so that no two trees give the same bytes."""
    update(f"{kind}:{length};".encode())


def _refusal(path: tuple[object, ...], why: str) -> TypeError:
    return TypeError(f"state{''.join(f'[{key!r}]' for key in path)}: {why}")
