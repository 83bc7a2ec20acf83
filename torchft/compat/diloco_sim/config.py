"""`diloco_sim.config`."""

from torchft.experiments.diloco_simulator import DilocoSimulatorConfig

__all__ = ["DilocoSimulatorConfig"]
