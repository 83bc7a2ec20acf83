"""The torchx component `hsdp`: one torchrun role for each replica group.

    torchx run -s local_cwd torchft/torchx.py:hsdp --replicas 2 --script train_diloco.py

Groups find each other through a lighthouse that runs already; TORCHFT_LIGHTHOUSE says where.

torchx's schedulers treat all roles as one job: its local one ends every group when one is gone for
good, and Slurm and Kubernetes restart all. For groups that may come and go on a cluster, submit
one job a group. Within a job, torchrun restarts the workers of a group that failed, `max_restarts`
times, whatever the reason. A wrong setting or a lighthouse that is not there would be met again
each time: the examples then ask their torchrun to end at once (`torchft.script`), and
scripts of your own may do the same, or be run with `--max_restarts 0`.
"""

# torchx parses a component's annotations, not postponed and in no newer form than Optional[Dict].
# ruff: noqa: UP006, UP035, UP045

import sys
from pathlib import Path
from typing import Dict, Optional

import torchx.specs as specs  # type: ignore[import-untyped]

from torchft import settings
from torchft.arguments import check_integer

__all__ = ["hsdp"]

LIGHTHOUSE = "http://localhost:29510"
"""Where a lighthouse listens that was started without `--bind`, on this machine."""

FIRST_PORT = 29600
"""`--master_port` of the first group; the others count on from it."""


def hsdp(
    *script_args: str,
    replicas: int = 2,
    workers_per_replica: int = 1,
    max_restarts: int = 10,
    script: str = "train_ddp.py",
    env: Optional[Dict[str, str]] = None,
    image: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 1024,
) -> specs.AppDef:
    """Replica groups that train one script together.

    Args:
        script_args: handed to the script
        replicas: how many replica groups
        workers_per_replica: ranks in each group
        max_restarts: how often torchrun restarts the workers of a group
        script: what each rank runs
        env: variables for the workers, such as A=1,B=2
        image: the container image or folder; empty for the current folder
        h: a named resource, instead of the next three
        cpu: cores for each group
        gpu: devices for each group
        memMB: memory for each group, in MB
    """
    check_integer("replicas", replicas, least=1)
    check_integer("workers_per_replica", workers_per_replica, least=1)
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    lighthouse = settings.text(settings.LIGHTHOUSE, LIGHTHOUSE)
    assert lighthouse is not None
    roles = [
        specs.Role(
            name=f"replica_{number}",
            image=image,
            entrypoint=torchrun(image),
            args=[
                f"--master_port={FIRST_PORT + number}",
                "--nnodes=1",
                f"--nproc_per_node={workers_per_replica}",
                f"--max_restarts={max_restarts}",
                script,
                *script_args,
            ],
            env={
                "OMP_NUM_THREADS": str(max(1, cpu // workers_per_replica)),
                "TORCHFT_LIGHTHOUSE": lighthouse,
                **(env or {}),
                "REPLICA_GROUP_ID": str(number),
                "NUM_REPLICA_GROUPS": str(replicas),
            },
            num_replicas=1,
            resource=resource,
        )
        for number in range(replicas)
    ]
    return specs.AppDef(name="torchft", roles=roles)


def torchrun(image: str) -> str:
    """Without an image, that of this Python: our PATH may not reach the role."""
    here = Path(sys.executable).with_name("torchrun")
    return str(here) if not image and here.exists() else "torchrun"
