"""One node's forward and backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from torchft.errors import SettingsError
from torchft.simulator.node import NodeError, TrainNode, finite_losses, micro_batches

CPU = torch.device("cpu")


class Fit(nn.Module):
    """Reads x and y out of any kind of batch."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, batch: Any) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        return ((self.line(x) - y) ** 2).mean()


class Returns(nn.Module):
    """Returns what it was given."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, batch: Any) -> Any:
        return self.what


def node_of(model: nn.Module, **settings: Any) -> TrainNode:
    return TrainNode(model, node=3, device=CPU, **settings)


def data(samples: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, 3, generator=generator), torch.randn(
        samples, 1, generator=generator
    )


@pytest.mark.parametrize("kind", [tuple, list, lambda b: {"x": b[0], "y": b[1]}])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
def test_micro_batches_have_the_gradient_of_the_whole(kind: Any, size: int) -> None:
    model = Fit()
    whole = node_of(model).backward(kind(data()))
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pieces = node_of(model).backward(kind(data()), size)
    assert_close(pieces, whole)
    assert_close([p.grad for p in model.parameters()], expected)
    assert not pieces.requires_grad


def test_every_sample_is_in_one_micro_batch() -> None:
    pieces = list(micro_batches({"a": torch.arange(7), "b": [torch.arange(7)]}, 3))
    assert [piece["a"].tolist() for piece, _ in pieces] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [share for _, share in pieces] == [3 / 7, 2 / 7, 2 / 7]
    assert all(torch.equal(piece["a"], piece["b"][0]) for piece, _ in pieces)


def test_a_batch_without_a_common_length_is_not_cut() -> None:
    with pytest.raises(SettingsError, match="cannot be cut into micro-batches"):
        node_of(Fit()).backward((torch.zeros(4, 3), torch.zeros(3, 1)), 2)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (torch.zeros(3), r"a tensor of shape \(3,\)"),
        (torch.tensor(1), r"a tensor of shape \(\) and type torch\.int64"),
        (1.5, "a float"),
        ((torch.zeros(()), torch.zeros(())), "a tuple"),
    ],
)
def test_a_model_that_returns_no_loss_is_named(what: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=rf"node 3's model returned {message}"):
        node_of(Returns(what)).backward(data())


def test_a_user_says_what_the_loss_is() -> None:
    class Double(TrainNode):
        def loss(self, batch: Any) -> Tensor:
            return 2 * self.model(batch)

    model = Fit()
    plain = node_of(model).backward(data())
    double = Double(model, node=0, device=CPU).backward(data())
    assert_close(double, 2 * plain)


def test_autocast_reaches_the_model() -> None:
    class Seen(TrainNode):
        def loss(self, batch: Any) -> Tensor:
            self.dtype = self.model.line(batch[0]).dtype
            return self.model(batch)

    node = Seen(Fit(), node=0, device=CPU, autocast=torch.bfloat16)
    node.backward(data())
    assert node.dtype is torch.bfloat16
    assert node.model.line.weight.grad.dtype is torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_names_node_and_step(value: float) -> None:
    losses = {0: torch.tensor(1.0), 2: torch.tensor([value])}
    with pytest.raises(NodeError, match=f"node 2 in step 18 is {value}"):
        finite_losses(losses, 17)
    assert finite_losses({0: torch.tensor(1.5)}, 0) == {0: 1.5}


def test_a_forward_that_takes_x_and_y_is_told_of_the_batch() -> None:
    class Two(Fit):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return ((self.line(x) - y) ** 2).mean()

    with pytest.raises(SettingsError, match=r"Two\.forward must take the batch alone") as found:
        node_of(Two()).backward(data())
    assert isinstance(found.value.__cause__, TypeError)


def test_a_type_error_of_the_models_own_is_left_alone() -> None:
    class Breaks(Fit):
        def forward(self, batch: Any) -> Tensor:
            raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        node_of(Breaks()).backward(data())


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_a_loss_without_a_gradient_is_refused(micro_batch_size: int | None) -> None:
    class Cut(Fit):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch).detach()

    with pytest.raises(SettingsError, match="the loss of node 3 has no gradient: it depends on no"):
        node_of(Cut()).backward(data(), micro_batch_size)
