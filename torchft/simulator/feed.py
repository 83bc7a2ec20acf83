"""Which samples each node sees at each step, and their fetching.

The order follows from (seed, epoch) alone: a new permutation of the data set in every epoch, of
which node r of N takes every N-th sample from the r-th on. A batch follows from (node, step), so
a run that resumes, or a node that heals, goes on where the step is. What does not fill a batch of
every node is left out until the next epoch shuffles it in.

    10 samples, 2 nodes, batches of 2      epoch 0:  node 0: [7 1] [4 0]    node 1: [3 9] [2 8]

A data set of tensors is cut by index, a batch at a time. Any other `Dataset` is asked for the
samples (`__getitems__` where it has that), with Python's, numpy's and torch's generators seeded
from (seed, node, step), and the samples are collated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, default_collate

from torchft.errors import SettingsError, TorchftError
from torchft.seeds import seed64
from torchft.simulator.node import NodeError, noted
from torchft.simulator.seeds import seed_everything

__all__ = ["Feed", "check_factory", "is_factory"]

_FETCHING = 1 << 32
"""Apart from the nodes' own numbers, so that fetching never draws what the model draws."""
_SHUFFLING = 1 << 33
_LOADER = {
    "collate_fn",
    "multiprocessing_context",
    "num_workers",
    "persistent_workers",
    "pin_memory",
    "pin_memory_device",
    "prefetch_factor",
    "timeout",
    "worker_init_fn",
}

Fetch = Callable[[Tensor], Any]


class Feed:
    """The batches of all nodes. `data` is a data set, tensors, or a factory
    `(rank, num_nodes, is_training) -> data set`.

    Raises:
        SettingsError: data that cannot be indexed, too few samples, or a wrong factory.
    """

    def __init__(
        self,
        data: Any,
        *,
        num_nodes: int,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 42,
        dataloader_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.num_nodes, self.batch_size = num_nodes, batch_size
        self._data, self._shuffle, self._seed = data, shuffle, seed
        self._loader = dict(dataloader_kwargs or {})
        unknown = sorted(self._loader.keys() - _LOADER)
        if unknown:
            raise SettingsError(
                f"dataloader_kwargs has {', '.join(unknown)}: it takes {', '.join(sorted(_LOADER))}"
            )
        self._shards: dict[int, _Shard] = {}
        self._streams: dict[int, _Stream] = {}
        self._own = is_factory(data)
        if self._own:
            check_factory(data)
        self._common = None if self._own else _Order(data, num_nodes, shuffle, seed)

    def batch(self, node: int, step: int) -> Any:
        """What `node` trains on at `step`, where the data are: on the CPU, as a rule.

        Raises:
            NodeError: the data set, or what puts its samples together, raised an error.
        """
        try:
            if self._loader.get("num_workers") or self._loader.get("pin_memory"):
                return self._stream(node).batch(step)
            return self._shard(node).batch(step)
        except TorchftError:
            raise
        except Exception as error:  # whatever the data set's own code raises
            raise NodeError(
                f"the data set failed at the batch of node {node} in step {step + 1}: "
                f"{_said(error)}"
            ) from error

    @property
    def own_data(self) -> bool:
        """Each node has a data set of its own, so that their samples may differ in number."""
        return self._own

    def samples(self, node: int) -> int:
        """How many samples `node` has in an epoch."""
        return self._shard(node).samples

    @property
    def batches_per_epoch(self) -> int:
        """Of the node that has the fewest."""
        nodes = range(self.num_nodes if self._own else 1)
        return min(self._shard(node).batches for node in nodes)

    def check(self) -> None:
        """Every node has at least one batch.

        Raises:
            SettingsError: one has not.
        """
        assert self.batches_per_epoch

    def close(self) -> None:
        """End the processes that load data."""
        self._streams.clear()

    def _shard(self, node: int) -> _Shard:
        shard = self._shards.get(node)
        if shard is None:
            order, rank = self._common, node
            if order is None:
                order, rank = self._order_of(node), 0
            shard = _Shard(
                order, rank, node, self.batch_size, self._seed, self._loader.get("collate_fn")
            )
            self._shards[node] = shard
        return shard

    def _order_of(self, node: int) -> _Order:
        """Of the data set that the factory gives this node."""
        with noted(f"the data set factory, asked for rank {node}"):
            data = self._data(node, self.num_nodes, True)
        try:
            return _Order(data, 1, self._shuffle, seed64(self._seed, node, 0))
        except SettingsError as error:
            raise SettingsError(
                f"what the data set factory gives node {node} (rank {node} of {self.num_nodes}): "
                f"{error}"
            ) from error

    def _stream(self, node: int) -> _Stream:
        if node not in self._streams:
            self._streams[node] = _Stream(self._shard(node), self._loader)
        return self._streams[node]


def _said(error: Exception) -> str:
    """Of a worker of torch's DataLoader, which sends a traceback, the last line."""
    text = str(error)
    if "Original Traceback" in text:
        return text.strip().rpartition("\n")[2]
    return f"{type(error).__name__}: {text}"


class _Order:
    """One data set, in the order of each epoch, dealt out to `parts` nodes."""

    def __init__(self, data: Any, parts: int, shuffle: bool, seed: int) -> None:
        self.data, self.parts = data, parts
        self._shuffle, self._seed = shuffle, seed
        size = _length(data)
        self.length = size // parts
        if not self.length:
            for_all = f" for {parts} nodes" if parts > 1 else ""
            raise SettingsError(f"{size} samples are too few{for_all}: each needs one")
        self._epoch = -1
        self._dealt: list[Tensor] = []

    def shard(self, rank: int, epoch: int) -> Tensor:
        """The samples of one node in one epoch."""
        if epoch != self._epoch:
            kept = self._indices(epoch)[: self.length * self.parts]
            self._dealt = list(kept.view(self.length, self.parts).t().contiguous())
            self._epoch = epoch
        return self._dealt[rank]

    def _indices(self, epoch: int) -> Tensor:
        size = _length(self.data)
        if not self._shuffle:
            return torch.arange(size, device="cpu")
        generator = torch.Generator().manual_seed(seed64(self._seed, _SHUFFLING, epoch))
        return torch.randperm(size, generator=generator, device="cpu")


class _Shard:
    """The batches of one node. A `Dataset` whose items are batches, by step."""

    def __init__(
        self,
        order: _Order,
        rank: int,
        node: int,
        batch_size: int,
        seed: int,
        collate: Callable[[list[Any]], Any] | None,
    ) -> None:
        self._order, self._rank, self._node = order, rank, node
        self._size, self._seed = batch_size, seed
        self.samples = order.length
        self.batches = order.length // batch_size
        if not self.batches:
            raise SettingsError(
                f"batch_size={batch_size} is more than the {order.length} samples of node {node}: "
                "use a smaller batch, fewer nodes or more data"
            )
        self._collate = collate
        self._fetch, self._seeds = self._fetching()

    def batch(self, step: int) -> Any:
        """Seeded where the data set's own code runs."""
        epoch, number = divmod(step, self.batches)
        shard = self._order.shard(self._rank, epoch)
        if self._seeds:
            seed_everything(seed64(self._seed, _FETCHING + self._node, step))
        return self._fetch(shard[number * self._size : (number + 1) * self._size])

    __getitem__ = batch

    def _fetching(self) -> tuple[Fetch, bool]:
        """How a batch is fetched, and whether that may draw random numbers."""
        cut = None if self._collate else _cutter(self._order.data)
        if cut is not None:
            return cut, False
        return _sampler(self._order.data, self._collate or default_collate), True

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_fetch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fetch, self._seeds = self._fetching()


class _Stream:
    """Batches by torch's DataLoader, ahead of their use. Steps that do not follow start it anew."""

    def __init__(self, shard: _Shard, options: Mapping[str, Any]) -> None:
        self._shard = shard
        self._options = {k: v for k, v in options.items() if k != "collate_fn"}
        self._next = -1
        self._batches: Iterator[Any] = iter(())

    def batch(self, step: int) -> Any:
        """The batch of `step`."""
        if step != self._next:
            loader: DataLoader[Any] = DataLoader(
                self._shard,  # type: ignore[arg-type]
                batch_size=None,
                sampler=_From(step),
                collate_fn=_as_it_is,
                **self._options,
            )
            self._batches = iter(loader)
        self._next = step + 1
        return next(self._batches)


class _From:
    """first, first + 1, …"""

    def __init__(self, first: int) -> None:
        self._first = first

    def __iter__(self) -> Iterator[int]:
        step = self._first
        while True:
            yield step
            step += 1


def _as_it_is(batch: Any) -> Any:
    return batch


def _cutter(data: Any) -> Fetch | None:
    """How a batch is cut out of tensors at once; None: this data set has none to show."""
    if isinstance(data, Tensor):
        return lambda at: _cut(data, at)
    if _is_columns(data):
        return lambda at: [_cut(t, at) for t in data]
    if isinstance(data, Mapping) and data and all(isinstance(t, Tensor) for t in data.values()):
        return lambda at: {name: _cut(t, at) for name, t in data.items()}
    if isinstance(data, TensorDataset) and type(data).__getitem__ is TensorDataset.__getitem__:
        return _cutter(data.tensors)
    if isinstance(data, Subset) and type(data).__getitem__ is Subset.__getitem__:
        inner, places = _cutter(data.dataset), torch.as_tensor(data.indices, device="cpu")
        return None if inner is None else lambda at: inner(places[at])
    return None


def _is_columns(data: Any) -> bool:
    """A tuple of tensors, or a list of them that cannot be a list of samples: all are as long,
    longer than the list is, and not of one kind."""
    if not isinstance(data, tuple | list) or not data:
        return False
    if not all(isinstance(t, Tensor) and t.dim() for t in data):
        return False
    if isinstance(data, tuple):
        return True
    alike = len({t.shape[0] for t in data}) == 1 and len(data) < data[0].shape[0]
    return alike and len({(t.shape, t.dtype) for t in data}) > 1


def _cut(data: Tensor, at: Tensor) -> Tensor:
    return data.index_select(0, at.to(data.device))


def _sampler(data: Any, collate: Callable[[list[Any]], Any]) -> Fetch:
    """How samples are asked for one by one, or in a list, and put together."""
    if isinstance(data, Mapping | tuple | list) and _cutter(data) is not None:
        raise SettingsError("collate_fn needs a data set of samples, like TensorDataset(x, y)")
    if hasattr(data, "__getitems__"):
        return lambda at: collate(data.__getitems__(at.tolist()))
    return lambda at: collate([data[i] for i in at.tolist()])


def _check_container(data: Any) -> None:
    """Refuse what has a length, yet is no data set.

    Raises:
        SettingsError: what to give instead.
    """
    name = type(data).__name__
    if isinstance(data, str | bytes):
        raise SettingsError(f"the data set is {data!r}: load it, and give a data set or tensors")
    if _is_numpy(data):
        raise SettingsError(f"the data set is a numpy {name}: give torch.from_numpy(…)")
    if _is_columns_of_arrays(data):
        raise SettingsError(
            f"the data set is a {name} of {len(data)} columns, and numpy arrays among them: give "
            "a tuple of tensors, tuple(map(torch.as_tensor, columns))"
        )
    if isinstance(data, DataLoader):
        raise SettingsError(
            f"the data set is a {name}: give its data set, loader.dataset, and batch_size=…; what "
            "else it was made with goes into dataloader_kwargs"
        )
    if isinstance(data, Mapping) and data and all(map(_is_numpy, data.values())):
        raise SettingsError(
            f"the data set is a {name} of numpy arrays: give a tensor for each name, "
            "{k: torch.from_numpy(a) for k, a in data.items()}"
        )
    if isinstance(data, Mapping) and _cutter(data) is None:
        raise SettingsError(
            f"the data set is a {name} of other things than tensors: give a tensor of all samples "
            "for each name"
        )
    if isinstance(data, Tensor) and not data.dim():
        raise SettingsError("the data set is one number: give a tensor with a row for each sample")


def _is_columns_of_arrays(data: Any) -> bool:
    """As `_is_columns`, with numpy's arrays. A list of many may be one of samples."""
    if not isinstance(data, tuple | list) or not any(map(_is_numpy, data)):
        return False
    lengths = {len(a) if isinstance(a, Tensor) or _is_numpy(a) else -1 for a in data}
    alike = len(lengths) == 1 and -1 not in lengths
    return alike and (isinstance(data, tuple) or len(data) < min(4, *lengths))


def _is_numpy(data: object) -> bool:
    return type(data).__module__.partition(".")[0] == "numpy"


def _length(data: Any) -> int:
    if isinstance(data, type):
        raise SettingsError(f"the data set is the class {data.__name__}: give an instance of it")
    _check_container(data)
    if isinstance(data, Tensor):
        return data.shape[0]
    columns = data.values() if isinstance(data, Mapping) else data
    if isinstance(data, Mapping | tuple | list) and _cutter(data) is not None:
        lengths = {t.shape[0] for t in columns}
        if len(lengths) > 1:
            raise SettingsError(f"the tensors have {sorted(lengths)} samples: they must be equal")
        return lengths.pop()
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise SettingsError(
            f"{type(data).__name__} has no length: give a data set that can be indexed"
        )
    return len(data)


def is_factory(data: Any) -> bool:
    """Whether `data` makes a data set for each node."""
    return callable(data) and not hasattr(data, "__getitem__")


def check_factory(factory: Callable[..., Any]) -> None:
    """It can be called as a factory is.

    Raises:
        SettingsError: it takes other arguments.
    """
    try:
        inspect.signature(factory).bind(0, 1, True)
    except TypeError as error:
        raise SettingsError(
            f"the data set factory {getattr(factory, '__name__', factory)!r} must take "
            f"(rank, num_nodes, train_dataset): {error}"
        ) from None
    except ValueError:
        return  # written in C: it has no signature to look at
