"""The command `torchft_lighthouse`. It never imports torch: a lighthouse starts in an instant."""

from __future__ import annotations

import sys

from torchft._torchft import lighthouse_main

__all__ = ["main"]


def main() -> int:
    """Runs a lighthouse until SIGTERM or SIGINT, and returns the exit code."""
    return lighthouse_main(sys.argv)


if __name__ == "__main__":
    sys.exit(main())
