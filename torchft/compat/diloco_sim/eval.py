"""`diloco_sim.eval`."""

from torchft.simulator.diloco_simulator import EvalStats

__all__ = ["EvalStats"]
