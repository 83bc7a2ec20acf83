"""A strategy reads until its round closes, then applies for all and adopts at home, or discards.

A `Recipe` says *when* a round is due, *what* it sends and *how* the result is applied. A `Strategy`
drives recipes through the parts of a training step:

    begin()         rounds of recipes with Place.BEFORE open; they may heal this group
    forward, backward
    before()        gradients are averaged and the rounds close; False: skip the inner step
    inner step
    after()         rounds of recipes with Place.AFTER open, average and close

    contribution(f) → tensors, draft       reads only
    the round closes: the vote
    yes:  news = apply(f, received)        shared state: backup, outer momentum
          adopt(f, news, draft)            local weights or gradients, own state
    no:   discard(f, draft)                what the table of the design brings back

Every error in a round discards it before it is raised, so a caller that goes on stands where the
last synchronisation left it. Schedules read one clock, which heals with the state.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from torchft.errors import HealError, PhaseError, SettingsError
from torchft.peers import Handle, Peers, Place, Round
from torchft.strategies.local import Fragment, Local
from torchft.strategies.parts import buckets

__all__ = ["By", "Clock", "Recipe", "Strategy"]


class By(enum.Enum):
    """How the contributions come together."""

    AVERAGE = "average"
    GATHER = "gather"


@dataclass
class Clock:
    """What schedules and seeds read. All groups agree on it whenever a round opens."""

    steps: int = 0
    """Inner steps that were due so far, taken or skipped."""


class Recipe:
    """One strategy: what differs between all-reduce, LocalSGD, DiLoCo and their kin."""

    place: ClassVar[Place] = Place.AFTER
    by: ClassVar[By] = By.AVERAGE
    delay: int = 0
    """Inner steps between a round's opening and its close."""

    varies: bool = False
    """Rounds differ in what they send, so that only an agreed clock says what is sent now."""

    local: Local
    clock: Clock

    def bind(self, local: Local, clock: Clock) -> None:
        """Give the recipe the weights it works on, and the clock. Once.

        Raises:
            SettingsError: the recipe serves another strategy already.
        """
        if hasattr(self, "local"):
            raise SettingsError(f"this {type(self).__name__} is in use: make one per strategy")
        self.local, self.clock = local, clock
        self.setup()

    def setup(self) -> None:
        """Make the recipe's state."""

    def due(self) -> bool:
        """Whether a round opens now, by the clock."""
        return True

    def fragment(self) -> Fragment:
        """What the round that opens now is about; asked after it opened, so the clock is agreed."""
        return self.local.whole

    def opened(self) -> None:
        """A round opened, and may have healed this group: `load_state_dict` was called then."""

    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], Any]:
        """Tensors `[rows, …]` to send, which the round may overwrite, and a draft kept at home."""
        raise NotImplementedError

    def apply(self, fragment: Fragment, received: list[Tensor]) -> Any:
        """Advance the shared state; returns the news that each node adopts."""
        return received

    def adopt(self, fragment: Fragment, news: Any, draft: Any) -> None:
        """Write the news into local weights or gradients, and advance the recipe's own state."""
        raise NotImplementedError

    def discard(self, fragment: Fragment, draft: Any) -> None:
        """The round came to nothing: restore what must not stand."""

    def state_dict(self) -> dict[str, Any]:
        """Shared and own state, with the clock that its schedule reads."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""


@dataclass
class _InFlight:
    """A round between its opening and its close."""

    recipe: Recipe
    fragment: Fragment
    round: Round
    sent: list[Tensor]
    handle: Handle
    draft: Any
    closes: int
    """The clock's time of the close."""


class Strategy:
    """Drives recipes over `local` and `peers`.

    `bucket_bytes` bounds what one collective carries. `applying` gives a context that is entered
    while weights and state are written (the front doors lock out readers in it).
    """

    def __init__(
        self,
        local: Local,
        peers: Peers,
        recipes: Sequence[Recipe],
        *,
        bucket_bytes: int | None = None,
        applying: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.local = local
        self.clock = Clock()
        self.recipes = list(recipes)
        self._peers = peers
        self._bucket_bytes = bucket_bytes
        self._applying = applying
        self._begun: list[tuple[Recipe, Round]] | None = None
        self._flight: list[_InFlight] = []
        for recipe in self.recipes:
            recipe.bind(local, self.clock)

    def join(self) -> None:
        """Meet the others before the first inner step.

        Where all are new, all have equal weights afterwards. Otherwise this group heals here and
        takes part, with nothing of its own, in the round that the others just opened; when it
        could not heal, in the next one too.

        Raises:
            PhaseError: the others have another strategy or schedule.
        """
        recipes = self._at(Place.AFTER)
        while recipes and not self._join(recipes):
            pass

    def _join(self, recipes: Sequence[Recipe]) -> bool:
        peers_round = self._open(recipes)
        if peers_round.opening:
            return True
        healed = not peers_round.failed
        due = next((recipe for recipe in recipes if recipe.due()), None)
        if due is not None:
            self._send(due, peers_round)
            self._close_due(due)
            return healed
        error = PhaseError(
            f"the others opened a round at inner step {self.clock.steps}, where none is due here: "
            "give every group the same strategy and settings"
        )
        self._give_up(peers_round, error)
        if healed:
            raise error
        return False

    def begin(self) -> None:
        """Before the forward pass: open the rounds that average gradients."""
        if self._begun is None:
            self._begun = [(r, self._open([r])) for r in self._at(Place.BEFORE) if r.due()]

    def before(self) -> bool:
        """After the backward pass: average the gradients. False: skip this inner step.

        Raises:
            PhaseError: `begin` was not called.
        """
        if self._begun is None:
            if not self._at(Place.BEFORE):
                return True
            raise PhaseError("no round is open for the gradients: call begin() before the forward")
        begun, self._begun = self._begun, None
        for recipe, peers_round in begun:
            self._send(recipe, peers_round)
        went = True
        for recipe, _ in begun:
            went = self._close_due(recipe) and went
        return went

    def after(self) -> None:
        """After the inner step: synchronise weights where that is due."""
        self.clock.steps += 1
        for recipe in self._at(Place.AFTER):
            self._close_due(recipe)
            if recipe.due():
                self._synchronise(recipe)

    def step(self) -> bool:
        """What stands where `optimizer.step()` stood. Returns whether the inner step was taken."""
        went = self.before()
        if went:
            self.local.inner_step()
        self.after()
        return went

    def synchronise(self) -> None:
        """Open, and without a delay also close, a round of each weight recipe now."""
        for recipe in self._at(Place.AFTER):
            self._synchronise(recipe)

    def finish(self) -> None:
        """Close the rounds that are still open, in the order in which they opened."""
        while self._flight:
            self._close(self._flight.pop(0))

    def state_dict(self) -> dict[str, Any]:
        """All of it: every recipe's state and the clock."""
        return {
            "recipes": [recipe.state_dict() for recipe in self.recipes],
            "steps": self.clock.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        for recipe, theirs in zip(self.recipes, state["recipes"], strict=True):
            recipe.load_state_dict(theirs)
        self.clock.steps = state["steps"]

    def _at(self, place: Place) -> list[Recipe]:
        return [recipe for recipe in self.recipes if recipe.place is place]

    def _open(self, recipes: Sequence[Recipe]) -> Round:
        try:
            opened = self._peers.open(recipes[0].place)
        except BaseException:
            for recipe in recipes:
                self._discard(recipe, recipe.fragment(), None)
            raise
        for recipe in recipes:
            recipe.opened()
        return opened

    def _synchronise(self, recipe: Recipe) -> None:
        peers_round = self._open([recipe])
        if not peers_round.opening:
            self._send(recipe, peers_round)
            self._close_due(recipe)

    def _send(self, recipe: Recipe, peers_round: Round) -> None:
        fragment = recipe.fragment()
        if peers_round.failed and recipe.varies:
            # Whoever could not heal does not know what the others send now. Tensors of other
            # sizes would spoil their average, so nobody gets one.
            peers_round.fail(HealError("a joining group could not heal: the round is given up"))
        try:
            sent, draft = recipe.contribution(fragment)
            handle = self._start(recipe, peers_round, sent)
        except Exception as error:
            self._discard(recipe, fragment, None)
            self._give_up(peers_round, error)
            raise
        closes = self.clock.steps + recipe.delay
        self._flight.append(_InFlight(recipe, fragment, peers_round, sent, handle, draft, closes))

    def _give_up(self, peers_round: Round, error: Exception) -> None:
        peers_round.fail(error)
        peers_round.close()

    def _start(self, recipe: Recipe, peers_round: Round, sent: list[Tensor]) -> Handle:
        if recipe.by is By.GATHER:
            return peers_round.gather(sent)
        if self._bucket_bytes is None:
            return peers_round.average(sent)
        return peers_round.average(buckets.cut(sent, self._bucket_bytes))

    def _close_due(self, recipe: Recipe) -> bool:
        """Close what is due of `recipe`; False when any of it came to nothing."""
        went = True
        for one in list(self._flight):
            if one.recipe is recipe and one.closes <= self.clock.steps:
                self._flight.remove(one)
                went = self._close(one) and went
        return went

    def _close(self, one: _InFlight) -> bool:
        applied = False
        try:
            received = one.handle.wait()
            if one.round.close():
                self._apply(one, received)
                applied = True
        except Exception as error:
            one.round.fail(error)
            raise
        finally:
            if not applied:
                self._discard(one.recipe, one.fragment, one.draft)
            self.local.release(one.sent, reusable=applied)
        return applied

    def _apply(self, one: _InFlight, received: list[Tensor]) -> None:
        if one.recipe.by is By.AVERAGE and self._bucket_bytes is not None:
            received = buckets.join(received, one.sent)
        with self._applying():
            news = one.recipe.apply(one.fragment, received)
            one.recipe.adopt(one.fragment, news, one.draft)

    def _discard(self, recipe: Recipe, fragment: Fragment, draft: Any) -> None:
        with self._applying():
            recipe.discard(fragment, draft)
