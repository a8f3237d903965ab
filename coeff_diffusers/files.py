"""Files that are written whole or not at all, names that stay in their folder, and text that stays in its line."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, which does not delete what is open
    fcntl = None  # type: ignore[assignment]

_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])\s*(\..*)?", re.IGNORECASE)  # of Windows


def printable(text: object) -> str:
    r"""`text` in one line: line ends, control characters and halves of surrogate pairs as escapes, `\x1b`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def check_text(text: str, what: str) -> None:
    """Raises ValueError if `text` has a half of a surrogate pair, which no file's header can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} must be text that UTF-8 can write, got {text!r}") from error


def check_file_name(name: str, what: str) -> None:
    """Raises ValueError unless `name` is a file's or folder's name, which stays in its folder on every system."""
    if any(c in "/\\:" or not c.isprintable() for c in name):
        reason = "it has a character that names another folder or none that can be printed"
    elif not name.rstrip(" ."):
        reason = "it names no file"
    elif name[-1] in " .":
        reason = "Windows leaves its last character out"
    elif _DEVICES.fullmatch(name):
        reason = "it is a device on Windows"
    else:
        return
    raise ValueError(f"{what} must be a plain name, which stays in its folder on every system, got {name!r}: {reason}")


def check_subfolder(subfolder: str) -> None:
    """Raises ValueError unless `subfolder`, names with slashes between them, stays in its folder on every system."""
    for name in subfolder.removesuffix("/").split("/") if subfolder else ():
        check_file_name(name, f"each part of subfolder {subfolder!r}")


@contextmanager
def whole_file(path: Path) -> Iterator[str]:
    """A temporary path, whose file takes the place of `path` once the block is through.

    What earlier processes left behind in writing the same file, because they were killed, is removed.

    Raises:
        OSError: if it cannot be written; `path` is named, and is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".coeff-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}-"  # `path.name` itself may be too long
    _remove_left_behind(path.parent, prefix)
    temporary = ""
    try:
        with _temporary_file(path.parent, prefix) as held:
            temporary = str(held.name)
            yield temporary
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            if fcntl is None:  # Windows replaces nothing that is open
                held.close()
            os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and (error.filename is None or prefix in str(error.filename)):
            why = f"cannot be written, and is as it was: {error.strerror or error}"
            raise OSError(error.errno, why, str(path)) from error
        raise


def _temporary_file(folder: Path, prefix: str) -> BinaryIO:
    """A new file, open and locked until its process ends, with the permissions that the process gives its files."""
    while True:
        file: BinaryIO = open(folder / f"{prefix}{secrets.token_hex(4)}.tmp", "xb")  # noqa: SIM115
        if _lock(file) is not False and os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # before it was locked another process took it for one that was left behind


def _remove_left_behind(folder: Path, prefix: str) -> None:
    for file in folder.glob(f"{prefix}*.tmp"):
        with suppress(OSError):
            if fcntl is None:
                file.unlink()
                continue
            with open(file, "r+b") as left:
                if _lock(left):
                    file.unlink()


def _lock(file: IO[bytes]) -> bool | None:
    """Whether a file is this process's own now; `None` where files have no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
