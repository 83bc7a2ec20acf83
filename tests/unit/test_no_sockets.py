"""What conftest.py refuses: each of these tests must fail."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from contextlib import suppress

import pytest

pytestmark = pytest.mark.xfail(strict=True, raises=pytest.fail.Exception)


def test_a_socket_is_bound() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))


def test_a_socket_is_connected_and_the_error_ignored() -> None:
    with socket.socket(socket.AF_UNIX) as one, suppress(OSError):
        one.connect("nobody")


def test_a_command_is_run() -> None:
    subprocess.run([sys.executable, "--version"], check=True, stdout=subprocess.DEVNULL)


def test_a_process_is_forked() -> None:
    if (child := os.fork()) == 0:
        os._exit(0)
    os.waitpid(child, 0)


def test_a_process_is_spawned() -> None:
    process = multiprocessing.get_context("spawn").Process(target=int)
    process.start()
    process.join()
