"""torchrun that ends with its launcher: `python -m torchft.launch.agent <arguments of torchrun>`.

The launcher starts its replica groups through this module instead of `torch.distributed.run`. The
only difference: when the launcher dies, however it dies, the kernel sends this agent a SIGTERM, and
the agent then stops its workers. So a killed launcher leaves nothing behind. Linux only; elsewhere
this is plain torchrun.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

__all__ = ["end_with_parent", "main"]

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>: the signal that a process gets when its parent ends."""


def main(argv: list[str] | None = None) -> None:
    """Run torchrun with `argv`, or with the command line."""
    end_with_parent()
    from torch.distributed.run import main as torchrun  # 3 s of imports: only now

    torchrun(argv)


def end_with_parent() -> None:
    """Ask the kernel for a SIGTERM at the parent's end. Exits at once if that already happened."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended between the two lines above
        sys.exit("the launcher is gone")


if __name__ == "__main__":
    main()
