"""A replica group of one process that any generation of torchft can run: the script of the tests in
which PyTorch's own meets ours. It imports nothing of this repository's tests.

    python any_torchft.py LIGHTHOUSE NAME STEPS MIN_REPLICA_SIZE [STOP]

Prints a JSON object a line: one for each step tried, `{"step": 3, "committed": true, "with": 2}`,
and at the end `{"ended": "done", "digest": "…"}` or the error that ended it. It ends at step
`STEPS`, or after the first step at which the file `STOP` exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore

from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo

TIMEOUT = timedelta(seconds=float(os.environ.get("GROUP_TIMEOUT_S", "10")))
QUORUM_TIMEOUT = timedelta(seconds=60)
TRIES = 40
"""It ends after so many discarded steps."""


def tell(**news: Any) -> None:
    print(json.dumps(news), flush=True)


def main(lighthouse: str, name: str, steps: str, min_replica_size: str, stop: str = "") -> None:
    torch.manual_seed(len(name))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    net = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    inner = torch.optim.SGD(net.parameters(), lr=0.01)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=TIMEOUT),
        load_state_dict=lambda state: (
            net.load_state_dict(state["net"]),
            inner.load_state_dict(state["inner"]),
        ),
        state_dict=lambda: {"net": net.state_dict(), "inner": inner.state_dict()},
        min_replica_size=int(min_replica_size),
        use_async_quorum=False,
        timeout=TIMEOUT,
        quorum_timeout=QUORUM_TIMEOUT,
        connect_timeout=QUORUM_TIMEOUT,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=name,
        hostname="127.0.0.1",
    )
    model = DistributedDataParallel(manager, net)
    optimizer = Optimizer(manager, inner)
    tell(started=name)
    discarded = 0
    try:
        while (
            manager.current_step() < int(steps) and discarded < TRIES and not os.path.exists(stop)
        ):
            before = manager.current_step()
            optimizer.zero_grad()
            model(torch.randn(4, 7)).square().mean().backward()
            optimizer.step()
            now = manager.current_step()
            committed = now > before
            discarded += not committed
            tell(step=now, committed=committed, **{"with": manager.num_participants()})
    except BaseException as error:
        tell(ended=type(error).__name__, why=str(error))
    else:
        digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in net.parameters()))
        tell(ended="done", discarded=discarded, digest=digest.hexdigest()[:16])
    manager.shutdown(wait=False)
    sys.stdout.flush()
    os._exit(0)  # whatever threads an older one leaves behind


if __name__ == "__main__":
    main(*sys.argv[1:])
