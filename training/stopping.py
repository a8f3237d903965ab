"""SIGTERM and Ctrl-C end a run after the step that it is in, with its state saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop, and did. The message says how to go on.

    Args:
        message: for the user.
        signal_number: what asked for it; the process ends with exit code 128 plus this, as shells have it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class StopRequest:
    """The signal that has come, if one has."""

    signal_number: int | None = None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Notes the first signal instead of ending the process; a second one ends it at once."""
    request, before = StopRequest(), {}

    def note(signal_number: int, frame: FrameType | None) -> None:
        request.signal_number = signal_number
        print(f"\n{signal.Signals(signal_number).name}: stops after this step; once more stops at once.", flush=True)
        for number in SIGNALS:
            signal.signal(number, before[number])

    for number in SIGNALS:
        before[number] = signal.signal(number, note)
    try:
        yield request
    finally:
        for number in SIGNALS:
            signal.signal(number, before[number])
