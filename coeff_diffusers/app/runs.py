"""Training for visitors: a run in a thread of its own, one at a time, the others in the order they came."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..training import DreamBoothRun, DreamBoothSettings, Stopped, TrainingResult
from .messages import EXPECTED, text_of

logger = logging.getLogger(__name__)
WAITS, TRAINS, DONE, STOPPED, FAILED = "waits", "trains", "done", "stopped", "failed"


class Line:
    """Runs that wait for their turn.

    Args:
        most: that may wait.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._runs: list[Run] = []  # the first of them trains
        self._changed = threading.Condition()

    def join(self, run: Run) -> None:
        """Raises ValueError if too many wait."""
        with self._changed:
            if len(self._runs) > self._most:
                raise ValueError(f"{self._most} training runs wait already: try again later")
            self._runs.append(run)

    def place(self, run: Run) -> int:
        """How many are before this run."""
        with self._changed:
            return self._runs.index(run) if run in self._runs else 0

    @contextmanager
    def turn(self, run: Run) -> Iterator[None]:
        """Waits until all before this run are through, or it is cancelled."""
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._runs[0] is run or run.cancelled)
            yield
        finally:
            with self._changed:
                self._runs.remove(run)
                self._changed.notify_all()

    def look_again(self) -> None:
        with self._changed:
            self._changed.notify_all()


class Run:
    """A visitor's training run.

    Args:
        settings: of the run; its `output_dir` is the visitor's.
        images: of the subject, with their captions.
        line: in which it waits.

    Attributes:
        phase: `WAITS`, `TRAINS`, `DONE`, `STOPPED` or `FAILED`.
        doing: what it is at, in words.
        message: why it failed, or that it was stopped.
        losses: of the steps that are done.
        file: that was trained, once it is done.
    """

    def __init__(self, settings: DreamBoothSettings, images: Sequence[Any], line: Line) -> None:
        self.settings, self._images, self._line = settings, images, line
        self.phase, self.doing, self.message = WAITS, "", ""
        self.losses: list[float] = []
        self.file: Path | None = None
        self._cancel = threading.Event()
        self._thread = threading.Thread()
        self._began = (0.0, 0)  # the time, and how many steps were done then

    @property
    def folder(self) -> Path:
        return Path(self.settings.output_dir)

    @property
    def steps(self) -> int:
        return int(self.settings.max_train_steps or 0)

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    @property
    def ended(self) -> bool:
        return self.phase in (DONE, STOPPED, FAILED)

    @property
    def before(self) -> int:
        """How many runs are before this one."""
        return self._line.place(self)

    @property
    def can_resume(self) -> bool:
        return self.phase == STOPPED and any(self.folder.glob("checkpoint-*"))

    def seconds_left(self) -> float | None:
        """By the pace so far; `None` while that is not known."""
        began, first = self._began
        done = len(self.losses) - first
        if self.phase != TRAINS or done < 2:
            return None
        return (time.monotonic() - began) / done * (self.steps - len(self.losses))

    def validation_images(self) -> list[tuple[Path, str]]:
        """Those made so far, the newest first, with the step of each."""
        files = sorted(self.folder.glob("validation/step-*/prompt*.png"), key=lambda file: file.name)
        files.sort(key=lambda file: file.parent.name, reverse=True)
        return [(file, f"step {int(file.parent.name.removeprefix('step-'))}") for file in files]

    def start(self) -> None:
        """Starts the run, or resumes it where it was stopped.

        Raises:
            ValueError: if too many wait.
        """
        if self._thread.is_alive():
            raise ValueError("this run is under way: cancel it first")
        resumes = any(self.folder.glob("checkpoint-*"))
        settings = replace(self.settings, resume_from_checkpoint="latest" if resumes else None)
        self._cancel.clear()
        self._line.join(self)
        self.phase, self.doing, self.message = WAITS, "waits for its turn", ""
        self._thread = threading.Thread(target=self._work, args=(settings,), name="training", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Stops the run after the step it is in; a checkpoint is saved."""
        self._cancel.set()
        self._line.look_again()

    def wait(self, timeout: float | None = None) -> None:
        """Until the run has ended."""
        with suppress(RuntimeError):  # one that was never started
            self._thread.join(timeout)

    def _work(self, settings: DreamBoothSettings) -> None:
        try:
            with self._line.turn(self):
                if not self.cancelled:
                    self._train(settings)
            phase, message = (DONE, "") if self.file else (STOPPED, "stopped before it began")
        except Stopped:
            phase, message = STOPPED, f"stopped after step {len(self.losses)} of {self.steps}"
        except Exception as error:
            if not isinstance(error, EXPECTED):
                logger.exception("a training run failed")
            phase, message = FAILED, without(self.folder, text_of(error))
        self.message, self.phase = message, phase

    def _train(self, settings: DreamBoothSettings) -> None:
        self.phase = TRAINS
        run = self._at("reads the images", lambda: DreamBoothRun(settings, self._images, cancel=self._cancel))
        self._at("loads the model", run.load_model)
        self._at("puts the coefficients on", run.add_adapters)
        self._at("encodes the prompts", run.encode_prompts)
        self.doing = "trains"
        self._began = (time.monotonic(), -1)
        for step in run.steps():
            if self._began[1] < 0:
                self._began = (time.monotonic(), step.number)
            self.losses = list(run.state.losses)
        result = self._at("makes the last images and writes the file", run.finish)
        assert isinstance(result, TrainingResult)
        assert result.coeff_file is not None
        name = name_of(self.settings.instance_prompt)
        self.file = Path(shutil.copyfile(result.coeff_file, self.folder / f"{name}.safetensors"))

    def _at(self, what: str, work: Callable[[], Any]) -> Any:
        self.doing = what
        return work()


def name_of(prompt: str) -> str:
    """What a subject's file is called.

    name_of("a sks koala face")  ->  "koala face"
    """
    words = [
        word for word in re.sub(r"[^\w -]+", " ", prompt).split() if word.lower() not in ("a", "an", "the", "sks")
    ]
    return " ".join(words)[:60].strip(" -") or "subject"


def without(folder: Path, text: str) -> str:
    """A message without the folder, which is the server's."""
    return text.replace(f"{folder}{os.sep}", "").replace(str(folder), "the run's folder")
