"""Notices SIGTERM, by which clusters announce that they take a machine away, so that a run can end well."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


__all__ = ["EXIT_PREEMPTED", "Preempted", "watch_sigterm"]

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: the same command may well succeed later


class Preempted(SystemExit):
    """A run that was asked to stop and left a checkpoint; uncaught, the process exits with `EXIT_PREEMPTED`."""

    def __init__(self):
        super().__init__(EXIT_PREEMPTED)


@contextmanager
def watch_sigterm() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets instead of ending the process; outside the main thread, nothing sets it."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
