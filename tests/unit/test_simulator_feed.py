"""Order and fetching of the samples of each node."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import Samples
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from torchft.errors import SettingsError
from torchft.simulator.feed import Feed

NUMBERS = torch.arange(25)


def feed(data: Any = NUMBERS, **settings: Any) -> Feed:
    return Feed(data, **{"num_nodes": 3, "batch_size": 2, "seed": 1, **settings})


def epoch_of(one: Feed, epoch: int, node: int) -> list[int]:
    steps = range(epoch * one.batches_per_epoch, (epoch + 1) * one.batches_per_epoch)
    return [int(i) for step in steps for i in one.batch(node, step)]


class Lists(Samples):
    """Gives a list of samples when asked for several."""

    asked: list[list[int]]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.asked.append(indices)
        return [(i, 2 * i) for i in indices]


class TestOrder:
    def test_no_sample_goes_to_two_nodes_or_twice_to_one_in_an_epoch(self) -> None:
        one = feed()
        seen = [i for node in range(3) for i in epoch_of(one, 0, node)]
        assert one.batches_per_epoch == 4
        assert len(seen) == len(set(seen)) == 24

    def test_each_epoch_has_an_order_of_its_own(self) -> None:
        one = feed(num_nodes=1)
        first, second = epoch_of(one, 0, 0), epoch_of(one, 1, 0)
        assert first != second
        assert first != sorted(first)

    def test_left_out_samples_come_in_another_epoch(self) -> None:
        one = feed()
        seen = {i for epoch in range(9) for node in range(3) for i in epoch_of(one, epoch, node)}
        assert seen == set(range(25))

    def test_the_order_follows_from_the_seed(self) -> None:
        assert epoch_of(feed(), 1, 2) == epoch_of(feed(), 1, 2)
        assert epoch_of(feed(), 1, 2) != epoch_of(feed(seed=2), 1, 2)

    def test_a_batch_follows_from_its_step_whatever_was_asked_before(self) -> None:
        one, other = feed(), feed()
        epoch_of(one, 0, 1)
        assert torch.equal(one.batch(1, 9), other.batch(1, 9))
        assert torch.equal(one.batch(1, 2), other.batch(1, 2))

    def test_without_shuffling_samples_are_dealt_out_in_turn(self) -> None:
        one = feed(shuffle=False)
        assert [one.batch(node, 0).tolist() for node in range(3)] == [[0, 3], [1, 4], [2, 5]]
        assert one.batch(0, 4).tolist() == [0, 3], "the next epoch"


class TestFetching:
    def test_tensors_are_cut_whatever_holds_them(self) -> None:
        expected = feed().batch(1, 2)
        columns = (NUMBERS, NUMBERS * 2)
        both = [expected.tolist(), (expected * 2).tolist()]
        assert [t.tolist() for t in feed(columns).batch(1, 2)] == both
        assert [t.tolist() for t in feed(TensorDataset(*columns)).batch(1, 2)] == both
        named = feed({"x": NUMBERS, "y": NUMBERS * 2}).batch(1, 2)
        assert [named["x"].tolist(), named["y"].tolist()] == both

    def test_a_subset_of_tensors_is_cut_too(self) -> None:
        part = Subset(TensorDataset(NUMBERS * 10), list(range(24, -1, -1)))
        (cut,) = feed(part).batch(1, 2)
        assert cut.tolist() == [(24 - i) * 10 for i in feed().batch(1, 2).tolist()]

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_tensors_are_cut_where_they_lie(self) -> None:
        batch = feed(NUMBERS.cuda()).batch(1, 2)
        assert batch.is_cuda
        assert batch.tolist() == feed().batch(1, 2).tolist()

    def test_a_list_of_samples_is_asked_one_by_one_and_collated(self) -> None:
        samples = [(float(i), {"twice": 2 * i}) for i in range(25)]
        x, inside = feed(samples).batch(1, 2)
        assert x.tolist() == feed().batch(1, 2).tolist()
        assert inside["twice"].tolist() == (2 * x).tolist()

    def test_a_data_set_that_gives_several_samples_is_asked_once(self) -> None:
        data = Lists()
        data.asked = []
        i, twice = feed(data).batch(1, 2)
        assert data.asked == [i.tolist()]
        assert twice.tolist() == (2 * i).tolist()

    def test_what_a_data_set_draws_follows_from_node_and_step(self) -> None:
        one, other = feed(Samples()), feed(Samples())
        other.batch(0, 0)
        noise = one.batch(1, 2)["noise"]
        assert torch.equal(other.batch(1, 2)["noise"], noise)
        assert not torch.equal(one.batch(1, 6)["noise"], noise)

    def test_samples_are_put_together_as_asked(self) -> None:
        def together(samples: list[tuple[Tensor, ...]]) -> Tensor:
            return torch.stack([sample[0] for sample in samples]) + 100

        one = feed(TensorDataset(NUMBERS), dataloader_kwargs={"collate_fn": together})
        assert torch.equal(one.batch(1, 2), feed().batch(1, 2) + 100)

    def test_a_shard_travels_to_a_worker_that_is_started_anew(self) -> None:
        shard = feed((NUMBERS, NUMBERS))._shard(1)
        there = pickle.loads(pickle.dumps(shard))
        assert torch.equal(there.batch(2)[0], shard.batch(2)[0])


class TestFactory:
    def test_each_node_gets_a_data_set_of_its_own(self) -> None:
        calls = []

        def factory(rank: int, num_nodes: int, train_dataset: bool) -> Tensor:
            calls.append((rank, num_nodes, train_dataset))
            return torch.arange(10) + 100 * rank

        one = feed(factory)
        seen = epoch_of(one, 0, 2)
        assert sorted(seen) == list(range(200, 210)) != seen
        assert sorted(calls) == [(0, 3, True), (1, 3, True), (2, 3, True)]
        assert [i - 100 for i in epoch_of(one, 0, 1)] != [i - 200 for i in seen]

    def test_an_epoch_ends_with_the_smallest(self) -> None:
        one = feed(lambda rank, num_nodes, train: torch.arange(4 + 4 * rank))
        assert one.batches_per_epoch == 2
        assert len({int(i) for step in range(4) for i in one.batch(1, step)}) == 8

    def test_another_signature_is_refused_before_it_is_called(self) -> None:
        with pytest.raises(SettingsError, match=r"must take \(rank, num_nodes, train_dataset\)"):
            feed(lambda rank: NUMBERS)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (torch.arange(2), {}, "2 samples are too few for 3 nodes"),
        (NUMBERS, {"batch_size": 9}, "batch_size=9 is more than the 8 samples of node 0"),
        ((torch.arange(9), torch.arange(8)), {}, r"the tensors have \[8, 9\] samples"),
        (iter([1, 2]), {}, "has no length"),
        (Samples, {}, "is the class Samples: give an instance"),
        (NUMBERS, {"dataloader_kwargs": {"shuffle": True}}, "dataloader_kwargs has shuffle"),
        (lambda r, n, t: NUMBERS[: 4 - 2 * r], {"batch_size": 3}, "2 samples of node 1"),
    ],
)
def test_bad_data_are_refused(data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        feed(data, **settings).check()


def test_a_stream_without_length_is_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(9))

    with pytest.raises(SettingsError, match="Stream has no length"):
        feed(Stream())


class TestContainers:
    def test_a_dict_gives_dicts_and_a_list_of_unlike_tensors_gives_lists(self) -> None:
        x, y = torch.randn(25, 3), NUMBERS
        both = feed((x, y)).batch(1, 2)
        named = feed({"x": x, "y": y}).batch(1, 2)
        assert torch.equal(named["x"], both[0]) and torch.equal(named["y"], both[1])
        assert all(map(torch.equal, feed([x, y]).batch(1, 2), both))

    def test_a_list_of_tensors_of_one_shape_holds_samples(self) -> None:
        assert feed(list(torch.arange(100).view(25, 4))).batch(1, 2).shape == (2, 4)

    def test_a_list_of_images_of_several_sizes_holds_samples(self) -> None:
        images = [torch.zeros(3, 4, 4 + i % 2) for i in range(25)]
        assert len(feed(images, dataloader_kwargs={"collate_fn": list}).batch(1, 2)) == 2

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("data.csv", "the data set is 'data.csv': load it"),
            (np.zeros((25, 3)), r"is a numpy ndarray: give torch.from_numpy\(…\)"),
            (DataLoader(TensorDataset(NUMBERS)), "is a DataLoader: give its data set, loader.data"),
            ({"x": [1, 2, 3]}, "is a dict of other things than tensors"),
            (torch.tensor(1.0), "is one number"),
            ({"x": NUMBERS, "y": NUMBERS[:7]}, r"have \[7, 25\] samples"),
        ],
    )
    def test_what_is_no_data_set_is_refused_with_the_next_step(
        self, data: Any, message: str
    ) -> None:
        with pytest.raises(SettingsError, match=message):
            feed(data)

    def test_columns_are_not_collated(self) -> None:
        with pytest.raises(SettingsError, match="collate_fn needs a data set of samples, like"):
            feed((NUMBERS, NUMBERS), dataloader_kwargs={"collate_fn": list}).check()
