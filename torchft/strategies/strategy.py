"""A strategy reads until its round closes, then applies the result or discards it.

A `Recipe` says *when* a round is due, *what* it sends and *how* the result is applied. A `Strategy`
drives recipes through the parts of a training step:

    begin()         rounds of recipes with Place.BEFORE open; they may heal this group
    forward, backward
    before()        gradients are averaged and the rounds close; False: skip the inner step
    inner step
    after()         rounds of recipes with Place.AFTER open, average and close

    contribution(f) → tensors, draft       reads only
    the round closes: the vote; all groups discard it alike if an average has NaN or infinity in it
    committed:  update = apply(f, received)        shared state: backup, outer momentum
                apply_locally(f, update, draft)    local weights or gradients, own state
    discarded:  discard(f, draft)                  restores what must not stand

Every error in a round discards it before it is raised, so a caller that goes on stands where the
last synchronisation left it. Schedules read one clock, which heals with the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Self

from torchft.errors import HealError, PhaseError, SettingsError
from torchft.peers import Peers, Place, Round
from torchft.strategies import checks
from torchft.strategies.buffers import check_means
from torchft.strategies.compared import check_codecs, compare_settings
from torchft.strategies.in_flight import Applying, InFlight
from torchft.strategies.local import Fragment, Local
from torchft.strategies.optim_spec import OptimSpec, plain
from torchft.strategies.recipe import Clock, Recipe, kind_of
from torchft.strategies.recovery import Recovery

if TYPE_CHECKING:
    from torchft.strategies.inner import Inner

__all__ = ["Strategy"]


_NO_JOIN = (
    "no group can join others whose strategy communicates both before and after the inner step: "
    "start all groups together"
)


class Strategy:
    """One or more recipes, and how each node takes its inner step. The same object runs anywhere:

        strategy = Strategy([DiLoCoRecipe(outer, 100)], inner=Inner(OptimSpec(AdamW, lr=1e-3)))
        strategy.bind(local, peers)            # by whatever runs it; once
        strategy.step()                        # instead of optimizer.step()

    `inner` is for runtimes that make the inner optimizer themselves, like the simulator; the
    wrappers, whose users bring one, leave it out. `bucket_bytes` bounds what one collective
    carries. Until it is bound a strategy pickles.
    """

    local: Local

    def __init__(
        self,
        recipes: Sequence[Recipe],
        *,
        inner: Inner | OptimSpec | None = None,
        bucket_bytes: int | None = None,
    ) -> None:
        self.recipes = checks.recipes_of(recipes)
        self.inner = checks.inner_of(inner)
        if self.inner is not None:
            for recipe in self.recipes:
                recipe.check_inner(self.inner.optim)
        self.settings: dict[str, Any] = {}
        """What a subclass was made with, for `config`."""
        self.clock = Clock()
        self.bucket_bytes = bucket_bytes
        self._peers: Peers | None = None
        self._applying: Applying = nullcontext
        self._begun: list[tuple[Recipe, Round]] | None = None
        self._ended = False
        """A heal brought this node to where the others end their run, in the step that began."""
        self._flight: list[InFlight] = []
        self._opening = 0
        """Position of the recipe whose round opened last; a newcomer goes on from there."""

    def bind(
        self,
        local: Local,
        peers: Peers,
        *,
        applying: Applying = nullcontext,
    ) -> Self:
        """Give it the weights it works on and the other nodes. Once.

        `applying` gives a context that is entered while weights and state are written (the
        wrappers lock out readers in it).

        Raises:
            SettingsError: it, or one of its recipes, is in use already, or has a codec and nothing
                to average, or the model has a buffer that has no mean.
        """
        self.check_unused()
        checks.check_recipes(self.recipes)
        check_codecs(self.recipes)
        try:
            for recipe in self.recipes:
                check_means(local, recipe.buffers)
                recipe.bind(local, self.clock)
            self.local, self._peers, self._applying = local, peers, applying
            self._recovery = Recovery(local, self.recipes)
            compare_settings(self.recipes, peers)
        except BaseException:
            self._peers = None
            for recipe in self.recipes:
                vars(recipe).pop("local", None)  # nothing runs it, so that it may be given again
            raise
        return self

    def check_unused(self) -> None:
        """Nothing runs this strategy, or one of its recipes, yet.

        Raises:
            SettingsError: something does.
        """
        if self._peers is not None:
            raise SettingsError(f"this {type(self).__name__} is in use: make one for each run")
        for recipe in self.recipes:
            recipe.check_unused()

    @property
    def opening(self) -> int:
        """Position of the recipe whose round opened last, or opens now."""
        return self._opening

    @property
    def in_flight(self) -> bool:
        """A round has opened and not yet closed, so there is no state to save."""
        return bool(self._flight)

    def config(self) -> dict[str, Any]:
        """All settings as plain data, for loggers."""
        recipes = [kind_of(recipe) for recipe in self.recipes]
        inner = self.inner.config() if self.inner is not None else {}
        settings = {
            name: value.config() if hasattr(value, "config") else plain(value)
            for name, value in self.settings.items()
        }
        return {"strategy": type(self).__name__, "recipes": recipes, **inner, **settings}

    def __repr__(self) -> str:
        config = self.config()
        name = config.pop("strategy")
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in config.items())})"

    def join(self) -> None:
        """Meet the others before the first inner step.

        Where all are new, all have equal weights afterwards. Otherwise this group heals here and
        takes part, with nothing of its own, in the round that the others just opened; when it
        could not heal, in the next one too.

        Raises:
            PhaseError: the others have another strategy or schedule.
            SettingsError: no group can join others that communicate before and after the step.
        """
        recipes = self._at(Place.AFTER)
        while recipes and not self._join(recipes):
            pass

    def _join(self, recipes: Sequence[Recipe]) -> bool:
        peers_round = self._open(recipes)
        if peers_round.bootstrap:
            return True
        healed = not peers_round.failed
        if peers_round.final_sync:  # there is nothing to take part in
            peers_round.close()
            self._ended = healed
            return healed
        if self._at(Place.BEFORE):
            self._give_up(peers_round, SettingsError(_NO_JOIN))
            raise SettingsError(_NO_JOIN)
        # The healed state says whose round this is.
        due = next((r for r in recipes if r.due() and self._position(r) >= self._opening), None)
        if due is None or (due.delay and not healed):
            # A round that stays open would be in the way of the next attempt to heal.
            self._refuse_round(peers_round, healed)
            return False
        self._send(due, peers_round)
        self._close_due(due)
        if healed:
            for later in recipes[recipes.index(due) + 1 :]:
                self._close_due(later)
                if later.due():
                    self._synchronise(later)
        return healed

    def _refuse_round(self, peers_round: Round, healed: bool) -> None:
        error = PhaseError(
            f"the others opened a round at inner step {self.clock.steps}, where none is due here: "
            "give every group the same strategy and settings"
        )
        self._give_up(peers_round, error)
        if healed:
            raise error

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
        self._ended |= any(peers_round.final_sync for _, peers_round in begun)
        return went

    def after(self) -> None:
        """After the inner step: synchronise weights where that is due."""
        self.clock.steps += 1
        if self._meet():
            return
        for one in self._flight:
            if one.half_way == self.clock.steps < one.closes:
                one.handle.advance()
        for recipe in self._at(Place.AFTER):
            self._close_due(recipe)
            if recipe.due():
                self._synchronise(recipe)

    def step(self) -> bool:
        """What stands where `optimizer.step()` stood. Returns whether the inner step was taken.

        One that began by healing to where the others end their run is not taken, and not counted.
        """
        went = self.before()
        if not self._ended:
            if went:
                with self._applying():
                    self.local.inner_step()
            self.after()
        ended, self._ended = self._ended, False
        return went and not ended

    def synchronise(self) -> None:
        """Open, and without a delay also close, a round of each weight recipe now."""
        self._meet(wait=True)
        for recipe in self._at(Place.AFTER):
            self._synchronise(recipe)

    def finish(self) -> None:
        """Close the rounds that are still open, in the order in which they opened."""
        self._meet(wait=True)
        while self._flight:
            self._close(self._flight.pop(0))

    def state_dict(self) -> dict[str, Any]:
        """All of it, for a checkpoint: shared state, own state, the clock.

        Raises:
            PhaseError: a round is in flight.
        """
        if self._flight:
            raise PhaseError("a round is in flight: save after finish(), or when none is open")
        return {**self.shared_state_dict(), "own": [r.own_state_dict() for r in self.recipes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` returned."""
        self.load_shared_state_dict(state)
        for recipe, theirs in zip(self.recipes, state["own"], strict=True):
            recipe.has_healed = False
            recipe.load_own_state_dict(theirs)

    def shared_state_dict(self) -> dict[str, Any]:
        """What a node that heals gets: equal at all nodes, whenever a round opens."""
        return {
            "recipes": [recipe.state_dict() for recipe in self.recipes],
            "steps": self.clock.agreed,
            "opening": self._opening,
        }

    def load_shared_state_dict(self, state: dict[str, Any]) -> None:
        """Heal: take over a donor's shared state; own state starts with zeros."""
        for recipe, theirs in zip(self.recipes, state["recipes"], strict=True):
            recipe.load_state_dict(theirs)
            recipe.has_healed = True
            recipe.forget_own()
        self.clock.steps = state["steps"]
        self._opening = state["opening"]

    def settle_in(self) -> None:
        """Start from what all nodes share, if a state was loaded and no round has opened since."""
        for recipe in self.recipes:
            recipe.opened()

    def open_rounds(self) -> list[dict[str, Any]]:
        """What a node that heals gets of the rounds in flight: their results, as received, and when
        they close. Waits for them; one that still forms is the one in which it heals."""
        return [
            {"recipe": self._position(one.recipe), **one.carried()}
            for one in list(self._flight)
            if one.round.formed
        ]

    def take_over(self, open_rounds: Sequence[dict[str, Any]]) -> None:
        """Heal: close these rounds when the donor does, in place of what is in flight here. Called
        after `load_shared_state_dict`, while `Peers.open` loads the donor's state."""
        assert self._peers is not None
        self._flight.clear()
        for recipe in self.recipes:
            recipe.in_flight.clear()
        for theirs in open_rounds:
            recipe = self.recipes[theirs["recipe"]]
            self._depart(InFlight.taken_over(theirs, recipe, self.local, self._peers))

    def _position(self, recipe: Recipe) -> int:
        return next(at for at, one in enumerate(self.recipes) if one is recipe)

    def _at(self, place: Place) -> list[Recipe]:
        return [recipe for recipe in self.recipes if recipe.place is place]

    def _open(self, recipes: Sequence[Recipe]) -> Round:
        if self._peers is None:
            raise PhaseError(f"this {type(self).__name__} runs nowhere yet: bind it first")
        assert self.clock.forming_since is None, "one round forms at a time"
        self._opening = self._position(recipes[0])
        self.clock.forming_since = self.clock.steps
        try:
            opened = self._peers.open(recipes[0].place)
        except BaseException:
            self.clock.forming_since = None
            for recipe in recipes:
                self._discard(recipe, recipe.fragment(), None)
            raise
        if opened.formed:
            self._formed()
        return opened

    def _formed(self) -> None:
        self.clock.forming_since = None
        self.settle_in()

    def _meet(self, *, wait: bool = False) -> bool:
        """See to a round that forms in the background, as soon as another one closes or opens: till
        then shared state stands, which somebody may be given. All ranks of a group do so after the
        same inner step. True: this group was given a donor's state in it, and stands where that
        round was opened."""
        if self.clock.forming_since is None or not (wait or self._is_busy()):
            return False
        one = self._flight[-1]
        try:
            anew = one.round.meet()
        except BaseException:
            self.clock.forming_since = None
            self._remove(one)
            self._discard(one.recipe, one.fragment, one.draft)
            raise
        self._formed()
        if anew:
            self._remove(one)
            self._send(one.recipe, one.round)
        return anew

    def _remove(self, one: InFlight) -> None:
        if one in self._flight:  # what a heal takes over has replaced it already
            self._flight.remove(one)
            one.recipe.in_flight.remove(one.fragment)
        self.local.release(one.sent, reusable=False)

    def _is_busy(self) -> bool:
        """A round opens or closes at this time."""
        closes = any(one.closes <= self.clock.steps for one in self._flight)
        return closes or any(recipe.due() for recipe in self._at(Place.AFTER))

    def _synchronise(self, recipe: Recipe) -> None:
        peers_round = self._open([recipe])
        if not peers_round.bootstrap:
            self._send(recipe, peers_round)
            self._close_due(recipe)

    def _send(self, recipe: Recipe, peers_round: Round) -> None:
        fragment = recipe.fragment()
        if peers_round.failed and (recipe.varies or len(self.recipes) > 1):
            # Whoever could not heal does not know what the others send now. Tensors of other
            # sizes would spoil their average, so nobody gets one.
            peers_round.fail(HealError("a joining group could not heal: the round is given up"))
        try:
            one = InFlight.opened(
                recipe, fragment, peers_round, self.clock.steps, bucket_bytes=self.bucket_bytes
            )
        except Exception as error:
            self._discard(recipe, fragment, None)
            self._give_up(peers_round, error)
            raise
        self._depart(one)

    def _depart(self, one: InFlight) -> None:
        self._flight.append(one)
        one.recipe.in_flight.append(one.fragment)

    def _give_up(self, peers_round: Round, error: Exception) -> None:
        self.clock.forming_since = None
        peers_round.fail(error)
        peers_round.close()

    def _close_due(self, recipe: Recipe) -> bool:
        """Close what is due of `recipe`; False when any of it came to nothing."""
        went = True
        for one in list(self._flight):
            if one.recipe is recipe and one.closes <= self.clock.steps:
                self._flight.remove(one)
                went = self._close(one) and went
        return went

    def _close(self, one: InFlight) -> bool:
        one.recipe.in_flight.remove(one.fragment)
        return one.close(self._recovery, self._applying)

    def _discard(self, recipe: Recipe, fragment: Fragment, draft: Any) -> None:
        with self._applying():
            recipe.discard(fragment, draft)
