"""`diloco_sim.eval`."""

from torchft.experiments.diloco_simulator import EvalStats

__all__ = ["EvalStats"]
