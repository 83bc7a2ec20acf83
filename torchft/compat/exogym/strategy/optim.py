"""`exogym.strategy.optim`."""

from torchft.strategies import OptimSpec, ensure_optim_spec

__all__ = ["OptimSpec", "ensure_optim_spec"]
