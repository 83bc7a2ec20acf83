"""Process groups whose members come and go.

base        what every one of them can be asked
generation  one set of members, from its making to its end; sockets and reaper end it
rendezvous  how members find each other, at a store (`stores`), before a deadline (`attempt`)
wrapper     passes on to another group, or to today's generation
gloo        over TCP
accelerator on devices: NCCL, XCCL, by what `backends` makes; `control` ends it, `watchdog` times it
dummy       of one member
faults      swallows faults, or makes them on purpose
managed     the manager as a process group
baby        in a child process, whatever the kind; child_process starts and watches it,
            shared_memory has the tensors, child is what runs in it
"""

from torchft.process_group.accelerator import ProcessGroupNCCL, ProcessGroupXCCL
from torchft.process_group.baby import (
    ProcessGroupBaby,
    ProcessGroupBabyGloo,
    ProcessGroupBabyNCCL,
    ProcessGroupBabyXCCL,
)
from torchft.process_group.base import ProcessGroup
from torchft.process_group.dummy import ProcessGroupDummy
from torchft.process_group.faults import (
    ErrorSwallowingProcessGroupWrapper,
    FakeProcessGroupWrapper,
)
from torchft.process_group.generation import Generation
from torchft.process_group.gloo import ProcessGroupGloo
from torchft.process_group.managed import ManagedProcessGroup
from torchft.process_group.stores import create_store_client
from torchft.process_group.wrapper import ProcessGroupWrapper

__all__ = [
    "ErrorSwallowingProcessGroupWrapper",
    "FakeProcessGroupWrapper",
    "Generation",
    "ManagedProcessGroup",
    "ProcessGroup",
    "ProcessGroupBaby",
    "ProcessGroupBabyGloo",
    "ProcessGroupBabyNCCL",
    "ProcessGroupBabyXCCL",
    "ProcessGroupDummy",
    "ProcessGroupGloo",
    "ProcessGroupNCCL",
    "ProcessGroupWrapper",
    "ProcessGroupXCCL",
    "create_store_client",
]
