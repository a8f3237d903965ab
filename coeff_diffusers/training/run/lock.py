"""One run at a time writes into an output folder.

.run.lock    locked by the system for the run's main process, and unlocked when that ends, however it does
.run.json    which process that is, for the message to another one
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from ..errors import InputError
from ..writing import write_text

LOCK, OWNER = ".run.lock", ".run.json"

_held: dict[Path, OutputLock] = {}  # by runs of this process
_guard = threading.RLock()


class OutputLock:
    """A run's hold on its output folder. All processes of a launch are one run, whose main process has the lock.

    A run of this process that was given up is no obstacle: it has ended when its thread starts another one, or is
    gone, or when nobody has the run any more.

    Args:
        folder: the output folder.
        subjects: names of the folders in it that are of the run as well.
    """

    def __init__(self, folder: str | Path, subjects: Sequence[str] = ()) -> None:
        self.folder, self.subjects = Path(folder).resolve(), list(subjects)
        self._file = FileLock(self.folder / LOCK, thread_local=False)  # a run may go on in another thread
        self._ended = False

    def take(self) -> None:
        """Takes the folder, unless this run has it.

        Raises:
            InputError: if another run has it, or has taken it from this one.
        """
        with _guard:
            if self._ended:
                raise InputError(f"--output_dir: another run was started into {self.folder}, which ended this one")
            self._process, self._thread = os.getpid(), threading.current_thread()
            if _held.get(self.folder) is self:
                return
            self._end_given_up()
            if not self._lock():
                raise _in_use(self.folder)
            _held[self.folder] = self
            try:
                for folder in self._related():
                    if _is_locked(folder):
                        raise _in_use(folder)
                owner = {"process": os.getpid(), "host": socket.gethostname(), "subjects": self.subjects}
                since = datetime.now().astimezone().isoformat(" ", "seconds")
                write_text(json.dumps(owner | {"since": since}) + "\n", self.folder / OWNER)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Lets go of the folder, if this run has it."""
        with _guard:
            if _held.get(self.folder) is self and self._process == os.getpid():  # and this is no fork of that one
                del _held[self.folder]
                with suppress(OSError):
                    (self.folder / OWNER).unlink(missing_ok=True)
                self._file.release()

    def _lock(self) -> bool:
        """Whether the folder is this run's now."""
        try:
            try:
                self._file.acquire(blocking=False)
            except Timeout:
                if self.folder not in _held:
                    return False
                gc.collect()  # of this process, and maybe nobody has it any more
                self._file.acquire(blocking=False)
        except Timeout:
            return False
        except PermissionError as error:
            raise InputError(f"--output_dir: {self.folder} cannot be locked: {error}") from error
        except (OSError, NotImplementedError) as error:  # some disks that machines share have no locks
            print(f"{self.folder} cannot be locked ({error}): nothing keeps another run out of it.", file=sys.stderr)
        return True

    def _related(self) -> list[Path]:
        """Folders that other runs may have, and that are of the same files: of subjects, or with subjects."""
        above = self.folder.parent
        with_this = [above] if self.folder.name in _owner(above).get("subjects", []) else []
        return [*with_this, *(self.folder / name for name in self.subjects)]

    def _end_given_up(self) -> None:
        for folder in (self.folder, *self._related()):
            other = _held.get(folder)
            if other and (other._thread is threading.current_thread() or not other._thread.is_alive()):
                other.release()
                other._ended = True


def take_together(lock: OutputLock | None) -> None:
    """To be called in all processes, with the lock in the main one. Raises InputError in all if it cannot be had."""
    problem: list[str | None] = [None]
    if lock is not None:
        try:
            lock.take()
        except (InputError, OSError) as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0]:
        raise InputError(problem[0])


def remove_empty_folders(folders: Sequence[Path]) -> None:
    """Of what a run has made, innermost first."""
    for folder in folders:
        with suppress(OSError):
            if [path.name for path in folder.iterdir()] == [LOCK]:
                (folder / LOCK).unlink()
            folder.rmdir()


def _is_locked(folder: Path) -> bool:
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK).acquire(blocking=False):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False


def _owner(folder: Path) -> dict[str, Any]:
    """What the last run that has, or had, a folder wrote of itself; nothing if that cannot be read."""
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) and isinstance(owner.get("subjects"), list) else {}


def _in_use(folder: Path) -> InputError:
    owner = _owner(folder)
    text = f", process {owner.get('process')} on {owner.get('host')} since {owner.get('since')}" if owner else ""
    return InputError(
        f"--output_dir: {folder} is in use by another run{text}: wait until it has ended, end it, or take another "
        "folder"
    )
