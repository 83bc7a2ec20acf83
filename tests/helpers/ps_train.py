"""A training script of a user: `ps_train.py STEPS SEED`. SIGTERM ends it in good order."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.ps import Net, train

from torchft.parameter_server import DiLoCoWorker


def main(steps: int, seed: int) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    with DiLoCoWorker(model, optimizer):
        for step in range(steps):
            if ended:
                return
            train(model, optimizer, seed * 1_000_000 + step, 1)
            time.sleep(0.02)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
