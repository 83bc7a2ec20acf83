"""What a worker of `torchft demo-server` runs, with torch alone: it starts in a few seconds."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.ps import Net, train

from torchft.digest import digest
from torchft.parameter_server import DiLoCoWorker


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-shards", type=int)
    parser.add_argument("--shard-index", type=int)
    for name in ("--output-dir", "--end-file"):
        parser.add_argument(name, type=Path)
    typed = parser.parse_args()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with (
        DiLoCoWorker(model, optimizer) as worker,
        (typed.output_dir / "log.jsonl").open("a") as log,
    ):
        while not (typed.end_file.exists() and worker.version >= int(typed.end_file.read_text())):
            train(model, optimizer, typed.shard_index * 1_000_000 + worker.local_step, 1)
            line = {"step": worker.local_step, "at": time.monotonic(), "loss": 1.0}
            log.write(json.dumps({**line, **worker.metrics()}) + "\n")
            log.flush()
            time.sleep(0.02)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    result = {"held_out_before": 1.0, "held_out_after": 1.0, "digest": digest(trained)}
    (typed.output_dir / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
