"""DiLoCo in one screen: groups train alone for 20 steps, then agree on an outer step.

torchft_lighthouse --min_replicas 1 &
export TORCHFT_LIGHTHOUSE=http://localhost:29510
torchrun --nproc_per_node=1 --master_port=29600 examples/minimal_diloco.py # in two shells, with
torchrun --nproc_per_node=1 --master_port=29601 examples/minimal_diloco.py # a port for each
"""

import os

import torch
from torch import nn
from torch.nn.functional import mse_loss

from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo

ROUNDS = int(os.environ.get("ROUNDS", "50"))


def main() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)

    # The shared weights and the outer optimizer heal by themselves; give more state if you have it.
    manager = Manager(ProcessGroupGloo(), None, None, min_replica_size=1, use_async_quorum=False)
    with DiLoCo(manager, [model], inner, outer, sync_every=20):
        while manager.current_step() < ROUNDS:
            inputs = torch.randn(32, 16)
            inner.zero_grad()
            loss = mse_loss(model(inputs), inputs.sum(1, keepdim=True))
            loss.backward()
            inner.step()  # every 20th also averages what the groups have moved
    print(f"round {manager.current_step()}: loss {loss.item():.4f}")
    manager.shutdown()


if __name__ == "__main__":
    main()
