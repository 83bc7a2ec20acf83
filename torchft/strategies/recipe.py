"""A recipe: what differs between all-reduce, LocalSGD, DiLoCo and their kin.

It says *when* a round is due, *what* it sends, *how small*, and *how* the result is applied; a
`Strategy` drives it. Two kinds of state:

- *shared*: equal at all nodes after every round, so it heals, is digested, and may live at a
  server. `state_dict` is the shared state: a backup, outer momentum.
- *own*: each node's alone, one row per node, in `own`: residuals, DeMo's momentum. A node that
  heals starts with zeros.

Both go into a checkpoint.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchft.errors import SettingsError
from torchft.peers import Place
from torchft.quantization import Codec
from torchft.renamed import OldAttribute, say_renamed
from torchft.strategies.buffers import LEFT
from torchft.strategies.local import Fragment, Local
from torchft.strategies.optim_spec import OptimSpec
from torchft.strategies.parts.precision import wider_dtypes

__all__ = ["By", "Clock", "Recipe", "kind_of"]


class By(enum.Enum):
    """How the contributions of the nodes are put together."""

    AVERAGE = "average"
    GATHER = "gather"
    ISLANDS = "islands"
    """Averaged within islands that the recipe draws anew; not every kind of peers can."""


@dataclass
class Clock:
    """What schedules and seeds read. All groups agree on it whenever a round opens."""

    steps: int = 0
    """Inner steps that were due so far, taken or skipped."""
    forming_since: int | None = None
    """When a round opened that still forms in the background."""

    @property
    def agreed(self) -> int:
        """Where a node begins that heals now: when the last round opened, if nobody knows yet who
        is in it."""
        return self.steps if self.forming_since is None else self.forming_since


class Recipe:
    """One strategy's choices. It reads until a round closes, and then applies or discards."""

    place: ClassVar[Place] = Place.AFTER
    by: By = By.AVERAGE
    sync_every: int = 1
    """Inner steps from one round to the next, unless `due` says otherwise. Rounds follow steps H,
    2H, 3H; those about gradients (`Place.BEFORE`) are part of steps 1, H + 1, 2H + 1."""
    every = OldAttribute("sync_every")
    delay: int = 0
    """Inner steps between a round's opening and its close."""

    codec: Codec | None = None
    """How small: averages travel as it encodes them. None: as they are."""
    buffers: str = LEFT
    """What a round does to the model's buffers: see `torchft.strategies.buffers`."""
    error_feedback: bool = False
    """What the codec loses is kept and sent later. The draft of a contribution is then what each
    tensor should say, and when the round has closed what did not arrive: see `ErrorFeedback`."""
    shared_dtype: torch.dtype | None = None
    """At least this is what a backup, an outer optimizer and averages of weights are kept in. None:
    the parameter's own dtype. See `parts/precision.py`."""
    moves_frozen: ClassVar[bool] = False
    """An outer optimizer would go on moving a parameter that was frozen in the middle of a run."""
    varies: bool = False
    """Rounds differ in what they send, so that only an agreed clock says what is sent now."""

    local: Local
    clock: Clock
    own: dict[str, list[Tensor]]
    """Own state by name: tensors with a leading row for each node. Zero at the start."""
    in_flight: list[Fragment]
    """Of its rounds that are open now, in the order in which they were opened."""
    has_healed: bool = False
    """It took over a donor's shared state, and no round has opened since."""
    has_contributed: bool = False
    """It has been asked for its contribution to a round."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Recipe.__dict__["every"].renew(cls)
        if "adopt" in vars(cls):  # the name of earlier releases
            say_renamed(cls.__name__, "adopt", "apply_locally", both="apply_locally" in vars(cls))
            cls.apply_locally = vars(cls)["adopt"]  # type: ignore[method-assign]

    def bind(self, local: Local, clock: Clock) -> None:
        """Give the recipe the weights it works on, and the clock. Once.

        Raises:
            SettingsError: the recipe serves another strategy already.
        """
        self.check_unused()
        self.local, self.clock, self.own, self.in_flight = local, clock, {}, []
        self.setup()

    def check_unused(self) -> None:
        """No strategy that runs has this recipe already.

        Raises:
            SettingsError: one has.
        """
        if hasattr(self, "local"):
            raise SettingsError(f"this {type(self).__name__} is in use: make one per strategy")

    def check_inner(self, optim: OptimSpec) -> None:
        """Refuse an inner optimizer that would be another algorithm in this recipe.

        Raises:
            SettingsError: which one fits.
        """

    def setup(self) -> None:
        """Make the state of the recipe, before the first step."""

    def take_backup(self) -> None:
        """Training begins with the weights as they are now: they are what a discarded round goes
        back to."""

    def compared(self) -> dict[str, str]:
        """Settings that must be equal in all groups, by name; asked once it is bound. Its codec and
        what it does to buffers are compared anyway."""
        shared = "" if self.shared_dtype is None else wider_dtypes(self.local, self.shared_dtype)
        return {"shared dtype": shared} if shared else {}

    @property
    def rests(self) -> bool:
        """Whether there are inner steps after which no round of it is in flight."""
        return not self.delay

    def due(self) -> bool:
        """Whether a round opens now, by the clock."""
        return self.clock.steps % self.sync_every == 0

    def fragment(self) -> Fragment:
        """What the round that opens now is about; asked after it opened, so the clock is agreed."""
        return self.local.whole

    def of(self, index: int) -> Fragment:
        """The fragment that has the given index."""
        return self.local.whole

    def opened(self) -> None:
        """A round opened, and may have healed this group: `load_state_dict` was called then."""
        if self.has_healed:
            self.has_healed = False
            self.settle_in()

    def settle_in(self) -> None:
        """This node has healed: its weights are the donor's. Start from what all share, if the
        donor's local weights are not that."""

    def islands(self, participants: int) -> list[list[int]]:
        """With `By.ISLANDS`: who averages with whom, as positions among the participants."""
        raise NotImplementedError

    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], Any]:
        """Tensors `[rows, …]` to send, which the round may overwrite, and a draft to keep."""
        raise NotImplementedError

    def named(self, fragment: Fragment, received: list[Tensor], draft: Any) -> Mapping[str, Tensor]:
        """What was received, by the names that an error message calls it."""
        return {f"tensor {number}": tensor for number, tensor in enumerate(received)}

    def apply(self, fragment: Fragment, received: list[Tensor]) -> Any:
        """Advance the shared state; returns the update that each node applies."""
        return received

    def apply_locally(self, fragment: Fragment, update: Any, draft: Any) -> None:
        """Write the update into local weights or gradients, and advance the recipe's own state."""
        raise NotImplementedError

    def discard(self, fragment: Fragment, draft: Any) -> None:
        """The round came to nothing: restore what must not stand."""

    def state_dict(self) -> dict[str, Any]:
        """The state that all nodes share, as plain data."""
        return {}

    def equal_state(self) -> dict[str, Any]:
        """As much of `state_dict` as is equal at all nodes also between two rounds."""
        return self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse. A strategy that heals then settles the recipe in; what loads a recipe by
        itself relies on the recipe to set `has_healed`."""

    def forget_own(self) -> None:
        """This node heals: its own state starts with zeros."""
        for tensors in self.own.values():
            for tensor in tensors:
                tensor.zero_()

    def own_state_dict(self) -> dict[str, Any]:
        """The own state, for a checkpoint."""
        return dict(self.own)

    def load_own_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse.

        Raises:
            SettingsError: it was written with other options.
        """
        for name, tensors in self.own.items():
            saved = list(state[name])
            if [tuple(t.shape) for t in saved] != [tuple(t.shape) for t in tensors]:
                raise SettingsError(
                    f"the checkpoint's {name} of {type(self).__name__} is cut otherwise than here "
                    f"({[tuple(t.shape) for t in saved]}, not {[tuple(t.shape) for t in tensors]}):"
                    " give the options that it was written with"
                )
            for mine, theirs in zip(tensors, saved, strict=True):
                mine.copy_(theirs)


def kind_of(recipe: Recipe) -> str:
    """The name that groups compare and run folders have: `DiLoCo` of a `DiLoCoRecipe`."""
    return type(recipe).__name__.removesuffix("Recipe")
