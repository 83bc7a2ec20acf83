"""Average the gradients of every step: data parallelism.

    g ← mean over the nodes of g        before every inner step

Two nodes with gradients 1 and 3 both step with 2. A no skips the inner step; nothing else changes.
It sends all gradients in every step, and keeps all nodes equal. (Li et al., arXiv 2006.15704.)

With a codec and `error_feedback`, what the codec loses of a gradient is added to the next one, as
in DiLoCo, for 4 bytes a parameter. After a discarded round the gradient is lost, and what was left
over stands.
"""

from __future__ import annotations

from torch import Tensor

from torchft.peers import Place
from torchft.quantization import ErrorFeedback
from torchft.strategies.local import Fragment
from torchft.strategies.parts.feedback import feedback_of
from torchft.strategies.recipe import Recipe

__all__ = ["AllReduceRecipe"]

Draft = list[Tensor] | None
"""With error feedback: what did not arrive of the gradients."""


class AllReduceRecipe(Recipe):
    """The recipe behind `DistributedDataParallel`, which does the same bucket by bucket."""

    place = Place.BEFORE

    def __init__(self, *, error_feedback: bool = False) -> None:
        self.error_feedback = error_feedback
        self.feedback: ErrorFeedback | None = None

    def setup(self) -> None:
        """Make the error-feedback state, if there is to be one."""
        if self.error_feedback:
            self.feedback = feedback_of(self.local, self.local.whole)
            self.own["residual"] = self.feedback.residuals

    def contribution(self, fragment: Fragment) -> tuple[list[Tensor], Draft]:
        """The gradients, and what the codec has lost of earlier ones."""
        grads = self.local.grads(fragment)
        if self.feedback is None:
            return grads, None
        sent = [grad.clone() for grad in grads]  # they may be the gradients themselves
        self.local.release(grads, reusable=True)
        return sent, self.feedback.draft(sent)

    def named(self, fragment: Fragment, received: list[Tensor], draft: Draft) -> dict[str, Tensor]:
        """The averaged tensors by the names of their parameters."""
        return self.local.named_views(fragment, received)

    def apply_locally(self, fragment: Fragment, update: list[Tensor], draft: Draft) -> None:
        """The mean gradients are this node's gradients."""
        if self.feedback is not None and draft is not None:
            self.feedback.commit(draft)
        self.local.set_grads(fragment, update)
