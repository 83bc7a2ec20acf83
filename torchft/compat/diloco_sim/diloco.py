"""`diloco_sim.diloco`."""

from torchft.simulator.diloco_simulator import DilocoSimulator, TrainStats

__all__ = ["DilocoSimulator", "TrainStats"]
