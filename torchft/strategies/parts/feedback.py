"""The residuals of a fragment, for recipes that feed back what their codec loses.

They lie beside the parameters, one row for each node: a recipe keeps them in `own`.
"""

from __future__ import annotations

from torchft.quantization import ErrorFeedback
from torchft.strategies.local import Fragment, Local

__all__ = ["feedback_of"]


def feedback_of(local: Local, fragment: Fragment) -> ErrorFeedback:
    """Nothing is left over yet, of any node."""
    weights = local.weights(fragment)
    feedback = ErrorFeedback(weights)
    local.release(weights, reusable=True)
    return feedback
