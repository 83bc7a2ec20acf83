"""`diloco_sim.config`."""

from torchft.simulator.diloco_simulator import DilocoSimulatorConfig

__all__ = ["DilocoSimulatorConfig"]
