"""What a worker of `torchft demo-server` runs: a byte-level model on its shard of the corpus.

It needs torch alone. Its log is a line of JSON a step, which the demo reads; its result is written
at the end. It ends at the outer step that the end file holds, once that file is there, so that all
workers end with the same weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from torchft.digest import digest
from torchft.parameter_server import DiLoCoWorker
from torchft.toy.byte_model import ByteTransformer, held_out_loss, next_byte_loss
from torchft.toy.corpus import ByteCorpus, Order

__all__ = ["main"]


def main() -> None:
    """Train until the end file says so; server and settings are those of the environment."""
    typed = _parser().parse_args()
    torch.manual_seed(0)
    model, corpus = ByteTransformer(), ByteCorpus.load()
    context = model.shape.context
    order = Order(windows=corpus.windows(context), shards=typed.num_shards, rows=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = held_out_loss(model, corpus)
    typed.output_dir.mkdir(parents=True, exist_ok=True)
    with (
        DiLoCoWorker(model, optimizer) as worker,
        (typed.output_dir / "log.jsonl").open("a") as log,
    ):
        while not _is_over(typed.end_file, worker.version):
            starts = order.batch(worker.local_step, shard=typed.shard_index)
            optimizer.zero_grad()
            loss = next_byte_loss(model, *corpus.batch(starts, context=context))
            loss.backward()
            optimizer.step()
            line = {"step": worker.local_step, "at": time.monotonic(), "loss": loss.item()}
            log.write(json.dumps({**line, **worker.metrics()}) + "\n")
            log.flush()
    after = held_out_loss(model, corpus)
    trained = {name: p.detach() for name, p in model.named_parameters()}
    result = {"held_out_before": before, "held_out_after": after, "digest": digest(trained)}
    (typed.output_dir / "result.json").write_text(json.dumps(result))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-shards", type=int, default=1)
    parser.add_argument("--shard-index", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--end-file", type=Path, required=True)
    return parser


def _is_over(end_file: Path, version: int) -> bool:
    """The file may be there before its number is."""
    return end_file.exists() and version >= int(end_file.read_text() or version + 1)


if __name__ == "__main__":
    main()
