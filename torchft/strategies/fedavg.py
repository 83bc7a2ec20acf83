"""Train alone for H inner steps, then average the weights among all or within random islands.

    w ← mean over the island of w       after every H-th inner step; islands are drawn anew

Four nodes in islands of two: the draw says {0, 3} and {1, 2}, so 0 and 3 go on from their mean and
1 and 2 from theirs; next time it is others, and what one island learned spreads. With one island
this is LocalSGD, with H = 1 and one island data parallelism by weights.
(McMahan et al., arXiv 1602.05629.)

The paper weighs each node by its samples, `weighting="samples"`; EXO Gym's code takes the plain
mean, "equal". None is the paper's where each node brings data of its own, and no codec has to carry
how many; of one data set that is dealt out, all nodes have as many.

Among all, a discarded round brings the last average back. Within islands nothing is common to all:
after one the weights stand, and a node that heals goes on from its donor's.
"""

from __future__ import annotations

from typing import Any

import torch

from torchft.arguments import check_integer
from torchft.renamed import renamed_arguments
from torchft.strategies.local_sgd import LocalSGDRecipe
from torchft.strategies.parts.agreed import generator
from torchft.strategies.parts.precision import SharedDtype
from torchft.strategies.recipe import By

__all__ = ["FedAvgRecipe"]


class FedAvgRecipe(LocalSGDRecipe):
    """Islands of `island_size` nodes (the last may be smaller); None is one island of all."""

    @renamed_arguments(every="sync_every")
    def __init__(
        self,
        sync_every: int,
        *,
        island_size: int | None = None,
        seed: int = 0,
        weighting: str | None = None,
        shared_dtype: SharedDtype = torch.float32,
        backup_device: torch.device | str | None = "cpu",
    ) -> None:
        if island_size is not None:
            check_integer("island_size", island_size, least=1)
        super().__init__(
            sync_every,
            backup=island_size is None,
            weighting=weighting,
            shared_dtype=shared_dtype,
            backup_device=backup_device,
        )
        self.by = By.AVERAGE if island_size is None else By.ISLANDS
        self.island_size, self.seed = island_size, seed

    def islands(self, participants: int) -> list[list[int]]:
        """Drawn by the seed and the clock, so all nodes draw alike."""
        size = self.island_size or participants
        drawn = generator(self.seed, self.clock.steps)
        order = torch.randperm(participants, generator=drawn, device="cpu").tolist()
        return [sorted(order[i : i + size]) for i in range(0, participants, size)]

    def state_dict(self) -> dict[str, Any]:
        """Within islands nothing is shared but the clock."""
        return super().state_dict() if self.backup else {"inner_steps": self.clock.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a donor's last average, or only the clock."""
        if self.backup:
            super().load_state_dict(state)
        else:
            self.clock.steps = state["inner_steps"]
