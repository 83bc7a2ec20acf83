"""The context in which steps of an inner optimizer drive a strategy; LocalSGD and DiLoCo are made
of it.

While the inner optimizer steps, nobody may read the parameters; after it the recipe may be due.
Entering meets the other groups, so that all start from the same weights. Training outside of the
context is an error, and so is training whose steps are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch.optim import Optimizer

from torchft.errors import PhaseError
from torchft.ledger import Bucket
from torchft.manager.peers import ManagedPeers
from torchft.quantization import Codec, codec_for
from torchft.quantization.proof import prove
from torchft.step_hooks import StepHooks, check_trains
from torchft.strategies.buffers import LEFT
from torchft.strategies.model_local import ModelLocal
from torchft.strategies.parts.precision import shared_dtype_of
from torchft.strategies.recipe import Recipe
from torchft.strategies.strategy import Strategy
from torchft.strategies.trained import TrainedModel
from torchft.uncopied import Uncopied

if TYPE_CHECKING:
    from torchft.manager import Manager

__all__ = ["StrategyHooks"]


class StrategyHooks(Uncopied):
    """Runs a strategy of one recipe from the hooks of an inner optimizer, as a context.

    `trained` says before each step whether the parameters are still those that were there at the
    beginning; `frozen_steps` is how long one of them may be frozen. The rest is the recipe's, and
    the peers'.
    """

    copy_instead = "save its state_dict(), and make another one with a manager of its own"

    def __init__(
        self,
        manager: Manager,
        local: ModelLocal,
        recipe: Recipe,
        optimizer: Optimizer,
        trained: TrainedModel,
        *,
        should_quantize: bool | str | Codec,
        bucket_bytes: int | None = None,
        deterministic: bool = False,
        background: bool = False,
        frozen_steps: int | None = None,
    ) -> None:
        check_trains(local.names, local.parameters, optimizer)
        # True means the same wherever the parameters lie on equal devices; groups compare it.
        recipe.codec = codec_for(should_quantize, local.parameters[0].device)
        if recipe.codec is not None:
            for dtype, device in local.layout(local.whole).kinds:
                prove(recipe.codec, shared_dtype_of(dtype, recipe.shared_dtype), device)
        self._manager = manager
        self._trained, self._frozen_steps = trained, frozen_steps
        self._entered = self._restored = self._inside = False
        self._stepping: Any = None
        self._strategy = Strategy([recipe], bucket_bytes=bucket_bytes)
        peers = ManagedPeers(manager, deterministic=deterministic, background=background)
        self._strategy.bind(local, peers, applying=self._applying)
        manager.describe_setting("fragment_sync_delay", str(recipe.delay))
        manager.describe_setting("deterministic", str(deterministic))
        manager.describe_setting("bucket bytes", str(bucket_bytes))
        if recipe.buffers != LEFT:
            manager.describe_model("model buffers", list(local.buffers()[0].items()))
        # From now on, so that training outside of the context is noticed.
        self._hooks = StepHooks(
            optimizer,
            before=self._before_inner_step,
            after=self._after_inner_step,
            abandoned=self._inner_step_ended,
        )
        self._hooks.attach()

    def __enter__(self) -> Self:
        if not self._entered:
            self._first_enter()
            self._entered = True
        self._hooks.attach()
        self._inside = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._inside = False
        self._hooks.detach()
        self._inner_step_ended()
        if kind is None:
            self._hooks.watch.check_any()
            self._strategy.finish()

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
        if self._entered:
            raise PhaseError("training has begun: load a checkpoint before entering the context")
        self._strategy.load_state_dict(state)
        self._restored = True

    def _first_enter(self) -> None:
        if not self._restored:
            self._take_backup()
        # 0 participants: this process has not met the others in a quorum yet.
        if self._manager._init_sync and self._manager.num_participants() == 0:
            self._strategy.join()

    def _take_backup(self) -> None:
        raise NotImplementedError

    def _before_inner_step(self) -> None:
        if not self._inside:
            self._refuse_outside()
            return
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

    @contextmanager
    def _applying(self) -> Iterator[None]:
        """While parameters and state are half written, no donor reads them."""
        with self._manager.ledger.spending(Bucket.OPTIMIZER):
            self._manager.disallow_state_dict_read()
            try:
                yield
            finally:
                self._manager.allow_state_dict_read()
