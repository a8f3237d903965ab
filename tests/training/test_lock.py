"""One run at a time writes into an output folder, and a run that cannot begin leaves nothing there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from running import main

from coeff_diffusers.training import DreamBoothRun, InputError, parse_settings
from coeff_diffusers.training.run import lock
from coeff_diffusers.training.run.lock import LOCK, OWNER, OutputLock

Argv = Callable[..., list[str]]
OTHER = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def is_free(folder: Path) -> bool:
    try:
        with FileLock(folder / LOCK).acquire(blocking=False):
            return not (folder / OWNER).exists()
    except Timeout:
        return False


def test_a_run_of_another_process_is_named_and_none_when_that_is_gone(argv: Argv, out: Path) -> None:
    settings = parse_settings(argv())
    owner = {"process": 4321, "host": "node7", "since": "2026-01-02 03:04:05+00:00", "subjects": []}
    (out / OWNER).write_text(json.dumps(owner))
    child = subprocess.Popen([sys.executable, "-c", OTHER, str(out / LOCK)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(
            InputError, match="out is in use by another run, process 4321 on node7 since 2026-01-02 03"
        ):
            DreamBoothRun(settings)  # nothing is loaded yet
    finally:
        child.kill()
        child.wait()
    run = DreamBoothRun(settings)
    assert json.loads((out / OWNER).read_text())["process"] == os.getpid()
    del run


def test_a_run_that_was_given_up_ends_when_its_thread_starts_another(out: Path) -> None:
    first, second = OutputLock(out), OutputLock(out)
    first.take()
    first.take()  # as each part of a run does
    second.take()
    with pytest.raises(InputError, match="another run was started into .*out, which ended this one"):
        first.take()
    first.release()
    assert not is_free(out)
    second.release()
    assert is_free(out)


def test_a_run_of_another_thread_is_left_alone_while_there_is_one(out: Path) -> None:
    first, second = OutputLock(out), OutputLock(out)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(first.take).result()
        with pytest.raises(InputError, match=f"in use by another run, process {os.getpid()} on "):
            second.take()
    second.take()  # the thread has ended
    second.release()


def test_a_run_that_nobody_has_any_more_is_no_obstacle(argv: Argv, out: Path) -> None:
    """Whatever thread it was of; the objects of a run refer to each other."""

    def give_up() -> None:
        run = DreamBoothRun(parse_settings(argv()))
        run.itself = run

    with ThreadPoolExecutor(1) as pool:
        pool.submit(give_up).result()
        second = OutputLock(out)
        second.take()
    second.release()


@pytest.mark.parametrize("cause", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_a_run_lets_go_of_the_folder(
    argv: Argv, out: Path, monkeypatch: pytest.MonkeyPatch, cause: type[BaseException]
) -> None:
    def fail(*args: Any) -> None:
        assert not is_free(out)
        raise cause

    monkeypatch.setattr("coeff_diffusers.training.run.dreambooth.add_adapters", fail)
    with pytest.raises(cause):
        main(argv())
    assert is_free(out)


def test_a_run_that_is_through_or_left_in_its_steps_lets_go_of_the_folder(argv: Argv, out: Path) -> None:
    def left(run: DreamBoothRun) -> None:
        for _ in run.steps():
            assert not is_free(out)
            return

    run = DreamBoothRun(parse_settings(argv()))
    run.load_model()
    run.add_adapters()
    run.encode_prompts()
    left(run)
    assert is_free(out)
    assert list(run.steps())
    assert not is_free(out)
    run.finish()
    assert is_free(out)


def test_the_folder_of_a_subject_is_of_the_run_of_all_subjects(out: Path) -> None:
    """Whichever of them starts first."""
    (out / "fox").mkdir()
    together, alone, other = OutputLock(out, ["fox", "owl"]), OutputLock(out / "fox"), OutputLock(out / "more")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(together.take).result()
        with pytest.raises(InputError, match="out is in use by another run, process"):
            alone.take()
        other.take()
        other.release()
        pool.submit(together.release).result()
        pool.submit(alone.take).result()
        with pytest.raises(InputError, match="fox is in use by another run, process"):
            together.take()
        assert is_free(out)
        pool.submit(alone.release).result()


def test_a_disk_without_locks_is_said_and_trained_on(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    OutputLock(out).take()
    said = capsys.readouterr().err
    assert "out cannot be locked ([Errno 95] Operation not supported): nothing keeps another run out of it." in said


def test_all_processes_end_where_the_main_one_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(problem: list[str | None]) -> None:
        problem[0] = "--output_dir: out is in use"

    lock.take_together(None)
    monkeypatch.setattr(lock, "broadcast_object_list", broadcast)  # in the place of another process
    with pytest.raises(InputError, match="out is in use"):
        lock.take_together(None)


@pytest.mark.parametrize("flags", [{"instance_data_dir": "nowhere"}, {"instance_prompt": "a sks fox " * 9}])
def test_an_input_error_leaves_no_folder_that_the_run_has_made(
    argv: Argv, tmp_path: Path, flags: dict[str, str]
) -> None:
    """Before the model is loaded, and after that."""
    with pytest.raises(InputError):
        main(argv(**flags, output_dir=tmp_path / "new" / "out"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError):
        main(argv(**flags, output_dir=tmp_path / "mine"))
    assert (tmp_path / "mine").exists()
