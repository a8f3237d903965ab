"""What each visitor, a tab of a browser, has brought or trained. No other visitor sees it; it goes when they leave."""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from ..coeff_file import read_file
from ..store import AdapterStore
from .pipeline import SharedPipeline
from .runs import Run

MOST = 20  # subjects of a visitor


@dataclass(frozen=True)
class Subject:
    """A subject that can be chosen.

    Args:
        adapter: its name on the model.
        words: that call for it in a prompt, as its file says; empty if it does not.
    """

    adapter: str
    words: str


class Visitor:
    """One tab of a browser.

    Attributes:
        folder: for files of this visitor.
        gone: set once the tab is closed.
        run: of training, the last one.
    """

    def __init__(self, shared: SharedPipeline) -> None:
        self.shared = shared
        self.folder = Path(tempfile.mkdtemp(prefix="coeff-app-"))
        self.gone = threading.Event()
        self.run: Run | None = None
        self._own: dict[str, Subject] = {}
        self._token = secrets.token_hex(4)
        self._lock = threading.Lock()

    def subjects(self) -> list[str]:
        """What this visitor can choose: their own subjects, and the folder's."""
        return [*self._own, *(name for name in self.shared.names() if name not in self._own)]

    def subject(self, name: str) -> Subject:
        """Raises ValueError if there is none of that name, for this visitor."""
        if name in self._own:
            return self._own[name]
        if name not in self.shared.names():
            raise ValueError(f"there is no subject {name!r} any more: reload the page")
        return Subject(name, self.shared.words(name))

    def take(self, file: Path, name: str) -> str:
        """Loads a file as a subject of this visitor.

        Returns:
            The subject's name, which is `name` with a number if that is in use.

        Raises:
            ValueError: if it cannot be read or does not fit, or the visitor has `MOST` already.
        """
        with self._lock:
            if len(self._own) >= MOST:
                raise ValueError(f"a visitor can have {MOST} subjects of their own: reload the page to begin anew")
            words = str(read_file(file, values=False)[1].get("instance_prompt", ""))
            free = free_name(name, self.subjects())
            adapter = f"{free} of visitor {self._token}"
            self.shared.load(file, adapter)
            self._own[free] = Subject(adapter, words)
            return free

    def leave(self) -> None:
        """Ends what runs for this visitor, and forgets what they had."""
        self.gone.set()
        if self.run is not None:
            self.run.cancel()
            self.run.wait()
        with self._lock:
            self.shared.unload([subject.adapter for subject in self._own.values()])
            self._own.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class Visitors:
    """All tabs that are open, by the key that the browser has for each.

    Args:
        shared: the base model.
        most: who can be there at once; not all who come say when they go.
    """

    def __init__(self, shared: SharedPipeline, most: int = 500) -> None:
        self.shared, self._most = shared, most
        self._open: dict[str, Visitor] = {}  # who has done nothing for the longest first
        self._lock = threading.Lock()

    def of(self, key: str | None) -> Visitor:
        """The visitor in the tab of this key, who may be new. Of too many, who did nothing for the longest leaves."""
        key = key or ""
        with self._lock:
            visitor = self._open.pop(key) if key in self._open else Visitor(self.shared)
            self._open[key] = visitor
            idle = list(self._open)[: max(0, len(self._open) - self._most)]
        for other in idle:
            self.leave(other)
        return visitor

    def leave(self, key: str | None) -> None:
        with self._lock:
            visitor = self._open.pop(key or "", None)
        if visitor is not None:
            visitor.leave()

    def close(self) -> None:
        """Everybody leaves."""
        for key in list(self._open):
            self.leave(key)


def free_name(name: str, taken: list[str]) -> str:
    """`name` as a subject's, with a number behind it if it is taken.

    free_name("my dog.v2", ["my dog-v2"])  ->  "my dog-v2 2"
    """
    plain = re.sub(r"[^\w -]+", "-", name).strip(" -")[:60] or "subject"
    assert AdapterStore.is_name(plain)
    numbered = [plain, *(f"{plain} {n}" for n in range(2, len(taken) + 3))]
    return next(free for free in numbered if free not in taken)
