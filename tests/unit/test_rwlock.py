"""The readers-writer lock that keeps checkpoints from reading half an optimizer step."""

from __future__ import annotations

import threading

import pytest

from torchft.checkpointing._rwlock import RWLock


def test_readers_share() -> None:
    lock = RWLock(timeout=0)
    with lock.r_lock(), lock.r_lock():
        assert not lock.w_locked()


def test_a_writer_excludes_readers_and_writers() -> None:
    lock = RWLock(timeout=0)
    with lock.w_lock():
        assert lock.w_locked()
        with pytest.raises(TimeoutError, match=r"could not read.*a writer"):
            lock.r_acquire()
        with pytest.raises(TimeoutError, match=r"could not write.*a writer"):
            lock.w_acquire()
    assert not lock.w_locked()


def test_a_reader_excludes_writers_but_lets_readers_in() -> None:
    lock = RWLock(timeout=0)
    with lock.r_lock():
        with pytest.raises(TimeoutError, match="1 readers"):
            lock.w_acquire()
        lock.r_acquire()
        lock.r_release()
    lock.w_acquire()


def test_a_timeout_given_to_the_call_overrides_the_locks() -> None:
    lock = RWLock()
    lock.w_acquire()
    with pytest.raises(TimeoutError):
        lock.r_acquire(timeout=0)


def test_another_thread_may_release_and_wakes_the_waiting() -> None:
    lock = RWLock(timeout=30)
    lock.w_acquire()
    got = threading.Event()

    def read() -> None:
        with lock.r_lock():
            got.set()

    reader = threading.Thread(target=read)
    reader.start()
    releaser = threading.Thread(target=lock.w_release)
    releaser.start()
    assert got.wait(30)
    reader.join()
    releaser.join()


def test_the_lock_is_free_again_after_an_error_inside() -> None:
    lock = RWLock(timeout=0)
    with pytest.raises(ValueError), lock.w_lock():
        raise ValueError
    lock.r_acquire()


def test_releasing_what_nobody_holds_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        RWLock().r_release()
    with pytest.raises(RuntimeError):
        RWLock().w_release()
