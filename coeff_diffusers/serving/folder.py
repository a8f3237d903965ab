"""The subjects that a server has: files of a folder, which come and go, or those of the Hub, which are only read."""

from __future__ import annotations

import os
from pathlib import Path

from ..coeff_file import read_file
from ..files import check_file_name, printable, whole_file
from ..store import AdapterStore
from .requests import MAX_NAME, Refusal, Subject


class SubjectFolder:
    """What an [`AdapterStore`] of the same source finds.

    Args:
        source: a folder, or a repository or collection of the Hub.
    """

    def __init__(self, source: str) -> None:
        self.store = AdapterStore(source)

    def names(self) -> list[str]:
        self._folder_if_any()
        return self.store.names()

    def describe(self, name: str) -> Subject:
        """What its file says of itself. Raises Refusal if there is none, or it cannot be read."""
        self._folder_if_any()
        path = self.store.path(name)
        if path is None:
            raise no_subject(name)
        try:
            header = read_file(path, values=False)[1]
        except (ValueError, OSError) as error:
            raise Refusal(422, without_folder(error, path.parent), "name") from error
        text = {key: value for key, value in header.items() if isinstance(value, str)}
        return Subject(name=name, instance_prompt=text.get("instance_prompt"), metadata=text)

    def check_name(self, name: str) -> None:
        """Raises Refusal unless a file of this name can be put."""
        self._folder()
        if not self.store.is_name(name):
            raise Refusal(422, "must be letters, digits, spaces, _ and -, and not begin with a space", "name")
        if len(name.encode()) > MAX_NAME:
            raise Refusal(422, f"must have {MAX_NAME} bytes at most, got {len(name.encode())}", "name")
        try:
            check_file_name(name, "name")
        except ValueError as error:
            raise Refusal(422, str(error), "name") from error

    def put(self, name: str, data: bytes) -> bool:
        """Writes a subject's file, whole or not at all; returns whether there was none of the name."""
        self.check_name(name)
        new = self.store.path(name) is None
        with whole_file(self._folder() / f"{name}.safetensors") as temporary:
            Path(temporary).write_bytes(data)
        return new

    def delete(self, name: str) -> None:
        """Removes a subject's files of coefficients, and nothing beside them."""
        self._folder()
        if self.store.path(name) is None:
            raise no_subject(name)
        while (path := self.store.path(name)) is not None:  # one of training may come to light
            path.unlink(missing_ok=True)  # another request may have been faster

    def _folder_if_any(self) -> Path | None:
        try:
            return self.store.folder()
        except FileNotFoundError as error:
            raise no_folder() from error

    def _folder(self) -> Path:
        folder = self._folder_if_any()
        if folder is None:
            raise Refusal(405, f"the subjects are those of {self.store.source} on the Hub; put them there")
        return folder


def no_subject(name: str, field: str = "name") -> Refusal:
    return Refusal(404, f"there is no subject {name!r}", field)


def no_folder() -> Refusal:
    return Refusal(503, "the folder of subjects cannot be found any more, or yet", headers={"Retry-After": "5"})


def without_folder(error: Exception, folder: Path | None) -> str:
    """Of an error that names a file: where the server has it is not the client's."""
    return str(error) if folder is None else str(error).replace(f"{printable(folder)}{os.sep}", "")
