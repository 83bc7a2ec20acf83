"""`diloco_sim.diloco`."""

from torchft.experiments.diloco_simulator import DilocoSimulator, TrainStats

__all__ = ["DilocoSimulator", "TrainStats"]
