"""An optimizer whose step is a transaction: it is taken only when the group's ranks commit it.

    optimizer = Optimizer(manager, torch.optim.AdamW(model.parameters()))
    optimizer.zero_grad()        # begins: the quorum forms while the forward pass runs
    loss.backward()              # DistributedDataParallel averages the gradients
    optimizer.step()             # votes; steps, or skips this batch

A `torch.amp.GradScaler` steps it as any optimizer: see `torchft.grad_scaler`.

Everything else is the wrapped optimizer's own: groups, state, state dict, and hooks, which run
around the steps that are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchft.errors import ClosureError
from torchft.grad_scaler import FollowedScaler, Found, unscale, warn_of_stranger
from torchft.ledger import Bucket
from torchft.manager.optimizer_state import optimizer_state
from torchft.step_hooks import check_no_closure, check_optimizer
from torchft.uncopied import Uncopied
from torchft.untraced import untraced

if TYPE_CHECKING:
    from torch.amp import GradScaler

    from torchft.manager import Manager
    from torchft.manager.step import Step

__all__ = ["OptimizerWrapper"]


class OptimizerWrapper(Uncopied, Optimizer):
    """`optim`, with a quorum before each step and a vote in it.

    `scaler` is the GradScaler that will step it, if there is one: its scale then heals, and falls
    in all groups alike. `torch.compile` does not trace into `zero_grad` and `step`; the wrapped
    optimizer's own step may be compiled: `optim.step = torch.compile(optim.step)`.

    Raises:
        SettingsError: `optim` is no optimizer.
        ClosureError: it computes the loss in its step, as LBFGS does.
    """

    copy_instead = (
        "save its state_dict(), or copy the optimizer that it wraps (.optim) and wrap the copy"
    )
    kind = "optimizer"
    _step_supports_amp_scaling = True
    """GradScaler calls `step` also when it has found an infinity, so that this group votes."""

    # Optimizer.__init__ is not called: it would make groups, state and hooks beside the inner ones.
    def __init__(
        self, manager: Manager, optim: Optimizer, *, scaler: GradScaler | None = None
    ) -> None:
        check_optimizer("optim", optim)
        check_no_closure(type(optim))
        self.manager = manager
        self.optim = optim
        self._scaler = None if scaler is None else FollowedScaler(manager, scaler)
        self._warned = False
        self._stepped: Step | None = manager.steps.voted
        """The step whose vote this optimizer has followed last."""
        manager.starting_state.add(self)

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step, then clear the gradients.

        A step in which nothing was averaged yet goes on: a forward pass or another optimizer has
        begun it, or its batch was skipped.

        Raises:
            TimeoutError, QuorumError: see `Manager.start_quorum`.
        """
        if self._scaler is not None:
            self._scaler.begin()
        if self.manager.steps.needs_new:
            self.manager.start_quorum()
        self.optim.zero_grad(set_to_none)

    @untraced
    def step(self, closure: Callable[[], float] | None = None) -> bool:  # type: ignore[override]
        """Vote, and step when the vote is yes. Returns whether the step was taken.

        Of several optimizers that take part in one step the first one votes, and the others follow.

        Raises:
            ClosureError: a closure was given. It would compute gradients after the vote.
            SettingsError: a parameter has a gradient, and is in no model that was wrapped.
        """
        if closure is not None:
            raise ClosureError(
                "a step that is voted on cannot compute the loss in a closure, whose gradients "
                "nobody would average: call backward() before, and step() without it"
            )
        step = self.manager.steps.begun("step")
        self.manager.listeners.refuse_unaveraged(self.optim.param_groups, step)
        found = Found(self)
        if found.by_scaler and self._scaler is None and not self._warned:
            self._warned = True
            warn_of_stranger()
        follows = self._voted_by_another()
        committed = self._commits(found) if follows is None else self._follow(follows, found)
        self._stepped = self.manager.steps.voted
        if not committed:
            return False
        with self.manager.ledger.spending(Bucket.OPTIMIZER):
            if found.scale is not None:
                unscale(self.optim, found.scale)
            self.optim.step()
        return True

    def _commits(self, found: Found) -> bool:
        """The vote, after which the scale may be another one: that of the donor it healed from."""
        if found.infinity and self.manager.errored() is None:
            self.manager.report_error(found.error())
        if self._scaler is None or not found.by_scaler:
            return self.manager.should_commit()
        before = self._scaler.scale
        committed = self.manager.should_commit()
        self._scaler.voted(committed)
        if self._scaler.scale == before:
            return committed
        if found.scale is not None:
            found.scale *= self._scaler.scale / before
        elif committed:  # unscaled with the old one, and clipped perhaps
            self.manager.fall_behind()
            return False
        return committed

    def _voted_by_another(self) -> bool | None:
        """How the step ended that another optimizer has voted on and this one has not followed
        yet; None where this one is to vote."""
        voted = self.manager.steps.voted
        return None if voted is None or voted is self._stepped else voted.committed

    def _follow(self, committed: bool, found: Found) -> bool:
        if self._scaler is not None and found.by_scaler:
            self._scaler.voted(committed)
        return committed and not found.infinity

    def equal_state(self) -> dict[str, Any]:
        """What is compared with groups that start at the same step: state and options of the
        parameters whose gradients are averaged."""
        return dict(optimizer_state(self.optim, self.manager.listeners.names()))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the wrapped optimizer."""
        self.optim.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state dict of the wrapped optimizer."""
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict into the wrapped optimizer."""
        self.optim.load_state_dict(state_dict)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups of the wrapped optimizer."""
        return self.optim.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The per-parameter state of the wrapped optimizer."""
        return self.optim.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The default settings of the wrapped optimizer."""
        return self.optim.defaults

    def register_step_pre_hook(self, hook: Any) -> RemovableHandle:
        """Runs before each step that is taken, with the wrapped optimizer."""
        return self.optim.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> RemovableHandle:
        """Runs after each step that is taken, with the wrapped optimizer."""
        return self.optim.register_step_post_hook(hook)

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register the hook on the wrapped optimizer."""
        return self.optim.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """Register the hook on the wrapped optimizer."""
        return self.optim.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(
        self, hook: Any, prepend: bool = False
    ) -> RemovableHandle:
        """Register the hook on the wrapped optimizer."""
        return self.optim.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: Any, prepend: bool = False
    ) -> RemovableHandle:
        """Register the hook on the wrapped optimizer."""
        return self.optim.register_load_state_dict_post_hook(hook, prepend)

    def __repr__(self) -> str:
        return f"OptimizerWrapper({self.optim!r})"
