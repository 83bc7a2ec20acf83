"""Rounds among rows, and what is recorded of them."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import Tiny
from torch import Tensor
from torch.testing import assert_close

from torchft.errors import SettingsError
from torchft.ordered import ordered_mean
from torchft.peers import Place
from torchft.quantization import codec_of, mean_bytes, quantized_mean
from torchft.simulator.events import Dies, Discards, Event, Joins, Membership, Misses
from torchft.simulator.peers import StackedPeers
from torchft.simulator.stacked import StackedLocal
from torchft.strategies import LocalSGDRecipe, Recipe, Strategy
from torchft.strategies.inner import Inner


class Keeps(LocalSGDRecipe):
    """With own state."""

    def setup(self) -> None:
        super().setup()
        self.own["residual"] = [torch.ones(self.local.rows, 2)]


class World:
    """Three nodes whose weights are 0, 1, 2, after a start from 9."""

    def __init__(self, *events: Event, nodes: int = 3, deterministic: bool = False) -> None:
        self.local = StackedLocal(Tiny(), nodes, Inner(), max_steps=10)
        self.weights = self.local.weights(self.local.whole)[0]
        self.weights.fill_(9.0)
        self.recipe = Keeps(1)
        strategy = Strategy([self.recipe])
        self.peers = StackedPeers(
            self.local, Membership(nodes, events), strategy, deterministic=deterministic
        )
        strategy.bind(self.local, self.peers)
        self.weights.copy_(torch.arange(float(nodes))[:, None].expand_as(self.weights))


def rows(nodes: int = 3, size: int = 5) -> Tensor:
    """Row r is full of 2 ** r."""
    return (2.0 ** torch.arange(nodes))[:, None].repeat(1, size)


def test_all_average() -> None:
    opened = World().peers.open(Place.AFTER)
    one, other = opened.average([rows(), rows() * 3]).wait()
    assert_close(one, torch.full((1, 5), 7 / 3))
    assert_close(other, torch.full((1, 5), 7.0))
    assert not opened.bootstrap
    assert not opened.failed
    assert opened.close()


def test_the_dead_are_not_in_an_average_or_a_gathering() -> None:
    world = World(Dies(1, 0))
    world.peers.begin(0)
    opened = world.peers.open(Place.AFTER)
    assert opened.average([rows()]).wait()[0][0, 0] == 2.5
    assert opened.gather([rows()]).wait()[0][:, 0].tolist() == [1, 4]
    assert world.local.alive == [0, 2]


class TestJoining:
    @pytest.mark.parametrize(
        ("place", "mean"), [(Place.AFTER, 2.5), (Place.BEFORE, 7 / 3)], ids=["after", "before"]
    )
    def test_one_that_heals_counts_only_with_its_gradients(self, place: Place, mean: float) -> None:
        world = World(Joins(1, 4))
        world.peers.begin(4)
        opened = world.peers.open(place)
        assert opened.members == (0, 1, 2)
        assert_close(opened.average([rows()]).wait()[0][0, 0].item(), mean)

    def test_it_starts_from_what_all_share_not_from_its_donors_weights(self) -> None:
        world = World(Joins(1, 4, donor=2))
        world.peers.begin(4)
        world.peers.open(Place.AFTER)
        assert world.weights[:, 0].tolist() == [0, 9, 2]
        assert world.recipe.own["residual"][0].tolist() == [[1, 1], [0, 0], [1, 1]]
        (heal,) = world.peers.heals
        assert (heal.step, heal.node, heal.donor) == (4, 1, 2)
        model, backup = world.local.models[2], world.weights[2]
        assert heal.nbytes == backup.nbytes + sum(t.nbytes for t in model.state_dict().values())

    def test_it_waits_for_a_round(self) -> None:
        world = World(Joins(1, 2))
        world.peers.begin(2)
        world.peers.begin(3)
        assert world.local.alive == [0, 2]


class TestNo:
    def test_a_member_is_lost_while_the_round_is_open(self) -> None:
        world = World(Dies(1, 3, in_round=True))
        world.peers.begin(3)
        opened = world.peers.open(Place.AFTER)
        opened.average([rows()])
        assert not opened.close()
        (record,) = world.peers.rounds
        assert record.members == (0, 1, 2)
        assert not record.committed
        following = world.peers.open(Place.AFTER)
        assert following.members == (0, 2)
        assert following.close()

    def test_a_member_is_lost_and_back_before_a_late_close(self) -> None:
        world = World(Dies(1, 4), Joins(1, 5))
        late = world.peers.open(Place.AFTER)
        world.peers.begin(4)
        world.peers.begin(5)
        world.peers.open(Place.AFTER)
        assert world.local.alive == [0, 1, 2]
        assert not late.close()

    def test_it_is_voted_down(self) -> None:
        world = World(Discards(3))
        world.peers.begin(3)
        assert not world.peers.open(Place.AFTER).close()
        world.peers.begin(4)
        assert world.peers.open(Place.AFTER).close()

    def test_it_is_given_up(self) -> None:
        opened = World().peers.open(Place.AFTER)
        opened.fail(RuntimeError("cannot go on"))
        assert not opened.close()

    def test_one_misses_a_commit_and_heals_in_the_next_round(self) -> None:
        world = World(Misses(1, 3))
        world.peers.begin(3)
        opened = world.peers.open(Place.AFTER)
        assert opened.average([rows()]).wait()[0][0, 0].item() == pytest.approx(7 / 3)
        assert opened.close()
        assert world.local.alive == [0, 2]
        world.peers.begin(4)
        assert world.peers.open(Place.AFTER).counted == (0, 2)
        assert world.local.alive == [0, 1, 2]


class TestCodec:
    @pytest.mark.parametrize("codec", ["bf16", "fp8", "int8", "int4"])
    def test_an_average_is_the_quantised_mean_of_the_members_rows(self, codec: str) -> None:
        sent = torch.randn(3, 999, generator=torch.Generator().manual_seed(0))
        opened = World().peers.open(Place.AFTER)
        (mean,) = opened.average([sent], codec_of(codec)).wait()
        assert torch.equal(mean, quantized_mean(sent, codec_of(codec)))
        assert not torch.equal(mean, ordered_mean(sent))

    def test_one_that_heals_sums_a_chunk_and_leaves_no_trace(self) -> None:
        world = World(Joins(1, 4), Dies(3, 4), nodes=4)
        world.peers.begin(4)
        opened = world.peers.open(Place.AFTER)
        assert (opened.members, opened.counted) == ((0, 1, 2), (0, 2))
        sent = torch.randn(4, 999, generator=torch.Generator().manual_seed(0))
        (mean,) = opened.average([sent], codec_of("int8")).wait()
        assert torch.equal(mean, quantized_mean(sent[:3], codec_of("int8"), [0, 2]))
        opened.close()
        one = mean_bytes(codec_of("int8"), 999, 3)
        assert world.peers.rounds[0].bytes_per_node == dict.fromkeys(range(3), one)

    def test_each_member_gets_back_what_did_not_arrive_of_its_row(self) -> None:
        world = World(Joins(1, 4), Dies(2, 4), nodes=4)
        world.peers.begin(4)
        opened = world.peers.open(Place.AFTER)
        sent = torch.randn(4, 999, generator=torch.Generator().manual_seed(0))
        error_feedback, of_members = sent.clone(), sent[[0, 1, 3]]
        (mean,) = opened.average([sent], codec_of("int4"), [error_feedback]).wait()
        rows = sent[[0, 1, 3]]
        assert torch.equal(mean, quantized_mean(rows, codec_of("int4"), [0, 2], of_members))
        assert torch.equal(error_feedback[[0, 1, 3]], of_members)
        assert torch.equal(error_feedback[2], sent[2])

    @pytest.mark.parametrize("deterministic", [True, False])
    def test_bytes_are_those_of_the_codec_in_any_order(self, deterministic: bool) -> None:
        world = World(deterministic=deterministic)
        opened = world.peers.open(Place.AFTER)
        opened.average([rows(), rows(size=4), torch.zeros(3, 0)], codec_of("int8"))
        opened.close()
        (record,) = world.peers.rounds
        assert (record.kind, record.collectives) == ("quantized", 2)
        # Chunks of 2 and 2 numbers with a scale of 4 bytes each, to 2 others, twice.
        assert record.bytes_per_node == dict.fromkeys(range(3), 2 * 2 * (6 + 6))

    def test_what_one_node_has_overflown_is_seen_in_the_average(self) -> None:
        sent = rows(size=600)
        sent[1, 5] = torch.inf
        (mean,) = World().peers.open(Place.AFTER).average([sent], codec_of("int8")).wait()
        assert not mean[0, 5].isfinite() and mean[0, 200:].isfinite().all()

    def test_a_dtype_that_it_cannot_hold_is_refused(self) -> None:
        opened = World().peers.open(Place.AFTER)
        with pytest.raises(SettingsError, match="no float64: cast it before"):
            opened.average([rows().double()], codec_of("fp32"))


class TestIslands:
    def test_each_has_its_own_mean(self) -> None:
        opened = World(nodes=4).peers.open(Place.AFTER)
        (mixed,) = opened.average_within([rows(4)], lambda n: [[0, 3], [1, 2]]).wait()
        assert mixed[:, 0].tolist() == [4.5, 3, 3, 4.5]

    def test_they_are_drawn_among_those_that_count(self) -> None:
        world = World(Joins(1, 2), nodes=4)
        world.peers.begin(2)
        opened = world.peers.open(Place.AFTER)
        drawn: list[int] = []

        def islands(participants: int) -> list[list[int]]:
            drawn.append(participants)
            return [[0, 2], [1]]

        sent = rows(4)
        (mixed,) = opened.average_within([sent], islands).wait()
        assert drawn == [3]
        assert mixed[:, 0].tolist() == [4.5, 2, 4, 4.5]
        assert torch.equal(sent, rows(4)), "what was sent stays"


class TestBytes:
    """Of float32 `[3, 5]` and `[3, 4]` among 3 members."""

    @pytest.mark.parametrize(
        ("deterministic", "kind", "expected"),
        # Ring: 2 · 2/3 of 20 and 16 bytes. Ordered: 2 chunks of 2 elements, twice, for each.
        [(False, "average", 26 + 21), (True, "ordered", 32 + 32)],
    )
    def test_of_averages(self, deterministic: bool, kind: str, expected: int) -> None:
        world = World(deterministic=deterministic)
        opened = world.peers.open(Place.AFTER)
        opened.average([rows(), rows(size=4)])
        opened.close()
        (record,) = world.peers.rounds
        assert record.kind == kind
        assert record.collectives == 2
        assert record.bytes_per_node == dict.fromkeys(range(3), expected)

    def test_of_a_gathering(self) -> None:
        world = World()
        opened = world.peers.open(Place.BEFORE)
        opened.gather([rows(), torch.zeros(3, 4, dtype=torch.int16)])
        opened.close()
        (record,) = world.peers.rounds
        assert (record.kind, record.collectives) == ("gather", 1)
        assert record.bytes_per_node == dict.fromkeys(range(3), 2 * (20 + 8))

    def test_of_islands(self) -> None:
        world = World()
        opened = world.peers.open(Place.AFTER)
        opened.average_within([rows()], lambda n: [[0, 2], [1]])
        opened.close()
        (record,) = world.peers.rounds
        assert (record.kind, record.collectives) == ("islands", 1)
        assert record.bytes_per_node == {0: 20, 1: 0, 2: 20}

    def test_one_that_heals_sends_as_much_as_the_others(self) -> None:
        world = World(Joins(1, 0))
        world.peers.begin(0)
        opened = world.peers.open(Place.AFTER)
        opened.average([rows()])
        opened.close()
        assert world.peers.rounds[0].bytes_per_node == dict.fromkeys(range(3), 26)

    def test_alone_or_with_nothing_to_send_there_are_none(self) -> None:
        world = World(nodes=1)
        opened = world.peers.open(Place.AFTER)
        opened.average([rows(1)])
        opened.close()
        assert opened.average([]).wait() == []
        empty = World().peers.open(Place.AFTER)
        empty.average([torch.zeros(3, 0)])
        assert world.peers.rounds[0].bytes_per_node == {0: 0}
        assert empty._collectives == 0


def test_a_round_says_which_recipe_it_was_for() -> None:
    class Plain(Recipe):
        def contribution(self, fragment: object) -> tuple[list[Tensor], None]:
            return [torch.zeros(2, 1)], None

        def apply_locally(self, fragment: object, update: object, draft: object) -> None:
            pass

    local = StackedLocal(Tiny(), 2, Inner(), max_steps=10)
    strategy = Strategy([LocalSGDRecipe(2), Plain()])
    peers = StackedPeers(local, Membership(2), strategy)
    strategy.bind(local, peers)
    for step in range(2):
        peers.begin(step)
        strategy.step()
    seen = [(r.step, r.recipe, r.restores) for r in peers.rounds]
    assert seen == [(0, 1, False), (1, 0, True), (1, 1, False)]
