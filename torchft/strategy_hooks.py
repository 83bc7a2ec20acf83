"""The context in which steps of an inner optimizer drive a strategy; LocalSGD and DiLoCo are made
of it.

While the inner optimizer steps, nobody may read the parameters; after it the recipe may be due.
Entering meets the other groups, so that all start from the same weights; if the state cannot be
read by then, the first forward pass does. Training outside of the context is an error, and so is
training whose steps are not seen.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from torchft.errors import PhaseError
from torchft.quantization import Codec, codec_for
from torchft.replicated import Replicated
from torchft.step_hooks import StepHooks
from torchft.strategies.recipe import Recipe
from torchft.strategies.strategy import Strategy
from torchft.untraced import untraced

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["StrategyHooks"]

_log = logging.getLogger("torchft.strategy_hooks")


class StrategyHooks(Replicated):
    """`Replicated` with one recipe, driven by the hooks of an inner optimizer, as a context.

    What heals is the recipe's state; users register the rest. So a checkpoint is of that alone.
    """

    gives_closures = True

    def __init__(
        self,
        manager: Manager,
        modules: Sequence[nn.Module],
        recipe: Recipe,
        optimizer: Optimizer,
        *,
        should_quantize: bool | str | Codec,
        bucket_bytes: int | None = None,
        deterministic: bool = False,
        samples: int | None = None,
    ) -> None:
        # True means the same wherever the parameters lie on equal devices; groups compare it.
        devices = [p.device for m in modules for p in m.parameters() if p.requires_grad]
        recipe.codec = codec_for(should_quantize, devices[0]) if devices else None
        super().__init__(
            manager,
            modules,
            optimizer,
            Strategy([recipe], bucket_bytes=bucket_bytes),
            deterministic=deterministic,
            samples=samples,
        )
        self._guard.end()  # here the optimizer's own steps are those that count
        self._inside = False
        self._waits_for_forward: list[RemovableHandle] = []
        self._stepping: Any = None
        # From now on, so that training outside of the context is noticed.
        self._hooks = StepHooks(
            optimizer,
            before=self._before_inner_step,
            after=self._after_inner_step,
            abandoned=self._inner_step_ended,
        )
        self._hooks.attach()

    def __enter__(self) -> Self:
        error = None if self._joined else self._manager.state.unreadable()
        if error is None:
            self.join()
        else:
            self._join_later(error)
        self._hooks.attach()
        self._inside = True
        return self

    def _join_later(self, error: Exception) -> None:
        """A `state_dict` cannot be read yet, as one that names what `with … as` is about to bind.
        So the others are met before the first forward pass, or else before the first step."""
        said = "%s: %s in a state_dict: the other groups are met when training begins"
        _log.info(said, type(error).__name__, error)

        @untraced
        def join(*_: Any) -> None:
            self._join_now()

        self._waits_for_forward = [
            module.register_forward_pre_hook(join) for module in self._modules
        ]

    def _join_now(self) -> None:
        self._wait_no_longer()
        self.join()

    def _wait_no_longer(self) -> None:
        while self._waits_for_forward:
            self._waits_for_forward.pop().remove()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inside = False
        self._wait_no_longer()
        self._hooks.detach()
        self._inner_step_ended()
        if kind is None:
            self._hooks.watch.check_any()
            self._strategy.finish()

    def zero_grad(self) -> NoReturn:
        """Refuse the calls of a `Replicated`: here the steps of the inner optimizer are counted.

        Raises:
            PhaseError: always; says what to call.
        """
        name = type(self).__name__
        raise PhaseError(
            f"{name} has no zero_grad(), step() or finish() of its own: call those of the inner "
            f"optimizer within `with {name}(…):`, whose end closes the rounds, or use Replicated"
        )

    step = finish = zero_grad

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, beside the model's, the inner optimizer's and the manager's: all that
        groups share, this group's residuals and inner backup, and the clock. Shares storage.

        Raises:
            PhaseError: with a delay, while a round is in flight; leaving the context closes it.
        """
        return self._strategy.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, before the context is entered for the first time.

        Raises:
            PhaseError: it has been entered.
        """
        self._refuse_late_load("entering the context")
        self._strategy.load_state_dict(state)
        self._loaded = True

    def _before_inner_step(self) -> None:
        if not self._inside:
            self._refuse_outside()
            return
        if not self._joined:
            self._join_now()
        self._trained.check(self._frozen_steps)
        self._inner_step_ended()  # a step that raised has not come to its post-hook
        self._stepping = self._applying()
        self._stepping.__enter__()

    def _refuse_outside(self) -> None:
        """Steps without a backward pass are allowed: they make state for a checkpoint to fill."""
        if self._hooks.watch.saw_backward:
            name = type(self).__name__
            raise PhaseError(
                f"this {name} was made and not entered, so nothing would be synchronised: write "
                f"`with {name}(…):` around the training loop"
            )

    def _after_inner_step(self) -> None:
        self._inner_step_ended()
        if self._inside:
            self._strategy.after()

    def _inner_step_ended(self) -> None:
        stepping, self._stepping = self._stepping, None
        if stepping is not None:
            stepping.__exit__(None, None, None)
