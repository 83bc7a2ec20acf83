"""The thread on which process groups die.

Dropping the last reference to a gloo group with a pending operation blocks that thread until the
operation ends. So retired groups come here, and only this thread drops them. Their pending work,
and with it the buffers that it may still write, stay alive exactly as long as the group does.

A group whose reference somebody still holds (a thread inside one of its calls) is kept until that
one is the last but ours. What has not ended when the process ends is left to the operating system:
waiting for it would hold up the exit, and nothing may write into a half-destroyed interpreter.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import sys
import threading

__all__ = ["bury", "leak"]

_EXIT_S = 1.0
"""How long an exit waits for retired groups; with their sockets cut they end in milliseconds."""
_LOOK_S = 0.05
"""How often a group that is still in somebody's hands is looked at."""


def leak(group: object) -> None:
    """Never free `group`: not at exit, nor in a forked child, which has none of its threads."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


class _Reaper:
    def __init__(self) -> None:
        # SimpleQueue.put may be called from a garbage collection that runs inside another put.
        self._inbox: queue.SimpleQueue[list[object]] = queue.SimpleQueue()
        self._started = threading.Lock()
        """Taken once, by whoever starts the thread, and never waited for: a garbage collection that
        buries may run inside that very start."""
        self._thread: threading.Thread | None = None
        self._ended = False

    def bury(self, group: list[object]) -> None:
        if self._ended:
            leak(group.pop())
            return
        self._inbox.put(group)
        if self._started.acquire(blocking=False):
            self._thread = threading.Thread(target=self._run, name="torchft-reaper", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Give the retired a moment, then keep the rest from being freed at all."""
        self._ended = True
        if self._thread is not None:
            self._inbox.put([])
            self._thread.join(_EXIT_S)
        while not self._inbox.empty():
            for group in self._inbox.get():
                leak(group)

    def _run(self) -> None:
        held: list[object] = []
        while True:
            try:
                news = self._inbox.get(timeout=_LOOK_S if held else None)
            except queue.Empty:
                news = None
            if news is not None and not news:  # the process ends
                for group in held:
                    leak(group)
                return
            if news is not None:
                held.extend(news)
                news.clear()  # its giver may still hold the list
            self._drop_unheld(held)

    @staticmethod
    def _drop_unheld(held: list[object]) -> None:
        for index in reversed(range(len(held))):
            # One reference is the list's, one the argument's.
            if sys.getrefcount(held[index]) <= 2:
                del held[index]  # blocks while the group has work pending


_reaper = _Reaper()


def bury(group: list[object]) -> None:
    """Hand over the last reference, as the one element of a list so that no frame keeps another."""
    _reaper.bury(group)


def _forget() -> None:
    """In a forked child neither the thread nor the groups' own threads exist."""
    global _reaper
    while not _reaper._inbox.empty():
        for group in _reaper._inbox.get():
            leak(group)
    _reaper = _Reaper()


atexit.register(lambda: _reaper.end())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
