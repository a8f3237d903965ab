"""What a run says of input that it cannot use, and when it was stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """What the user gave cannot be used. The command line shows the message alone, without a traceback."""


class WriteError(OSError):
    """What was trained could not be written. The message says where it is safe, and how to go on from there."""


class Stopped(Exception):  # noqa: N818
    """The run was asked to stop, and did. The message says how to resume it.

    Args:
        message: for the user.
        signal_number: what asked for it; the process ends with exit code 128 plus this, as shells have it.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def exit_on_errors() -> Iterator[None]:
    """Ends the process with the message of one of these errors alone, and the exit code for it."""
    try:
        yield
    except (InputError, WriteError) as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
