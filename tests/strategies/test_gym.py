"""The names of EXO Gym's scripts, and that every argument means what it says."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from helpers.peers import Node, Script, World
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.testing import assert_close

import torchft.strategies
from torchft.errors import SettingsError
from torchft.peers import Place
from torchft.quantization import Int8, codec_of
from torchft.strategies import (
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    Inner,
    LocalSGDStrategy,
    ModelLocal,
    OptimSpec,
    ShuffledSequentialIndexSelector,
    SimpleReduceStrategy,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    Strategy,
    StreamingDiLoCoStrategy,
    TopKStrategy,
)
from torchft.strategies.recipe import By

EVERY = [
    DeMoStrategy,
    DiLoCoStrategy,
    FedAvgStrategy,
    LocalSGDStrategy,
    SPARTADiLoCoStrategy,
    SPARTAStrategy,
    SimpleReduceStrategy,
    StreamingDiLoCoStrategy,
    TopKStrategy,
]

AVERAGED = [cls for cls in EVERY if cls not in (DeMoStrategy, TopKStrategy)]

every_name = pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
with_rounds = pytest.mark.parametrize(
    "cls",
    [
        DiLoCoStrategy,
        FedAvgStrategy,
        LocalSGDStrategy,
        SPARTADiLoCoStrategy,
        StreamingDiLoCoStrategy,
        TopKStrategy,
    ],
    ids=lambda cls: cls.__name__,
)


def test_all_names_are_exported() -> None:
    names = {name for name in torchft.strategies.__all__ if name.endswith("Strategy")}
    assert names - {"Strategy"} == {cls.__name__ for cls in EVERY}


def inner_of(strategy: Strategy) -> Inner:
    assert strategy.inner is not None
    return strategy.inner


@every_name
class TestEveryName:
    """What all of them take alike."""

    @pytest.mark.parametrize("name", ["optim_spec", "inner_optim", "inner_optim_spec"])
    @pytest.mark.parametrize("given", [OptimSpec(SGD, lr=0.123), SGD, "sgd"], ids=repr)
    def test_the_inner_optimizer_by_any_of_its_names(self, cls: Any, name: str, given: Any) -> None:
        optim = inner_of(cls(**{name: given})).optim
        assert optim.cls is SGD
        assert optim.build(nn.Linear(1, 1)).param_groups[0]["lr"] == (
            0.123 if isinstance(given, OptimSpec) else 1e-3
        )

    @pytest.mark.parametrize(
        "two", [("optim_spec", "inner_optim"), ("inner_optim", "inner_optim_spec")]
    )
    def test_two_names_of_one_thing_are_refused(self, cls: Any, two: tuple[str, str]) -> None:
        with pytest.raises(SettingsError, match=f"{two[0]} and {two[1]}"):
            cls(**dict.fromkeys(two, "sgd"))

    @pytest.mark.parametrize(
        "unknown", ["bananas", "p", "lr", "async_sparta_delay", "interval", "device"]
    )
    def test_an_unknown_argument_is_refused(self, cls: Any, unknown: str) -> None:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{unknown}'"):
            cls(**{unknown: 3})

    def test_the_schedule(self, cls: Any) -> None:
        cosine = {"warmup_steps": 4, "cosine_anneal": True}
        named = inner_of(cls(lr_scheduler="lambda_cosine", lr_scheduler_kwargs=cosine))
        assert named.schedule is not None
        optimizer = SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        named.schedule.build(optimizer, 100)
        assert optimizer.param_groups[0]["lr"] == 0.25
        of_torch = inner_of(cls(lr_scheduler=StepLR, lr_scheduler_kwargs={"step_size": 3}))
        assert of_torch.schedule is not None
        assert of_torch.schedule.cls is StepLR
        assert inner_of(cls(lr_scheduler="lambda_cosine")).schedule is not None
        assert inner_of(cls()).schedule is None

    def test_arguments_of_no_schedule_are_refused(self, cls: Any) -> None:
        with pytest.raises(SettingsError, match="lr_scheduler"):
            cls(lr_scheduler_kwargs={"warmup_steps": 3})
        with pytest.raises(SettingsError, match="warmup"):
            cls(lr_scheduler="lambda_cosine", lr_scheduler_kwargs={"warmup": 3})

    def test_it_pickles_before_it_is_bound(self, cls: Any) -> None:
        strategy = cls(inner_optim=OptimSpec(SGD, lr=0.2), lr_scheduler="lambda_cosine")
        assert pickle.loads(pickle.dumps(strategy)).config() == strategy.config()

    def test_its_settings_are_plain_data(self, cls: Any) -> None:
        config = cls(optim_spec=OptimSpec(SGD, lr=0.2), max_norm=0.7).config()
        assert json.loads(json.dumps(config)) == config
        assert config["strategy"] == cls.__name__
        assert config["optim"] == {"name": "SGD", "lr": 0.2}
        assert config["max_norm"] == 0.7
        assert repr(cls(max_norm=0.7)).startswith(f"{cls.__name__}(recipes=[")
        assert "max_norm=0.7" in repr(cls(max_norm=0.7))

    def test_it_runs_once(self, cls: Any) -> None:
        strategy, node = cls(), Node(World(Script(1)), 0, 1)
        strategy.bind(ModelLocal([two_layers()]), node)
        with pytest.raises(SettingsError, match="in use"):
            strategy.bind(ModelLocal([two_layers()]), node)


@pytest.mark.parametrize("cls", AVERAGED, ids=lambda cls: cls.__name__)
class TestCodec:
    """How small what they average travels."""

    @pytest.mark.parametrize("codec", ["bf16", "fp8", "int8", "int4", Int8(64)], ids=str)
    def test_every_recipe_has_it_and_the_settings_show_it(self, cls: Any, codec: Any) -> None:
        strategy = pickle.loads(pickle.dumps(cls(codec=codec)))
        name = codec_of(codec).name
        assert {r.codec.name for r in strategy.recipes} == {name}
        assert strategy.config()["codec"] == name
        assert f"codec={name!r}" in repr(strategy)

    def test_without_one_every_bit_travels(self, cls: Any) -> None:
        strategy = cls()
        assert [recipe.codec for recipe in strategy.recipes] == [None] * len(strategy.recipes)
        assert strategy.config()["codec"] is None

    def test_groups_compare_its_name(self, cls: Any) -> None:
        strategy, plain = cls(codec="int4"), cls()
        node, other = (Node(World(Script(1)), 0, 1) for _ in range(2))
        strategy.bind(ModelLocal([two_layers()]), node)
        plain.bind(ModelLocal([two_layers()]), other)
        assert node.compared.pop("codec") == ", ".join(["int4"] * len(strategy.recipes))
        assert "codec" not in other.compared and node.compared == other.compared

    @pytest.mark.parametrize("unknown", ["int5", "", True, 8])
    def test_one_that_does_not_exist_is_refused(self, cls: Any, unknown: Any) -> None:
        with pytest.raises(SettingsError, match=r"it must be one of fp32, bf16, fp8, int8, int4"):
            cls(codec=unknown)


def test_a_codec_that_has_nothing_to_encode_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"FedAvgRecipe does not average among all.* int8"):
        FedAvgStrategy(island_size=2, codec="int8")
    strategy = DeMoStrategy()
    strategy.recipes[0].codec = Int8()
    with pytest.raises(SettingsError, match="DeMoRecipe does not average"):
        strategy.bind(ModelLocal([two_layers()]), Node(World(Script(1)), 0, 1))
    with pytest.raises(TypeError, match="unexpected keyword argument 'codec'"):
        TopKStrategy(codec="int8")  # type: ignore[call-arg]


class TestErrorFeedback:
    """What a codec loses of gradients and deltas is sent later."""

    @pytest.mark.parametrize(
        "cls",
        [DiLoCoStrategy, SPARTADiLoCoStrategy, SimpleReduceStrategy, StreamingDiLoCoStrategy],
    )
    def test_what_sends_gradients_or_deltas_has_it(self, cls: Any) -> None:
        strategy = pickle.loads(pickle.dumps(cls(codec="int4", error_feedback=True)))
        assert strategy.recipes[-1].error_feedback
        assert strategy.config()["error_feedback"] is True
        assert not any(recipe.error_feedback for recipe in cls(codec="int4").recipes)
        with pytest.raises(SettingsError, match="has no codec, so nothing is lost"):
            cls(error_feedback=True)

    @pytest.mark.parametrize("cls", [LocalSGDStrategy, FedAvgStrategy, SPARTAStrategy])
    def test_what_sends_weights_has_not(self, cls: Any) -> None:
        with pytest.raises(TypeError, match="error_feedback"):
            cls(codec="int4", error_feedback=True)

    def test_a_recipe_that_does_not_feed_back_is_told_so(self) -> None:
        """An old failing that must not come back: an option that is taken and does nothing."""

        def story(node: Node) -> None:
            strategy = LocalSGDStrategy(SGD, H=1, codec="int4")
            strategy.recipes[0].error_feedback = True
            model = two_layers()
            strategy.bind(ModelLocal([model], SGD(model.parameters(), lr=0.1)), node)
            with pytest.raises(
                SettingsError, match="LocalSGDRecipe has error_feedback=True, so the "
            ):
                strategy.step()

        World(Script(1)).run(story)

    @pytest.mark.parametrize("shared", [None, torch.float32])
    def test_in_buckets_each_number_still_gets_its_own_back(
        self, shared: torch.dtype | None
    ) -> None:
        def story(node: Node) -> tuple[Tensor, Tensor]:
            options: dict[str, Any] = {"codec": "int8", "error_feedback": True}
            strategy = DiLoCoStrategy(SGD, H=1, shared_dtype=shared, **options)
            strategy._bucket_bytes = 28
            model = two_layers().bfloat16()
            strategy.bind(ModelLocal([model], SGD(model.parameters(), lr=0.1)), node)
            start = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
            for p in model.parameters():
                p.grad = torch.ones_like(p) + torch.arange(p.numel()).view(p.shape) % 7
            strategy.before()
            strategy.local.inner_step()
            local = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
            seen: list[Tensor] = []
            recipe: Any = strategy.recipes[0]
            apply = recipe.apply
            recipe.apply = lambda f, received: seen.extend(received) or apply(f, received)
            strategy.after()
            assert seen[0].dtype == (shared or torch.bfloat16)
            moved = (start.to(seen[0].dtype) - local.to(seen[0].dtype)).float()
            return seen[0][0].float() + recipe.own["residual_0"][0][0], moved

        said, moved = World(Script(1)).run(story)[0]
        # In bf16, what arrived was rounded once more, at the one member that there is.
        assert_close(said, moved, rtol=1e-6 if shared else 2**-8, atol=0)


@with_rounds
@pytest.mark.parametrize("H", [0, -1, 1.5, "5"])
def test_rounds_that_never_come_are_refused(cls: Any, H: Any) -> None:
    with pytest.raises(SettingsError, match=f"H={H!r}"):
        cls(H=H)


def two_layers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


class TestRounds:
    """When they come, step by step on one node."""

    def rounds(self, strategy: Strategy, steps: int) -> list[int]:
        """The steps (from 1) in which a round was opened, with repeats."""
        model = two_layers()
        node = Node(World(Script(1)), 0, 1)
        opened: list[int] = []
        original = node.open

        def counting(place: Place) -> Any:
            opened.append(strategy.clock.steps + (place is Place.BEFORE))
            return original(place)

        node.open = counting  # type: ignore[method-assign]
        parameters = [p for p in model.parameters() if p.requires_grad]
        local = ModelLocal([model], inner_of(strategy).build([parameters], steps))
        strategy.bind(local, node)
        for _ in range(steps):
            strategy.begin()
            local.zero_grads()
            model(torch.ones(2, 3)).sum().backward()
            strategy.step()
        return opened

    @pytest.mark.parametrize(
        "cls", [DiLoCoStrategy, FedAvgStrategy, LocalSGDStrategy, TopKStrategy]
    )
    def test_every_round_is_exactly_h_long_the_first_too(self, cls: Any) -> None:
        assert self.rounds(cls(H=4), 13) == [4, 8, 12]

    def test_streaming_takes_turns(self) -> None:
        assert self.rounds(StreamingDiLoCoStrategy(H=6, fragments=2), 13) == [3, 6, 9, 12]

    def test_a_delayed_fragment_opens_so_many_steps_earlier(self) -> None:
        strategy = StreamingDiLoCoStrategy(H=6, fragments=2, delay=2, mix=0.5)
        assert self.rounds(strategy, 13) == [1, 4, 7, 10, 13]

    def test_sparta_keeps_its_interval(self) -> None:
        assert self.rounds(SPARTAStrategy(p_sparta=0.5, sparta_interval=3), 10) == [3, 6, 9]

    def test_both_of_sparta_diloco(self) -> None:
        strategy = SPARTADiLoCoStrategy(p_sparta=0.5, sparta_interval=2, H=5)
        assert self.rounds(strategy, 10) == [2, 4, 5, 6, 8, 10, 10]

    @pytest.mark.parametrize("cls", [SimpleReduceStrategy, DeMoStrategy])
    def test_gradients_go_every_step(self, cls: Any) -> None:
        assert self.rounds(cls(), 3) == [1, 2, 3]


class TestWhatArgumentsMean:
    """One by one."""

    def test_fedavg_on_islands_is_another_collective(self) -> None:
        assert FedAvgStrategy(H=2).recipes[0].by is By.AVERAGE
        assert FedAvgStrategy(H=2, island_size=2).recipes[0].by is By.ISLANDS

    def test_dilocos_outer_optimizer(self) -> None:
        assert DiLoCoStrategy().config()["outer_optimizer"] == {
            "name": "SGD",
            "lr": 0.7,
            "momentum": 0.9,
            "nesterov": True,
        }
        given = DiLoCoStrategy(outer_optim_spec=OptimSpec(AdamW, lr=0.3)).config()[
            "outer_optimizer"
        ]
        assert given == {"name": "AdamW", "lr": 0.3}

    def test_the_outer_optimizer_steps_in_every_round(self) -> None:
        """The first round and the second move the weights by what SGD with momentum says."""

        def story(node: Node) -> list[Tensor]:
            model = nn.Linear(1, 1, bias=False)
            with torch.no_grad():
                model.weight.fill_(1.0)
            strategy = DiLoCoStrategy(OptimSpec(SGD, lr=0.1), H=1)
            inner = inner_of(strategy).build([list(model.parameters())], 2)
            strategy.bind(ModelLocal([model], inner), node)
            seen = []
            for _ in range(2):
                strategy.begin()
                model.weight.grad = torch.ones(1, 1)
                strategy.step()
                seen.append(model.weight.detach().clone())
            return seen

        # delta .1: velocity .1, step .7 (.1 + .9 * .1); then velocity .19, step .7 (.1 + .9 * .19)
        first, second = World(Script(2)).run(story)[0]
        assert_close(first.item(), 1 - 0.7 * 0.19)
        assert_close(second.item(), 1 - 0.7 * 0.19 - 0.7 * 0.271)

    def test_how_long_a_fragment_travels_and_what_of_training_stays(self) -> None:
        given = {"delay": 2, "mix": 0.25}
        strategy = StreamingDiLoCoStrategy(H=8, **given)  # type: ignore[arg-type]
        assert {name: strategy.config()[name] for name in given} == given
        (recipe,) = strategy.recipes
        assert (recipe.delay, recipe.mix) == (2, 0.25)  # type: ignore[attr-defined]
        with pytest.raises(SettingsError, match=r"delay=9 does not fit.* 0 to 8"):
            StreamingDiLoCoStrategy(H=8, delay=9)
        with pytest.raises(SettingsError, match=r"mix=1.5: .* at most 1"):
            StreamingDiLoCoStrategy(H=8, mix=1.5)

    def test_which_weights_sparta_averages(self) -> None:
        assert SPARTAStrategy().config()["index_selector"] == "RandomIndexSelector(p=0.005)"
        assert SPARTAStrategy(p_sparta=0.1).config()["index_selector"].endswith("(p=0.1)")
        own = ShuffledSequentialIndexSelector(0.2)
        assert SPARTAStrategy(index_selector=own).recipes[0].selector is own  # type: ignore[attr-defined]
        with pytest.raises(SettingsError, match="p_sparta"):
            SPARTADiLoCoStrategy(index_selector=own, p_sparta=0.2)
        with pytest.raises(SettingsError, match="sparta_interval=0"):
            SPARTAStrategy(sparta_interval=0)

    def test_demo_steps_by_the_sign_at_a_rate_of_its_own(self) -> None:
        assert self.demo_step(DeMoStrategy()) == pytest.approx([1 - 1e-3, 1 + 1e-3], abs=1e-7)
        given = DeMoStrategy(optim_spec=OptimSpec(SGD, lr=0.123))
        assert self.demo_step(given) == pytest.approx([0.877, 1.123], abs=1e-6)

    @pytest.mark.parametrize("optim", [None, OptimSpec(SGD, lr=0.5)])
    def test_its_weight_decay_is_decoupled(self, optim: OptimSpec | None) -> None:
        lr = 0.5 if optim else 1e-3
        with_decay = self.demo_step(DeMoStrategy(weight_decay=0.2, optim_spec=optim))
        without = self.demo_step(DeMoStrategy(optim_spec=optim))
        assert with_decay == pytest.approx([w - lr * 0.2 for w in without], abs=1e-6)

    def test_two_decays_are_refused(self) -> None:
        with pytest.raises(SettingsError, match="has a weight_decay"):
            DeMoStrategy(weight_decay=0.1, optim_spec=OptimSpec(SGD, weight_decay=0.2))

    def demo_step(self, strategy: Strategy) -> list[float]:
        """One step of weights (1, 1) with the gradient (3, -1)."""
        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        inner = inner_of(strategy).build([list(model.parameters())], 1)
        strategy.bind(ModelLocal([model], inner), Node(World(Script(1)), 0, 1))
        strategy.begin()
        model.weight.grad = torch.tensor([[3.0, -1.0]])
        strategy.step()
        return model.weight.detach()[0].tolist()

    def test_demo_clips_what_its_momentum_takes_up_and_not_the_sign(self) -> None:
        strategy = DeMoStrategy(max_norm=0.1, compression_topk=1)
        assert self.demo_step(strategy) == pytest.approx([1 - 1e-3, 1 + 1e-3], abs=1e-7)
        (momentum,) = strategy.recipes[0].own["momentum"]
        # Coefficients of (3, -1) / 10: (1.41, 2.83) / 31.6; the second was sent.
        assert momentum.flatten().tolist() == pytest.approx([0.0447, 0.0], abs=1e-4)

    @pytest.mark.parametrize(
        ("bad", "says"),
        [
            ({"compression_decay": 1.0}, "compression_decay=1.0"),
            ({"compression_topk": 0}, "compression_topk=0"),
            ({"compression_chunk": 0}, "compression_chunk=0"),
            ({"max_norm": 0.0}, "max_norm"),
        ],
    )
    def test_demo_refuses(self, bad: dict[str, Any], says: str) -> None:
        with pytest.raises(SettingsError, match=says):
            DeMoStrategy(**bad)

    @pytest.mark.parametrize("bad", [{"topk": 0}, {"chunk": 0}, {"decay": 1.5}])
    def test_top_k_refuses(self, bad: dict[str, Any]) -> None:
        with pytest.raises(SettingsError, match=next(iter(bad))):
            TopKStrategy(**bad)
