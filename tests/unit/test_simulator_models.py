"""Models as people bring them, and runs of which nothing may be lost."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.datasets import Fails
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import weight_norm

from torchft.errors import SettingsError
from torchft.experiments import Trainer
from torchft.simulator.copies import copied
from torchft.simulator.node import NodeError, TrainNode
from torchft.simulator.result import Result
from torchft.strategies import (
    DiLoCoStrategy,
    OptimSpec,
    RandomIndexSelector,
    SimpleReduceStrategy,
    SPARTAStrategy,
    Strategy,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")

STEPS = 5
X, Y = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)), torch.ones(64, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 2)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))

    def forward(self, batch: Any) -> Tensor:
        return functional.mse_loss(self.second(self.hidden(batch[0])), batch[1])


def strategy() -> Strategy:
    return DiLoCoStrategy(OptimSpec(torch.optim.AdamW, lr=1e-2), H=2)


def fit(model: Any, data: Any = (X, Y), val: Any = (X, Y), **settings: Any) -> Result:
    node_cls = settings.pop("node_cls", TrainNode)
    trainer = Trainer(model, data, val, device="cpu", node_cls=node_cls)
    return fitted(trainer, **settings)


def fitted(trainer: Trainer, **settings: Any) -> Result:
    given = {
        "strategy": strategy(),
        "num_nodes": 2,
        "max_steps": STEPS,
        "batch_size": 8,
        "val_interval": 2,
        "disable_logging": True,
        **settings,
    }
    trainer.fit(**given)
    assert trainer.result is not None and trainer.result.model is not None
    return trainer.result


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


class TestWhatAForwardPassLeaves:
    """A tensor with a graph behind it, in an attribute: torch does not copy it."""

    @pytest.mark.parametrize("where", ["attribute", "list", "dict", "hook", "buffer", "output"])
    def test_costs_no_run(self, where: str) -> None:
        class Keeps(Net):
            kept: Any = None

            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("last", torch.zeros(()))
                if where == "hook":
                    self.first.register_forward_hook(self._keep)

            def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
                self.kept = output

            def forward(self, batch: Any) -> Tensor:
                loss = super().forward(batch)
                if where == "buffer":
                    self.last = loss  # type: ignore[assignment]
                elif where != "hook":
                    holders = {"attribute": loss, "list": [loss], "dict": {"loss": (loss,)}}
                    self.kept = holders.get(where, lambda: loss)
                return loss

        kept, plain = fit(Keeps()), fit(Net())
        assert same_weights(kept.model, plain.model)  # type: ignore[arg-type]
        assert kept.validations == plain.validations

    def test_is_refused_by_name_in_a_model_that_comes_with_it(self) -> None:
        model = Net()
        model.first.scale = model.first.weight.sum()  # type: ignore[assignment]
        with pytest.raises(
            SettingsError, match=r"first\.scale is a tensor that was computed.*fact"
        ):
            fit(model)

    def test_a_lock_made_in_a_run_costs_the_mean_nothing(self) -> None:
        class Locks(Net):
            lock: Any = None

            def forward(self, batch: Any) -> Tensor:
                self.lock = self.lock or threading.Lock()
                return super().forward(batch)

        with pytest.warns(UserWarning, match="Locks cannot be copied.*made anew"):
            locked = fit(Locks())
        assert same_weights(locked.model, fit(Net()).model)  # type: ignore[arg-type]


class TestARunThatBreaksOff:
    def test_keeps_what_it_got(self) -> None:
        class Breaks(TrainNode):
            def loss(self, batch: Any) -> Tensor:
                self.calls = getattr(self, "calls", 0) + 1
                if self.calls > 3 and self.model.training:
                    raise KeyError("image")
                return super().loss(batch)

        trainer = Trainer(Net(), (X, Y), device="cpu", node_cls=Breaks)
        with pytest.raises(KeyError) as found:
            fitted(trainer)
        assert found.value.__notes__ == ["(node 0, step 4)"]
        result = trainer.result
        assert result is not None and result.model is None
        assert len(result.history) == 3 and len(result.rounds) == 1
        assert result.alive == [0, 1] and not same_weights(result.models[0], Net())

    def test_after_its_last_step_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchft.simulator import loop

        def fails(*of: Any) -> None:
            raise ValueError("no mean")

        monkeypatch.setattr(loop, "mean_model", fails)
        trainer = Trainer(Net(), (X, Y), device="cpu")
        with pytest.raises(ValueError, match="no mean"):
            fitted(trainer)
        assert trainer.result is not None and len(trainer.result.history) == STEPS


class TestFactories:
    """What cannot be copied is made anew for each node."""

    def test_a_computed_tensor(self) -> None:
        class Scaled(Net):
            def __init__(self) -> None:
                super().__init__()
                self.logit = nn.Parameter(torch.zeros(()))
                self.scale = torch.sigmoid(self.logit)

            def forward(self, batch: Any) -> Tensor:
                self.scale = torch.sigmoid(self.logit)
                return super().forward(batch) * self.scale

        result = fit(Scaled)
        weights = {float(model.logit) for model in result.models}
        assert 0.0 not in weights

    def test_a_lock(self) -> None:
        class Locked(Net):
            def __init__(self) -> None:
                super().__init__()
                self.lock = threading.Lock()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            locked = fit(Locked)
        assert same_weights(locked.model, fit(Net()).model)  # type: ignore[arg-type]

    @pytest.mark.parametrize("given", ["module", "factory"])
    def test_old_weight_norm(self, given: str) -> None:
        def normed() -> nn.Module:
            model = Net()
            weight_norm(model.first)
            return model

        result = fit(normed if given == "factory" else normed())
        assert "first.weight_g" in dict(result.models[0].named_parameters())
        moved = result.models[0].first.weight_v, normed().first.weight_v  # type: ignore[union-attr]
        assert not torch.equal(*moved)  # type: ignore[arg-type]
        assert torch.equal(result.models[0].first.weight_v, copied(result.models[0]).first.weight_v)

    def test_old_weight_norm_trains_as_in_plain_torch(self) -> None:
        def normed() -> nn.Module:
            model = Net()
            weight_norm(model.first)
            return model

        sgd = SimpleReduceStrategy(OptimSpec(torch.optim.AdamW, lr=1e-2))
        result = fit(normed, num_nodes=1, shuffle=False, val=None, strategy=sgd)
        plain = normed()
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, fused=True)
        for step in range(STEPS):
            optimizer.zero_grad()
            plain((X[step * 8 : step * 8 + 8], Y[:8])).backward()
            optimizer.step()
        for by_hand, simulated in zip(
            plain.parameters(), result.models[0].parameters(), strict=True
        ):
            torch.testing.assert_close(by_hand, simulated)


class TestTeachers:
    """Frozen parameters that the model itself updates."""

    class MeanTeacher(Net):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.first).requires_grad_(False)

        def forward(self, batch: Any) -> Tensor:
            for mine, theirs in zip(
                self.teacher.parameters(), self.first.parameters(), strict=True
            ):
                mine.data.lerp_(theirs.data, 0.5)
            towards = self.teacher(batch[0]).detach()
            return super().forward(batch) + functional.mse_loss(self.first(batch[0]), towards)

    def test_follow_their_own_student(self) -> None:
        among = fit(
            self.MeanTeacher(), num_nodes=3, strategy=DiLoCoStrategy("adamw", H=99), val=None
        )
        teachers = [model.teacher.weight for model in among.models]  # type: ignore[union-attr]
        assert not torch.equal(*teachers[:2])  # type: ignore[arg-type]
        for model in among.models:
            student, teacher = model.first.weight, model.teacher.weight  # type: ignore[union-attr]
            assert (student - teacher).abs().max() < 0.01  # type: ignore[operator]


class TestWhatIsTrained:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda m: m.second.requires_grad_(False), "parameter second.weight was frozen"),
            (lambda m: m.base.requires_grad_(True), "parameter base was unfrozen"),
            (lambda m: setattr(m, "second", nn.Linear(3, 2)), "parameter second.weight was replac"),
            (lambda m: setattr(m, "third", nn.Linear(3, 2)), "parameter third.weight was added"),
            (lambda m: delattr(m, "spare"), "parameter spare was removed"),
            (
                lambda m: setattr(m.first.bias, "data", torch.ones(3)),
                "parameter first.bias was giv",
            ),
        ],
    )
    def test_changed_in_a_run_is_an_error_that_names_it(
        self, change: Callable[[Any], Any], said: str
    ) -> None:
        class Changes(Net):
            def __init__(self) -> None:
                super().__init__()
                self.base = nn.Parameter(torch.ones(2), requires_grad=False)
                self.spare = nn.Parameter(torch.ones(2))
                self.calls = 0

            def forward(self, batch: Any) -> Tensor:
                self.calls += self.training
                if self.calls == 3:
                    change(self)
                return super().forward(batch) + self.base.sum()

        with pytest.raises(SettingsError, match=f"{said}.* in step 3 of node 0"):
            fit(Changes())

    def test_modules_without_parameters_may_come_and_go(self) -> None:
        class Adds(Net):
            def forward(self, batch: Any) -> Tensor:
                self.add_module("cache", nn.Identity())
                return super().forward(batch)

        assert same_weights(fit(Adds()).model, fit(Net()).model)  # type: ignore[arg-type]

    def test_what_is_frozen_within_a_step_alone_is_no_change(self) -> None:
        class Alternates(Net):
            def forward(self, batch: Any) -> Tensor:
                self.second.requires_grad_(False)
                loss = super().forward(batch)
                self.second.requires_grad_(True)
                return loss

        moved = fit(Alternates(), strategy=SimpleReduceStrategy(OptimSpec(torch.optim.SGD, lr=0.1)))
        assert torch.equal(moved.model.second.weight, Net().second.weight)  # type: ignore[union-attr]


class TestClassesWhereInstancesBelong:
    def test_a_class_without_parameters_is_named(self) -> None:
        with pytest.raises(SettingsError, match=r"the class Sequential.*give an instance"):
            fit(nn.Sequential)

    def test_a_class_that_wants_arguments_is_named(self) -> None:
        with pytest.raises(SettingsError, match=r"Linear.*is called without arguments"):
            fit(nn.Linear)

    def test_a_factory_that_makes_a_class(self) -> None:
        with pytest.raises(SettingsError, match=r"factory made the class Net: give an instance"):
            fit(lambda: Net)

    def test_a_strategy(self) -> None:
        with pytest.raises(SettingsError, match=r"strategy is the class DiLoCoStrategy: .*\(…\)"):
            fit(Net(), strategy=DiLoCoStrategy)

    def test_a_selector(self) -> None:
        with pytest.raises(SettingsError, match=r"selector is the class RandomIndexSelector: give"):
            SPARTAStrategy(index_selector=RandomIndexSelector)  # type: ignore[arg-type]

    def test_a_node_where_a_class_belongs(self) -> None:
        node = TrainNode(Net(), node=0, device=torch.device("cpu"))
        with pytest.raises(SettingsError, match="node_cls is a TrainNode, and must be the class"):
            fit(Net(), node_cls=node)

    def test_a_class_of_our_own_is_a_factory(self) -> None:
        assert same_weights(fit(Net).model, fit(Net()).model)  # type: ignore[arg-type]


class TestDataThatFail:
    def test_say_at_which_node_and_step(self) -> None:
        with pytest.raises(
            NodeError, match=r"batch of node 1 in step 1: KeyError: .*image"
        ) as found:
            fit(Net(), Fails(X[0], Y[0]), shuffle=False, minibatch_size=8)
        assert isinstance(found.value.__cause__, KeyError)

    def test_say_so_when_it_is_the_collating(self) -> None:
        ragged = [(torch.ones(4 + (at == 20)), torch.ones(2)) for at in range(64)]
        with pytest.raises(
            NodeError, match="batch of node 0 in step 2: RuntimeError: stack expects"
        ):
            fit(Net(), ragged, shuffle=False, minibatch_size=8)

    def test_an_empty_share_says_whose_it_is(self) -> None:
        def shares(rank: int, num_nodes: int, train: bool) -> Any:
            return (X[: 0 if rank == 2 else 32], Y[: 0 if rank == 2 else 32])

        with pytest.raises(SettingsError, match=r"gives node 2 \(rank 2 of 3\): 0 samples"):
            fit(Net(), shares, val=None, num_nodes=3)

    def test_a_tuple_of_arrays_is_called_that(self) -> None:
        with pytest.raises(SettingsError, match=r"tuple of 2 columns, and numpy arrays.*as_tensor"):
            fit(Net(), (X.numpy(), Y.numpy()))
        with pytest.raises(SettingsError, match=r"dict of .*numpy.*from_numpy"):
            fit(Net(), {"x": X.numpy(), "y": Y.numpy()})
