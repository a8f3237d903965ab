"""SIGTERM and Ctrl-C end a run after the step that it is in, with its state saved."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_REQUEST = 1.0  # seconds: a scheduler signals all processes, and launchers pass on to theirs what they get


class StopRequest:
    """Whether the run is to stop: the signal that has come, if one has, and when; or the caller's event.

    Args:
        cancel: asks for it as well, once it is set.
    """

    def __init__(self, cancel: threading.Event | None = None) -> None:
        self.signal_number: int | None = None
        self.time = 0.0
        self._cancel = cancel

    @property
    def asked(self) -> bool:
        return self.signal_number is not None or (self._cancel is not None and self._cancel.is_set())


def leave_stopping_to_the_main_process(worker: int) -> None:
    """In a process that reads images, which a signal to all processes reaches as well, and the step still needs."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_request(cancel: threading.Event | None = None) -> Iterator[StopRequest]:
    """Notes the first signal instead of ending the process; another one, `ONE_REQUEST` later, ends it at once.

    In a thread, where Python lets nobody handle signals, it notes none, and says so if there is no other way to stop.

    Args:
        cancel: another way to ask for it.
    """
    request = StopRequest(cancel)
    before: dict[int, Any] = {}
    if threading.current_thread() is not threading.main_thread():
        if cancel is None:
            print("Training in a thread: SIGTERM and Ctrl-C do not save a checkpoint first.", file=sys.stderr)
        yield request
        return

    def note(signal_number: int, frame: FrameType | None) -> None:
        if request.signal_number is None:
            request.signal_number, request.time = signal_number, time.monotonic()
            name = signal.Signals(signal_number).name
            # print would raise where the signal came in the middle of another one
            os.write(2, f"\n{name}: stops after this step; once more stops at once.\n".encode())
        elif time.monotonic() - request.time >= ONE_REQUEST:
            signal.signal(signal_number, before[signal_number])
            signal.raise_signal(signal_number)

    for number in SIGNALS:
        before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])
