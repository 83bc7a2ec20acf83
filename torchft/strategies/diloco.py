"""DiLoCo: train alone for H inner steps, then step an outer optimizer with the mean of the deltas.

    δ ← backup - w                       what this node moved since the last synchronisation
    backup ← outer(backup, mean of δ)    SGD with Nesterov momentum, as a rule
    w ← backup

With an outer learning rate of 1 and no momentum this is LocalSGD. Example: both nodes start at 1.0
and reach 0.6 and 0.8; the mean delta is 0.3, and an outer rate of 0.7 gives 1 - 0.21 = 0.79.
(Douillard et al., arXiv 2311.08105.)

With n fragments one of them synchronises at a time, in turn, so that the peak of what travels is
1/n of the model. The k-th round closes after inner step ⌊kH/n⌋, for any H ≥ n: H = 5 with two
fragments gives 2, 5, 7, 10. With `delay` it opens so many steps earlier, and the average travels
while training goes on; `mix` keeps a share of what was learned meanwhile: w ← mix · w + (1 - mix) ·
backup. From the shortest distance ⌊H/n⌋ on, the next round opens where one closes, or before; H is
the longest delay. (Streaming DiLoCo: Douillard et al., arXiv 2501.18512.)

After a discarded round, the fragment's weights go back to its backup, which like the outer
optimizer stands untouched; the same fragment is tried again in the next round, so that all others
come later by one. Where the fragment's own weights are NaN or infinite, the node's other fragments
go back with it. The inner optimizer's state stands, except where it is not finite: that of such a
parameter begins anew. With `inner_state="restored"` moments and counters of the fragment's
parameters go back as well, to what they were at its last synchronisation; that costs a copy of them
on the backup's device: 8 bytes a parameter for AdamW. (Its learning rate goes on.)

The backup, the outer optimizer and what travels are fp32 where parameters are bf16 or fp16, unless
`shared_dtype` says otherwise (`parts/precision.py`).

With a codec and `error_feedback`, what the codec loses of a delta is added to the fragment's next
one: sent = δ + e, and after a commit e ← what did not arrive of it. After a discarded round e
stands. It is each node's own, zero in one that heals: 4 bytes a parameter beside it, and as many
for each round that is open.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchft.arguments import check_choice, check_integer, check_number
from torchft.errors import SettingsError
from torchft.quantization import ErrorFeedback
from torchft.renamed import renamed_arguments
from torchft.strategies.buffers import BUFFERS, LEFT
from torchft.strategies.fragments import PATTERNS, SEQUENTIAL
from torchft.strategies.local import Fragment
from torchft.strategies.parts.backup import Backup
from torchft.strategies.parts.broken import broken_rows
from torchft.strategies.parts.deltas import mixed
from torchft.strategies.parts.feedback import feedback_of
from torchft.strategies.parts.inner_backup import InnerBackup
from torchft.strategies.parts.outer import FlatOuter, Outer, OuterFactory
from torchft.strategies.parts.precision import SharedDtype, check_shared_dtype
from torchft.strategies.recipe import Recipe
from torchft.strategies.rounds_schedule import is_slot, next_fragment

__all__ = ["DiLoCoRecipe"]

INNER_STATES = STANDS, RESTORED = "stands", "restored"
"""What becomes of the inner optimizer's state after a discarded round."""

Draft = list[Tensor] | None
"""With error feedback: what did not arrive of the delta."""


class DiLoCoRecipe(Recipe):
    """`outer_optimizer` is an optimizer factory, or an `Outer` part that holds optimizers already.
    `pattern` says which blocks make a fragment: see `torchft.strategies.fragments`."""

    moves_frozen = True

    @renamed_arguments(outer="outer_optimizer", every="sync_every")
    def __init__(
        self,
        outer_optimizer: OuterFactory | Outer,
        sync_every: int,
        *,
        fragments: int = 1,
        pattern: str = SEQUENTIAL,
        delay: int = 0,
        mix: float = 0.0,
        inner_state: str = STANDS,
        buffers: str = LEFT,
        error_feedback: bool = False,
        shared_dtype: SharedDtype = torch.float32,
        backup_device: torch.device | str | None = "cpu",
        pin_memory: bool = True,
    ) -> None:
        check_schedule(sync_every, fragments, delay, mix)
        check_choice("inner_state", inner_state, INNER_STATES)
        check_choice("pattern", pattern, PATTERNS)
        self.buffers = check_choice("buffers", buffers, BUFFERS)
        given = outer_optimizer
        self.outer: Outer = FlatOuter(given) if callable(given) else given
        self.sync_every = sync_every
        self.fragments: list[Fragment] = []
        self.backups: list[Backup] = []
        self.inner_backups: list[InnerBackup] = []
        """Empty where the inner state stands after a discarded round."""
        self._restores_inner = inner_state == RESTORED
        self.versions = [0] * fragments
        """How many outer steps each fragment has had."""
        self.error_feedback = error_feedback
        self.shared_dtype = check_shared_dtype(shared_dtype)
        self.feedbacks: list[ErrorFeedback] = []
        """One for each fragment; none without error feedback."""
        self.delay, self.mix = delay, mix
        self.varies = fragments > 1
        self._parts, self._pattern = fragments, pattern
        self._device, self._pin = backup_device, pin_memory

    def setup(self) -> None:
        """Remember the weights that all start from."""
        self.fragments = list(self.local.split(self._parts, self._pattern))
        self.backups = [
            Backup(
                self.local,
                fragment,
                device=self._device,
                pin_memory=self._pin,
                dtype=self.shared_dtype,
            )
            for fragment in self.fragments
        ]
        self.outer.bind(self.fragments, self.backups)
        if self._restores_inner:
            self.inner_backups = [
                InnerBackup(self.local, f, device=self._device) for f in self.fragments
            ]
        if self.error_feedback:
            self.feedbacks = [feedback_of(self.local, f) for f in self.fragments]
            for at, feedback in enumerate(self.feedbacks):
                self.own[f"residual_{at}"] = feedback.residuals

    @property
    def rests(self) -> bool:
        """Unless the next round opens where the last one closes, between any two."""
        return self.delay < -(-self.sync_every // self._parts)

    def due(self) -> bool:
        """`delay` steps before a round must close."""
        return is_slot(self.clock.steps + self.delay, self.sync_every, self._parts)

    def fragment(self) -> Fragment:
        """Of those that are not in flight, the one with the fewest outer steps: so they take turns,
        and one that failed is tried again."""
        index = next_fragment(self.versions, {fragment.index for fragment in self.in_flight})
        assert index is not None, "every fragment is in flight"
        return self.fragments[index]

    def of(self, index: int) -> Fragment:
        """One of those that take turns."""
        return self.fragments[index]

    def take_backup(self) -> None:
        """The weights and the inner state as they are now are what all go back to."""
        for backup in self.backups:
            backup.take()
        for inner in self.inner_backups:
            inner.take()

    def compared(self) -> dict[str, str]:
        """Also the outer optimizer, and how the model is cut."""
        cut = {"fragments": f"{self._parts} {self._pattern}"} if self._parts > 1 else {}
        return {**super().compared(), "outer optimizer": self.outer.described(), **cut}

    def settle_in(self) -> None:
        """Start from the global weights, not from the donor's local ones."""
        for backup in self.backups:
            backup.restore()
        for inner in self.inner_backups:
            inner.take()

    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], Draft]:
        """The delta, and what the codec has lost of earlier ones."""
        delta = self.local.delta(fragment, self.backups[fragment.index].flats)
        if not self.error_feedback:
            return delta, None
        return delta, self.feedbacks[fragment.index].draft(delta)

    def named(self, fragment: Fragment, received: list[Tensor], draft: Draft) -> dict[str, Tensor]:
        """The averaged tensors by the names of their parameters."""
        return self.local.named_views(fragment, received)

    def apply(self, fragment: Fragment, received: list[Tensor]) -> list[Tensor]:
        """Take the outer step with the averaged pseudo-gradient."""
        self.outer.step(fragment, received)
        self.versions[fragment.index] += 1
        return self.backups[fragment.index].flats

    def apply_locally(self, fragment: Fragment, update: list[Tensor], draft: Draft) -> None:
        """Go on from the new global weights, or from a mixture."""
        if draft is not None:
            self.feedbacks[fragment.index].commit(draft)
        for inner in self.inner_backups[fragment.index : fragment.index + 1]:
            inner.take()
        if not self.mix:
            if not self.outer.leaves_news:
                self.local.set_weights(fragment, update)
            return
        mine = self.local.weights(fragment)
        values = [mixed(new.to(w.device), w, self.mix) for new, w in zip(update, mine, strict=True)]
        self.local.set_weights(fragment, values)
        self.local.release(mine, reusable=True)

    def go_on_after(self, rounds: int) -> None:
        """So many rounds were committed before, the fragments in turn."""
        parts = len(self.fragments)
        self.versions = [(rounds + parts - 1 - index) // parts for index in range(parts)]

    def discard(self, fragment: Fragment, draft: Draft) -> None:
        """Go back to the last synchronisation. Where this fragment is not finite all others go back
        as well: whichever has NaN would spread it again by the next forward pass."""
        broken = broken_rows(self.local, fragment) if len(self.fragments) > 1 else []
        self._go_back(fragment)
        for other in self.fragments:
            if broken and other.index != fragment.index:
                self._go_back(other, broken)

    def _go_back(self, fragment: Fragment, rows: list[int] | None = None) -> None:
        self.backups[fragment.index].restore(rows)
        for inner in self.inner_backups[fragment.index : fragment.index + 1]:
            inner.restore(rows)

    def own_state_dict(self) -> dict[str, Any]:
        """The inner state to go back to, if it does."""
        inner = [inner.state_dict() for inner in self.inner_backups]
        return {**super().own_state_dict(), "inner": inner}

    def load_own_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that `own_state_dict` returned."""
        super().load_own_state_dict(state)
        for inner, saved in zip(self.inner_backups, state["inner"], strict=True):
            inner.load_state_dict(saved)

    def fragment_state(self, fragment: Fragment) -> dict[str, Any]:
        """All that groups share of one fragment, and the clocks that all fragments share."""
        return {
            "outer_optimizer": self.outer.state_dict(fragment),
            "original_parameters": self.backups[fragment.index].views(),
            "version": self.versions[fragment.index],
            "inner_steps": self.clock.agreed,
        }

    def load_fragment_state(self, fragment: Fragment, state: dict[str, Any]) -> None:
        """Take over a donor's; the weights follow when the round has opened."""
        self.forget_own()
        self.backups[fragment.index].load(state["original_parameters"])
        self.outer.load_state_dict(fragment, state["outer_optimizer"])
        self.versions[fragment.index] = state["version"]
        self.clock.steps = state["inner_steps"]
        self.has_healed = True

    def state_dict(self) -> dict[str, Any]:
        """The shared state of every fragment, as plain data."""
        return {str(f.index): self.fragment_state(f) for f in self.fragments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the shared state into every fragment."""
        for fragment in self.fragments:
            self.load_fragment_state(fragment, state[str(fragment.index)])


def check_schedule(
    sync_every: int,
    fragments: int,
    delay: int,
    mix: float,
    *,
    called: tuple[str, str] = ("delay", "mix"),
) -> None:
    """Refuse a schedule that does not fit the fragments, and say what would. A front has the last
    two arguments `called` otherwise.

    Raises:
        SettingsError: also a ValueError.
    """
    for name, value in (
        ("sync_every", sync_every),
        ("fragments", fragments),
        (called[0], delay),
    ):
        check_integer(name, value)
    if fragments < 1:
        raise SettingsError("there is no fragment to synchronise")
    if sync_every < fragments:
        raise SettingsError(
            f"sync_every={sync_every} is less than the {fragments} fragments, one of which "
            f"synchronises at a time: use {fragments} or more"
        )
    if not 0 <= delay <= sync_every:
        raise SettingsError(
            f"{called[0]}={delay} does not fit between two synchronisations of a fragment, "
            f"which are {sync_every} inner steps apart: use 0 to {sync_every}"
        )
    check_number(called[1], mix, least=0, most=1)
