"""`diloco` that ends with its launcher: `python -m torchft.cli.diloco_agent <its arguments>`.

When the launcher dies, however it dies, the kernel sends this process a SIGTERM; a worker passes it
on to its training script. So a killed launcher leaves nothing behind. Linux only; elsewhere this is
plain `diloco`.
"""

from __future__ import annotations

import sys

from torchft.cli.diloco import main
from torchft.launch.agent import end_with_parent

if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
