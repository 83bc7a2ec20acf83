"""`Local` over all nodes of a simulation: one matrix of weights with a row per node.

Every node's model is a copy whose parameters, and their gradients, are views into its row:

    W [nodes, elements]     row 0 │ a of node 0 │ b of node 0 │ …
                            row 1 │ a of node 1 │ b of node 1 │ …

so a strategy's arithmetic runs once over all rows, and nothing is copied in or out, unless it is
about a fragment in a strided pattern (`columns.py`).

Frozen parameters are each node's own as long as that costs no more memory than what is trained: a
teacher is as large as its student, and may be updated in the forward pass. Where they are larger,
as under an adapter, all nodes share them, and whoever writes into them ends the run. Buffers are
each node's own.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import SettingsError
from torchft.simulator.columns import columns_of, joined, matrix, places_of, write
from torchft.simulator.copies import Remake, copied, made_alike
from torchft.simulator.frozen import SharedFrozen, own_frozen
from torchft.simulator.seeds import Generators
from torchft.simulator.trained import Trained
from torchft.strategies.buffers import buffers_of
from torchft.strategies.checks import check_values
from torchft.strategies.fragments import SEQUENTIAL, cut
from torchft.strategies.inner import Inner
from torchft.strategies.local import Fragment, Layout
from torchft.strategies.parts.deltas import delta_into

__all__ = ["StackedLocal"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class StackedLocal:
    """`rows` copies of `model`, stacked. All nodes are alive at first.

    Args:
        remake: makes the model anew, for a node whose copy cannot be had.

    Raises:
        SettingsError: nothing to train, or a parameter that cannot be averaged.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: int,
        inner: Inner,
        max_steps: int,
        *,
        remake: Remake | None = None,
    ) -> None:
        self.rows = rows
        self.samples: Sequence[int] | None = None
        self.own_data = False
        self.names, trained = _trained(model)
        self.whole = Fragment(0, tuple(range(len(trained))))
        self._whole_layout = Layout(trained)
        self._nbytes = [p.nbytes for p in trained]
        self._places = places_of(trained)
        self._weights = [matrix(rows, *of) for of in self._kinds()]
        self._grads = [matrix(rows, *of) for of in self._kinds()]
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._seen: dict[tuple[int, tuple[int, ...]], list[list[Tensor]]] = {}
        self._row_grads = [self._row(self._grads, row) for row in range(rows)]
        self.grads_at_home = False
        """Backward passes add to the matrix, for a strategy that reads gradients in every step.
        Otherwise they stay where autograd left them, which costs no copy, until one asks."""
        self._writes: list[int] | None = None
        """The only rows that are written; None: all."""
        self.alive = list(range(rows))
        """The nodes that train, in order. `die` and `heal` change it."""
        self.frozen = SharedFrozen(model)
        self.models: list[nn.Module] = []
        self.parameters: list[list[nn.Parameter]] = []
        for row in range(rows):
            self._move_in(row, self._one_of(model, remake))
        self._trained = [Trained(*of) for of in zip(self.models, self.parameters, strict=True)]
        self.inner = inner.build(self.parameters, max_steps)
        self._generators: dict[int, Generators] = {}

    def _kinds(self) -> Iterator[tuple[int, torch.dtype, torch.device]]:
        layout = self._whole_layout
        for size, (dtype, device) in zip(layout.sizes, layout.kinds, strict=True):
            yield size, dtype, device

    def _one_of(self, model: nn.Module, remake: Remake | None) -> nn.Module:
        """A node's own copy of `model`."""
        try:
            return copied(model, self.frozen.memo())
        except SettingsError:
            if remake is None:
                raise
            made = made_alike(model, remake)
            self.frozen.share(made)
            return made

    @torch.no_grad()
    def _move_in(self, row: int, model: nn.Module) -> None:
        """Give the parameters of `model` their storage in `row`."""
        _, parameters = _trained(model)
        for p, weights in zip(parameters, self._row(self._weights, row), strict=True):
            weights.copy_(p)
            p.data = weights
        self.models.append(model)
        self.parameters.append(parameters)

    def _row(self, flats: Sequence[Tensor], row: int) -> list[Tensor]:
        return self._whole_layout.views([flat[row : row + 1] for flat in flats])

    def row_views(self, row: int) -> dict[str, Tensor]:
        """Parameter name → its weights at one node, sharing storage."""
        return dict(zip(self.names, self._row(self._weights, row), strict=True))

    def zero_row(self, row: int) -> None:
        """No gradient of this node is left: best said just before its backward pass."""
        if self.grads_at_home:
            for grads in self._grads:
                grads[row].zero_()
        homes = self._row_grads[row]
        for p, home in zip(self.parameters[row], homes, strict=True):
            p.grad = home if self.grads_at_home else None

    @torch.no_grad()
    def _bring_home(self) -> None:
        for row in self.alive:
            for p, home in zip(self.parameters[row], self._row_grads[row], strict=True):
                if p.grad is None:
                    home.zero_()
                elif p.grad is not home:
                    torch.add(p.grad.to_dense(), 0.0, out=home)  # as if added to zeros
                p.grad = home

    def _complete_grads(self) -> None:
        """For the optimizer: a parameter that nobody used has a zero gradient, none is sparse."""
        for row in self.alive:
            for p, home in zip(self.parameters[row], self._row_grads[row], strict=True):
                if p.grad is None:
                    p.grad = home.zero_()
                elif p.grad.layout is not torch.strided:
                    p.grad = home.copy_(p.grad.to_dense())

    def check_trained(self, row: int, step: int) -> None:
        """After the backward pass of `row` in `step`: it trains what it trained at the start.

        Raises:
            SettingsError: a parameter was thawed, frozen, replaced or moved.
        """
        self._trained[row].check(row, step)

    def move_out(self) -> None:
        """The end: every model gets storage of its own, and this is of no use any more."""
        for parameters in self.parameters:
            for p in parameters:
                p.data = p.data.clone()
                p.grad = None

    # --- what a strategy sees

    def split(self, parts: int, pattern: str = SEQUENTIAL) -> list[Fragment]:
        """Cut the model into fragments, by the rule of all runtimes."""
        return cut(self.names, self._nbytes, parts, pattern)

    def views(self, fragment: Fragment, flats: Sequence[Tensor]) -> list[Tensor]:
        """One view `[rows, *shape]` per parameter in `flats`."""
        return self._layout(fragment).row_views(flats)

    def named_views(self, fragment: Fragment, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Parameter name → its view in `flats`, `[1, n]`."""
        names = [self.names[position] for position in fragment.parameters]
        return dict(zip(names, self._layout(fragment).views(flats), strict=True))

    def weights(self, fragment: Fragment) -> list[Tensor]:
        """The storage itself, of all rows, or a copy of it: nobody writes in it."""
        return self._show(self._weights, fragment)

    @torch.no_grad()
    def delta(self, fragment: Fragment, base: Sequence[Tensor]) -> list[Tensor]:
        """`base - weights` for each parameter, in new tensors."""
        return [
            delta_into(torch.empty_like(w, dtype=b.dtype), b.to(w.device), w)
            for b, w in zip(base, self.weights(fragment), strict=True)
        ]

    def set_weights(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Write the weights of the living from `[1 or rows, n]`."""
        check_values("set_weights", self._layout(fragment).sizes, values, self.rows)
        self._write(self._weights, fragment, values)

    def grads(self, fragment: Fragment) -> list[Tensor]:
        """As with weights; zero where there is no gradient."""
        self._bring_home()
        return self._show(self._grads, fragment)

    def set_grads(self, fragment: Fragment, values: Sequence[Tensor]) -> None:
        """Write the gradients of the living from `[1 or rows, n]`."""
        check_values("set_grads", self._layout(fragment).sizes, values, self.rows)
        self._bring_home()
        self._write(self._grads, fragment, values)

    @torch.no_grad()
    def select(self, fragment: Fragment, positions: Sequence[Tensor]) -> list[Tensor]:
        """Some elements of every row: a copy."""
        flats = self.weights(fragment)
        return [flat.index_select(1, at) for flat, at in zip(flats, positions, strict=True)]

    @torch.no_grad()
    def put(
        self, fragment: Fragment, positions: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Write some elements of the living."""
        check_values("put", [at.numel() for at in positions], values, self.rows)
        flats = self.weights(fragment)
        for flat, at, given in zip(flats, positions, values, strict=True):
            value = given.to(flat.device)
            for row in self.written:
                flat[row].index_copy_(0, at, value[row if value.shape[0] > 1 else 0])
        if any(len(runs) > 1 for runs in self._runs(self._weights, fragment)):
            self._write(self._weights, fragment, flats)

    def zero_grads(self) -> None:
        """No gradient of any living row is left from before."""
        for row in self.alive:
            self.zero_row(row)

    @property
    def written(self) -> Sequence[int]:
        """The living, or those that writes are limited to."""
        return range(self.rows) if self._writes is None else self._writes

    def buffers(self) -> list[dict[str, Tensor]]:
        """Each node's own, whether it lives or not."""
        return [buffers_of([model]) for model in self.models]

    def inner_step(self) -> None:
        """Clip and step all that live."""
        self._complete_grads()
        self.inner.step(self.alive, on_turn=self._draw_as_alone)

    def keep_generators(self, row: int) -> None:
        """After the backward pass of `row`: an optimizer that draws random numbers goes on from
        here, as it does in a process of its own."""
        if not self.inner.is_shared:
            self._generators[row] = Generators.now(self.parameters[row][0].device)

    def _draw_as_alone(self, row: int) -> None:
        if row in self._generators:
            self._generators[row].restore()

    @property
    def lr(self) -> float:
        """The learning rate of the next inner step: that of the first node that lives."""
        return self.inner.lr_of(self.alive[0])

    def inner_states(self, fragment: Fragment) -> dict[tuple[int, int], MutableMapping[str, Any]]:
        """The optimizer's state of each parameter of `fragment`, at each node that is written."""
        return {
            (row, at): self.inner.state_of(row)[self.parameters[row][at]]
            for row in self.written
            for at in fragment.parameters
        }

    def release(self, tensors: Sequence[Tensor], *, reusable: bool) -> None:
        """Nothing was lent: views stay, and what was made anew is let go."""

    # --- what a runtime does

    @torch.no_grad()
    def fingerprint(self) -> list[int]:
        """Changes whenever somebody writes another bit into the weights, by whatever view."""
        return [
            int(flat.view(_BITS[flat.dtype.itemsize]).sum(dtype=torch.int64))
            for flat in self._weights
        ]

    @contextmanager
    def limited_to(self, rows: Sequence[int]) -> Iterator[None]:
        """Weights and gradients of other rows are not written inside."""
        before, self._writes = self._writes, list(rows)
        try:
            yield
        finally:
            self._writes = before

    def die(self, row: int) -> None:
        """From now on the optimizer and all writes pass over this row."""
        if row in self.alive:
            self.alive.remove(row)
        for p in self.parameters[row]:
            p.grad = None
        for grads in self._grads:
            grads[row].zero_()
        self._writes = list(self.alive)

    @torch.no_grad()
    def heal(self, row: int, donor: int) -> None:
        """Weights, inner state and buffers of `row` become those of `donor`; it lives."""
        for flat in self._weights:
            flat[row].copy_(flat[donor])
        for grads in self._grads:
            grads[row].zero_()
        for p, grad in zip(self.parameters[row], self._row_grads[row], strict=True):
            p.grad = grad
        self.inner.heal(row, donor)
        buffers = zip(self.models[row].buffers(), self.models[donor].buffers(), strict=True)
        for mine, theirs in (
            *buffers,
            *zip(self._frozen_of(row), self._frozen_of(donor), strict=True),
        ):
            mine.copy_(theirs)
        self.alive = sorted({*self.alive, row})
        self._writes = None if len(self.alive) == self.rows else list(self.alive)

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, inner state, and who lives. Shares storage."""
        return {
            "weights": list(self._weights),
            "buffers": [dict(model.named_buffers()) for model in self.models],
            "frozen": [self._frozen_of(row) for row in range(self.rows)],
            "inner": self.inner.state_dict(),
            "alive": list(self.alive),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        for mine, theirs in zip(self._weights, state["weights"], strict=True):
            mine.copy_(theirs)
        for model, saved in zip(self.models, state["buffers"], strict=True):
            for name, buffer in model.named_buffers():
                buffer.copy_(saved[name])
        for row, values in enumerate(state.get("frozen", ())):
            for mine, theirs in zip(self._frozen_of(row), values, strict=True):
                mine.copy_(theirs)
        for row in range(self.rows):
            if row in state["alive"] and row not in self.alive:
                self.heal(row, row)
            elif row not in state["alive"] and row in self.alive:
                self.die(row)
        self.inner.load_state_dict(state["inner"])

    # --- inside

    def _frozen_of(self, row: int) -> list[Tensor]:
        """The frozen parameters that are the node's own."""
        return [p.detach() for p in own_frozen(self.models[row])]

    def _layout(self, fragment: Fragment) -> Layout:
        layout = self._layouts.get(fragment.parameters)
        if layout is None:
            layout = Layout([self.parameters[0][position] for position in fragment.parameters])
            self._layouts[fragment.parameters] = layout
        return layout

    def _show(self, flats: list[Tensor], fragment: Fragment) -> list[Tensor]:
        """The part of `flats` that is `fragment`, in the order of its layout."""
        return [joined(runs) for runs in self._runs(flats, fragment)]

    def _runs(self, flats: list[Tensor], fragment: Fragment) -> list[list[Tensor]]:
        """The same as views of runs of columns, for each flat tensor of the layout."""
        key = (id(flats), fragment.parameters)
        if key not in self._seen:
            columns = columns_of([self._places[position] for position in fragment.parameters])
            self._seen[key] = [
                [flats[number][:, run.start : run.stop] for run in runs]
                for number, runs in columns.items()
            ]
        return self._seen[key]

    def _write(self, flats: list[Tensor], fragment: Fragment, values: Sequence[Tensor]) -> None:
        for runs, value in zip(self._runs(flats, fragment), values, strict=True):
            write(runs, value, self._writes)


def _trained(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    """What is trained, by name; a tied weight once.

    Raises:
        SettingsError: nothing is, or it cannot be averaged, or fused kernels would spoil it.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise SettingsError("the model has no parameter that requires a gradient")
    for name, p in named:
        if not p.is_floating_point():
            raise SettingsError(f"parameter {name} is {p.dtype}: it cannot be averaged")
        if not p.is_contiguous():
            raise SettingsError(
                f"parameter {name} of shape {tuple(p.shape)} is not contiguous: "
                "make it so before training (p.data = p.data.contiguous())"
            )
    return [name for name, _ in named], [p for _, p in named]
