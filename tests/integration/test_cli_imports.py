"""What the commands import, and when: in new processes, which have imported nothing yet."""

from __future__ import annotations

import subprocess
import sys


def printed(script: str) -> str:
    """What a new interpreter prints that runs `script`."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_launcher_imports_no_torch() -> None:
    heavy = "import sys, torchft.cli.main, torchft.demo.group_demo; print('torch' in sys.modules)"
    assert printed(heavy) == "False\n"


def test_a_mistake_is_told_before_torch_is_imported() -> None:
    script = (
        "import sys, torchft.cli.main as m; "
        "code = m.main(['simulate', '--set', 'nodess=1']); print(code, 'torch' in sys.modules)"
    )
    assert printed(script) == "2 False\n"
