"""A run that is interrupted, however, and goes on ends as one that was not."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageOps
from running import main
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_sd import tiny_pipeline
from torch import Tensor, nn

from coeff_diffusers.checkpoint import coeff_state_dict
from coeff_diffusers.training.adapters import lora
from coeff_diffusers.training.errors import InputError, Stopped, WriteError, exit_on_errors
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.run import checkpoints, dreambooth, loop, stopping
from coeff_diffusers.training.run.checkpoints import (
    Checkpoints,
    checkpoint_paths,
    denoiser_digest,
    find_checkpoint,
    problem_of,
)
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.run.state import TrainingState
from coeff_diffusers.training.run.stopping import stop_request
from coeff_diffusers.training.run.subjects import OneSubject
from coeff_diffusers.training.settings import parse_settings

WORDS = ["small=s", "large=l", "left=w", "right=e", "top=n", "bottom=b"]  # for the tokenizer takes 16 tokens
Train = Callable[..., TrainingResult]
SCRIPT = Path(__file__).parents[2] / "training" / "train_dreambooth.py"


class Killed(Exception):  # noqa: N818
    """In the place of SIGKILL, in this process."""


def at_step(step: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Does something once, when a step is through and nothing of it has been saved."""
    original = loop.report

    def report(progress: Any, state: TrainingState, *args: Any) -> None:
        original(progress, state, *args)
        if len(state.losses) == step:
            monkeypatch.setattr(loop, "report", original)
            action()

    monkeypatch.setattr(loop, "report", report)


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        raise Killed

    at_step(step, kill, monkeypatch)


def train_until(error: type[BaseException], argv: list[str]) -> BaseException:
    with pytest.raises(error) as info:
        main(argv)
    return info.value


def weights(result: TrainingResult) -> dict[str, Tensor]:
    files = [file for file in (result.coeff_file, result.lora_file) if file is not None]
    return {key: value for file in files for key, value in load_file(file).items()}


def assert_same_result(first: TrainingResult, second: TrainingResult) -> None:
    assert first.losses == second.losses
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, msg=f"{key} differs")  # bit for bit


def everything(tmp_path: Path) -> dict[str, Any]:
    """All that has a state of its own, or is random."""
    return {
        "max_train_steps": 6,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "lora_rank": 2,
        "coeff_dropout": 0.3,
        "use_ema": True,
        "random_flip": True,
        "augment": 0.5,
        "augment_words": WORDS,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "with_prior_preservation": True,
        "class_data_dir": tmp_path / "class",
        "class_prompt": "a fox",
        "num_class_images": 2,
        "checkpointing_steps": 1,
    }


# Bit for bit


def test_an_interrupted_run_ends_as_one_that_was_not(
    train: Train, argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = everything(tmp_path)
    whole = train(**settings, output_dir=tmp_path / "whole")
    for step in (1, 2, 5):
        out = tmp_path / f"killed-{step}"
        kill_at(step, monkeypatch)
        train_until(Killed, argv(**settings, output_dir=out))
        assert [path.name for path in checkpoint_paths(out)] == [f"checkpoint-{n}" for n in range(1, step)]
        assert_same_result(train(**settings, output_dir=out, resume_from_checkpoint="latest"), whole)


@pytest.mark.parametrize("flags", [{"optimizer": "prodigy", "learning_rate": 1.0}, {"train_text_encoder": True}])
def test_other_optimizers_and_text_encoders_go_on_too(
    train: Train, argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict
) -> None:
    settings = {"checkpointing_steps": 1, **flags}
    whole = train(**settings, output_dir=tmp_path / "whole")
    kill_at(2, monkeypatch)
    train_until(Killed, argv(**settings))
    assert_same_result(train(**settings, resume_from_checkpoint="latest"), whole)


def test_any_checkpoint_can_be_gone_on_from(train: Train, tmp_path: Path) -> None:
    whole = train(checkpointing_steps=1)
    for asked in ("checkpoint-1", tmp_path / "out" / "checkpoint-2"):
        again = train(checkpointing_steps=1, resume_from_checkpoint=asked)
        assert_same_result(again, whole)


@pytest.mark.slow
def test_a_process_killed_at_any_moment_goes_on(train: Train, argv: Callable[..., list[str]], tmp_path: Path) -> None:
    settings = everything(tmp_path) | {"max_train_steps": 12}
    whole = train(**settings, output_dir=tmp_path / "whole")
    command = [sys.executable, str(SCRIPT), *argv(**settings, resume_from_checkpoint="latest")]
    random.seed(0)
    kills = 0
    while kills < 2:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = len(checkpoint_paths(tmp_path / "out"))
        while len(checkpoint_paths(tmp_path / "out")) < before + 2 + kills:
            assert child.poll() is None, "the run ended before it was killed"
            time.sleep(0.002)
        if kills:  # in the middle of writing; the other time anywhere
            while not list((tmp_path / "out").glob(".checkpoint-*")) and child.poll() is None:
                pass
        else:
            time.sleep(random.random() * 0.1)
        child.kill()
        child.wait()
        kills += 1
    assert 0 < len(checkpoint_paths(tmp_path / "out")) < 12
    assert_same_result(train(**settings, resume_from_checkpoint="latest"), whole)
    assert not list((tmp_path / "out").glob(".checkpoint-*"))  # what was being written is cleared away


def test_a_finished_run_is_not_trained_again(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(checkpointing_steps=3)
    monkeypatch.setattr(StableDiffusion, "errors", None)
    assert_same_result(train(checkpointing_steps=3, resume_from_checkpoint="latest"), whole)


def test_more_steps_may_follow_where_the_schedule_does_not_depend_on_them(train: Train, tmp_path: Path) -> None:
    longer = train(max_train_steps=5, output_dir=tmp_path / "longer")
    train(max_train_steps=3, checkpointing_steps=3)
    assert_same_result(train(max_train_steps=5, checkpointing_steps=3, resume_from_checkpoint="latest"), longer)


def test_a_drawn_seed_stays_the_runs(
    train: Train, argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(3, monkeypatch)
    train_until(Killed, argv(seed=None, checkpointing_steps=1))
    result = train(seed=None, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert result.settings.seed == parse_settings(["--config", str(result.settings_file)]).seed
    again = train(seed=result.settings.seed, output_dir=result.settings_file.parent / "again")
    assert_same_result(result, again)


def test_the_gradient_scaler_goes_on(argv: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    parameter = nn.Parameter(torch.zeros(1))
    settings = parse_settings(argv())
    accelerator = Accelerator()
    state = TrainingState({"coefficients": [parameter]}, {"default": [parameter]}, settings, 3)
    state.note_losses({"default": 1.0})

    facts = {"settings": {"seed": 0}, "images": [], "processes": 1}

    def checkpoints_of(resumed: checkpoints.Checkpoint | None) -> Checkpoints:
        return Checkpoints(tmp_path / "out", None, accelerator, facts, OneSubject(), lambda folder: None, resumed)

    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    saved = checkpoints_of(None)
    saved.save(state)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    found = checkpoints.read_checkpoint(saved.last)
    checkpoints_of(found).restore(state)
    assert accelerator.scaler.get_scale() == 8.0


# The files


def test_a_checkpoint_holds_the_files_that_the_run_would_have_written(train: Train, tmp_path: Path) -> None:
    train(checkpointing_steps=2, lora_rank=2)
    shorter = train(max_train_steps=2, lora_rank=2, output_dir=tmp_path / "shorter")
    folder = tmp_path / "out" / "checkpoint-2"
    names = {"pytorch_coeff_weights.safetensors", "pytorch_lora_weights.safetensors", "state.pt", "files.json"}
    assert {path.name for path in folder.iterdir()} == names
    for file in (shorter.coeff_file, shorter.lora_file):
        found, expected = load_file(folder / file.name), load_file(file)
        assert all(torch.equal(found[key], expected[key]) for key in expected | found)


def test_a_later_checkpoint_is_never_kept_instead_of_the_newest(train: Train, tmp_path: Path) -> None:
    flags = {"max_train_steps": 4, "checkpointing_steps": 1}
    train(**flags)
    (tmp_path / "out" / "checkpoint-4" / "state.pt").unlink()
    (tmp_path / "out" / "checkpoint-4").rename(tmp_path / "out" / "checkpoint-9")  # torn, and never written anew
    train(**flags, resume_from_checkpoint="checkpoint-2", checkpoints_total_limit=1)
    assert [path.name for path in checkpoint_paths(tmp_path / "out")] == ["checkpoint-4"]


def test_only_the_newest_are_kept_also_after_going_on(
    train: Train, argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_train_steps": 5, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    kill_at(4, monkeypatch)
    train_until(Killed, argv(**settings))
    assert [path.name for path in checkpoint_paths(tmp_path / "out")] == ["checkpoint-2", "checkpoint-3"]
    train(**settings, resume_from_checkpoint="latest")
    assert [path.name for path in checkpoint_paths(tmp_path / "out")] == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("damage", ["state.pt cut", "state.pt gone", "files.json gone"])
def test_a_torn_checkpoint_is_named_and_not_picked(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    whole = train(checkpointing_steps=1)
    torn = tmp_path / "out" / "checkpoint-3"
    name, how = damage.split()
    content = (torn / name).read_bytes()
    (torn / name).unlink()
    if how == "cut":
        (torn / name).write_bytes(content[: len(content) // 2])
    assert problem_of(torn)
    assert problem_of(torn.with_name("checkpoint-2")) is None
    with pytest.raises(InputError, match="checkpoint-3 cannot be used"):
        train(checkpointing_steps=1, resume_from_checkpoint="checkpoint-3")
    assert_same_result(train(checkpointing_steps=1, resume_from_checkpoint="latest"), whole)
    printed = capsys.readouterr().out
    assert "checkpoint-3 is passed over" in printed
    assert "checkpoint-2, after step 2" in printed
    assert problem_of(torn) is None  # written anew


def write_checkpoint(folder: Path, content: Any) -> Path:
    """One that is whole by its list of files. `content` is the bytes of state.pt, or what is saved there."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        (folder / "state.pt").write_bytes(content)
    else:
        torch.save(content, folder / "state.pt")
    (folder / "files.json").write_text(json.dumps({"state.pt": checkpoints._fingerprint(folder / "state.pt")}))
    return folder


STATE = {
    "version": 1,
    "losses": [0.5],
    "facts": {"settings": {"seed": 0}, "images": [], "processes": 1},
    "trainee": {"parameters": []},
    "scaler": None,
}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "state.pt cannot be read"),
        (pickle.dumps(Path("/"), 2), "state.pt cannot be read"),
        (b"[" * 100_000, "state.pt cannot be read"),
        ([1, 2], "state.pt holds no state of a run"),
        ({"version": 1}, "state.pt holds no state of a run"),
        (STATE | {"version": "1"}, "state.pt holds no state of a run"),
        (STATE | {"losses": 3}, "state.pt holds no state of a run"),
        (STATE | {"facts": {"settings": []}}, "state.pt holds no state of a run"),
        (None, "files.json and what it lists cannot be read"),
    ],
)
def test_a_checkpoint_that_is_whole_and_none_is_passed_over_by_name(
    tmp_path: Path, content: Any, problem: str
) -> None:
    good = write_checkpoint(tmp_path / "checkpoint-1", STATE)
    bad = write_checkpoint(tmp_path / "checkpoint-2", content)
    if content is None:
        (bad / "files.json").write_text("[" * 100_000)
    said: list[str] = []
    assert find_checkpoint("latest", str(tmp_path), said.append).path == good
    assert said[0].startswith(f"{bad} is passed over: {problem}")
    with pytest.raises(InputError, match=f"checkpoint-2 cannot be used: {problem}"):
        find_checkpoint("checkpoint-2", str(tmp_path), said.append)


def test_a_checkpoint_whose_state_does_not_fit_is_named(argv: Callable[..., list[str]], tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    state = TrainingState({"coefficients": [parameter]}, {"default": [parameter]}, parse_settings(argv()), 3)
    found = checkpoints.read_checkpoint(write_checkpoint(tmp_path / "checkpoint-1", STATE))
    with pytest.raises(InputError, match=r"checkpoint-1: its state.pt does not fit this run \(KeyError"):
        Checkpoints(tmp_path, None, Accelerator(), {}, OneSubject(), lambda folder: None, found).restore(state)


def test_a_full_disk_loses_nothing_that_was_saved(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill() -> None:  # files may no longer grow beyond this, as when a disk has so much left
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))

    def empty() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = train(max_train_steps=4, output_dir=tmp_path / "whole")
    try:
        at_step(4, empty, monkeypatch)
        at_step(2, fill, monkeypatch)
        result = train(max_train_steps=4, checkpointing_steps=1)
    finally:
        empty()
    assert_same_result(result, whole)
    assert not list((tmp_path / "out").glob(".checkpoint-*"))
    said = capsys.readouterr().err
    assert "checkpoint-2 could not be written: " in said
    assert "checkpoint-1 is whole; --resume_from_checkpoint latest resumes from it. The run goes on." in said


def test_a_full_disk_at_the_end_loses_nothing_that_was_trained(
    train: Train,
    argv: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original, out = dreambooth.save_weights, tmp_path / "out"
    flags = {"use_ema": True, "checkpointing_steps": 2}
    whole = train(**flags, output_dir=tmp_path / "whole")

    def full(family: Any, settings: Any, folder: Path, *args: Any, **kwargs: Any) -> Any:
        if folder.is_relative_to(out) and at_the_end:
            raise SafetensorError("I/O error: No space left on device")
        return original(family, settings, folder, *args, **kwargs)

    at_the_end: list[int] = []
    monkeypatch.setattr(dreambooth, "save_weights", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    at_step(3, lambda: at_the_end.append(1), monkeypatch)
    error = str(train_until(WriteError, argv(**flags)))
    [saved] = tmp_path.glob("coeff-*/checkpoint-3")
    assert error.startswith("I/O error: No space left on device. ")
    assert f"{saved} is whole, in the folder of temporary files: move it to {out}, where room must be made" in error
    assert "The run goes on" not in capsys.readouterr().err
    assert not list(out.glob("*.safetensors"))
    shutil.move(saved, out)
    at_the_end.clear()
    monkeypatch.setattr(StableDiffusion, "errors", None)
    assert_same_result(train(**flags, resume_from_checkpoint="latest"), whole)
    assert (out / "README.md").exists()


@pytest.mark.parametrize(("part", "cause"), [("run_calls", RuntimeError), ("write_card", OSError)])
def test_what_fails_after_the_weights_can_be_done_again(
    train: Train,
    argv: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    cause: Any,
) -> None:
    images = {"validation_prompt": ["a fox"], "num_validation_images": 1, "validation_num_inference_steps": 1}
    flags = {"use_ema": True, **images}

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise cause(28, "this failed")

    run = dreambooth.DreamBoothRun(parse_settings(argv(**flags)))
    run.load_model()
    run.add_adapters()
    run.encode_prompts()
    list(run.steps())
    with monkeypatch.context() as patch:
        patch.setattr(dreambooth, part, fail)
        with pytest.raises(WriteError if cause is OSError else cause) as info:
            run.finish()
    said = "\n".join([str(info.value), *getattr(info.value, "__notes__", [])])
    assert "this failed" in said
    assert f"{tmp_path / 'out' / 'checkpoint-3'} is whole; --resume_from_checkpoint latest resumes from it." in said
    assert (tmp_path / "out" / "pytorch_coeff_weights.safetensors").exists()
    assert not (tmp_path / "out" / "README.md").exists()
    result = run.finish()
    assert result.images
    assert result.model_card.exists()
    monkeypatch.setattr(StableDiffusion, "errors", None)
    assert_same_result(train(**flags, resume_from_checkpoint="latest"), result)


def test_a_lora_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path, problem = tmp_path / "lora.safetensors", "cannot be written, and is as it was: full: .*lora.safetensors"
    with pytest.raises(OSError, match=problem), lora._temporary_folder(tmp_path, path):
        raise SafetensorError("full")
    assert not list(tmp_path.iterdir())


def test_the_command_says_where_the_last_step_is_without_a_traceback() -> None:
    with pytest.raises(SystemExit, match="error: it is in checkpoint-3"), exit_on_errors():
        raise WriteError("it is in checkpoint-3")


def test_a_log_and_images_that_cannot_be_written_do_not_end_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    images = {"validation_prompt": ["a fox"], "num_validation_images": 1, "validation_num_inference_steps": 1}
    whole = train(output_dir=tmp_path / "whole")
    monkeypatch.setattr(Accelerator, "log", full)
    monkeypatch.setattr(dreambooth, "write_grid", full)
    result = train(report_to="tensorboard", validation_steps=2, **images)
    assert_same_result(result, whole)
    assert result.images == []
    said = capsys.readouterr().err
    assert said.count("The log could not be written: [Errno 28] No space left on device. The run goes on") == 3
    assert "The images of step 2 could not be written: [Errno 28]" in said
    assert "The images of step 3 could not be written: [Errno 28]" in said


def test_a_checkpoint_is_flushed_as_windows_lets_it_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens no folder, and flushes no file that was opened to be read."""
    open_file, opened, flushed = os.open, {}, []

    def open_as_there(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        handle = open_file(path, flags, *args, **kwargs)
        opened[handle] = Path(path).name, bool(flags & os.O_RDWR)
        return handle

    def flush_as_there(handle: int) -> None:
        name, writable = opened[handle]
        if not writable:
            raise OSError(9, "Bad file descriptor")
        flushed.append(name)

    monkeypatch.setattr(os, "open", open_as_there)
    monkeypatch.setattr(os, "fsync", flush_as_there)
    saved = checkpoints.save_checkpoint(tmp_path, {"losses": [1.0]}, lambda folder: (folder / "weights").touch())
    assert problem_of(saved) is None
    assert sorted(flushed) == ["files.json", "state.pt", "weights"]


def test_older_checkpoints_that_cannot_be_removed_are_no_failed_save(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "keep_newest", full)
    train(checkpointing_steps=2, checkpoints_total_limit=1)
    said = capsys.readouterr().err
    assert "checkpoint-2 was written, but older checkpoints could not be removed: [Errno 28]" in said
    assert problem_of(tmp_path / "out" / "checkpoint-2") is None


# What is refused, and what is said


def test_latest_without_a_checkpoint_starts_anew(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train(resume_from_checkpoint="latest")
    assert "There is no whole checkpoint in" in capsys.readouterr().out


def test_a_checkpoint_that_is_not_there_is_named(train: Train) -> None:
    train(checkpointing_steps=2)
    with pytest.raises(InputError, match="there is no checkpoint-7; .* has checkpoint-2"):
        train(checkpointing_steps=2, resume_from_checkpoint="checkpoint-7")


def test_checkpoints_of_two_runs_are_not_mixed(train: Train, tmp_path: Path) -> None:
    flags = {"checkpointing_steps": 2}
    whole, other = train(**flags), tmp_path / "other"
    train(**flags, output_dir=other, seed=1)
    asked = {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-2"}
    with pytest.raises(InputError, match="other, which holds checkpoints of its own; take another --output_dir"):
        train(**flags, **asked, output_dir=other)
    assert_same_result(train(**flags, **asked, output_dir=tmp_path / "third"), whole)


def test_processes_that_found_different_checkpoints_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.check_agreement(None)
    monkeypatch.setattr(checkpoints, "gather_object", lambda found: [*found, 3])  # in the place of another machine
    with pytest.raises(InputError, match=r"different steps, \[0, 3\] .* on a disk that they share"):
        checkpoints.check_agreement(None)


def test_a_new_run_does_not_start_among_another_ones_checkpoints(train: Train) -> None:
    train(checkpointing_steps=2)
    with pytest.raises(InputError, match=r"holds checkpoints of a run, up to checkpoint-2: .* latest"):
        train(checkpointing_steps=2)


def test_another_run_is_not_gone_on_with(train: Train, tmp_path: Path, images: Path) -> None:
    train(checkpointing_steps=2)
    with pytest.raises(InputError, match=r"--seed was 0, is 1\n  --learning_rate was 0.05, is 0.1"):
        train(checkpointing_steps=2, resume_from_checkpoint="latest", learning_rate=0.1, seed=1)
    (tmp_path / "fewer").mkdir()
    for name in ("0.png", "1.png"):
        (tmp_path / "fewer" / name).write_bytes((images / name).read_bytes())
    with pytest.raises(InputError, match="images or captions are others"):
        train(checkpointing_steps=2, resume_from_checkpoint="latest", instance_data_dir=tmp_path / "fewer")


def test_images_may_be_moved_and_not_changed(train: Train, tmp_path: Path, images: Path) -> None:
    whole = train(checkpointing_steps=2)
    moved = {"instance_data_dir": shutil.copytree(images, tmp_path / "moved"), "checkpointing_steps": 2}
    assert_same_result(train(**moved, resume_from_checkpoint="latest"), whole)
    with Image.open(tmp_path / "moved" / "1.png") as image:
        ImageOps.mirror(image).save(tmp_path / "moved" / "1.png")
    with pytest.raises(InputError, match="images or captions are others"):
        train(**moved, resume_from_checkpoint="latest")


def test_a_base_model_that_was_changed_is_another_one(train: Train, base: Path, tmp_path: Path) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    flags = {"pretrained_model_name_or_path": model, "checkpointing_steps": 2}
    whole = train(**flags)
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    kept, values = file.read_bytes(), load_file(file)
    save_file({name: value * 1.001 for name, value in values.items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="the config or the weights of the denoiser at .*model are others"):
        train(**flags, resume_from_checkpoint="latest")
    file.write_bytes(kept)
    state = torch.load(tmp_path / "out" / "checkpoint-2" / "state.pt")
    del state["facts"]["denoiser"]  # as of earlier releases
    write_checkpoint(tmp_path / "out" / "checkpoint-2", state)
    assert_same_result(train(**flags, resume_from_checkpoint="latest"), whole)


def test_a_denoiser_is_known_by_its_config_and_by_values_that_are_here() -> None:
    unet = tiny_pipeline().unet
    digest = denoiser_digest(unet)
    assert denoiser_digest(tiny_pipeline().unet) == digest
    defaults = list(unet.config["_use_default_values"])
    unet.register_to_config(_name_or_path="elsewhere", later=1, _use_default_values=[*defaults, "later"])
    assert denoiser_digest(unet) == digest
    unet.register_to_config(_use_default_values=defaults)
    assert denoiser_digest(unet) != digest
    weight = nn.Parameter(torch.zeros(2, 3))
    layer = SimpleNamespace(config={}, parameters=lambda: [weight])
    here = denoiser_digest(layer)
    for elsewhere in (weight.to("meta"), torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(0, 3)):
        layer.parameters = lambda value=elsewhere: [weight, nn.Parameter(value, requires_grad=False)]
        assert denoiser_digest(layer) == here
    layer.parameters = lambda: [nn.Parameter(torch.zeros(2, 3) + torch.tensor([0.0, 0.0, 1e-7]))]
    assert denoiser_digest(layer) != here


def test_a_loss_that_is_not_finite_names_images_and_checkpoint(
    argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = StableDiffusion.errors, []

    def errors(*args: Any) -> Tensor:
        calls.append(1)
        return original(*args) * (float("inf") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(StableDiffusion, "errors", errors)
    error = train_until(FloatingPointError, argv(checkpointing_steps=1, train_batch_size=1))
    assert "the loss is inf at step 3 of 3" in str(error)
    assert "checkpoint-2 is whole; --resume_from_checkpoint latest" in str(error)
    assert ".png: a sks fox" in str(error)


def test_the_advice_names_a_checkpoint_that_is_not_of_this_folder(
    train: Train, argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(checkpointing_steps=2)
    other = {"output_dir": tmp_path / "other", "resume_from_checkpoint": tmp_path / "out" / "checkpoint-2"}
    monkeypatch.setattr(StableDiffusion, "errors", lambda *args: torch.full((2,), float("nan"), requires_grad=True))
    error = train_until(FloatingPointError, argv(checkpointing_steps=2, **other))
    assert f"--resume_from_checkpoint {other['resume_from_checkpoint']} resumes from it" in str(error)


@pytest.mark.parametrize("step", [2, 3])
def test_what_is_no_longer_finite_is_never_saved(
    argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """As after a gradient that overflows while the loss does not; in the last step, too."""
    original, calls = loop.clip_gradients, []

    def clip(groups: Iterable[list[nn.Parameter]], *args: Any) -> None:
        groups = list(groups)
        original(groups, *args)
        calls.append(1)
        groups[0][0].grad.mul_(float("nan") if len(calls) == step else 1.0)

    monkeypatch.setattr(loop, "clip_gradients", clip)
    error = train_until(FloatingPointError, argv(checkpointing_steps=1, train_batch_size=1))
    assert f"the norm of the trainable parameters is nan at step {step} of 3" in str(error)
    assert f"checkpoint-{step - 1} is whole" in str(error)
    assert ".png: a sks fox" in str(error)
    assert checkpoint_paths(tmp_path / "out")[-1].name == f"checkpoint-{step - 1}"
    assert not list((tmp_path / "out").glob("*.safetensors"))


# Signals


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(
    train: Train,
    argv: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
) -> None:
    at_step(2, lambda: os.kill(os.getpid(), number), monkeypatch)
    stopped = train_until(Stopped, argv())
    assert stopped.exit_code == code
    assert str(stopped).startswith("stopped after step 2 of 3. ")
    assert "checkpoint-2 is whole; --resume_from_checkpoint latest" in str(stopped)
    assert not torch.distributed.is_initialized()
    assert_same_result(train(resume_from_checkpoint="latest"), train(output_dir=tmp_path / "whole"))


def test_in_a_thread_a_run_is_the_same_and_says_that_signals_do_not_save(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        threaded = pool.submit(train, checkpointing_steps=2, output_dir=tmp_path / "threaded").result()
    assert capsys.readouterr().err.count("in a thread: SIGTERM and Ctrl-C do not save a checkpoint first") == 1
    assert_same_result(threaded, train())


def test_a_console_that_lacks_a_letter_ends_neither_a_run_nor_its_going_on(
    train: Train, argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"output_dir": tmp_path / "out_狐", "checkpointing_steps": 1}
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    kill_at(3, monkeypatch)
    train_until(Killed, argv(**flags))
    result = train(**flags, resume_from_checkpoint="latest")
    console.flush()
    said = console.buffer.getvalue().decode("cp1252")
    assert "out_\\u72d0/checkpoint-2, after step 2" in said
    assert "out_\\u72d0/pytorch_coeff_weights.safetensors" in said
    assert console.errors == "strict"  # as it was
    assert result.coeff_file.parent == flags["output_dir"]


def test_the_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    with stop_request() as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # at once, as a launcher does that passes on what all had
        assert request.signal_number == signal.SIGINT
        monkeypatch.setattr(stopping, "ONE_REQUEST", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_and_is_the_script_s_exit_code_whatever_workers_read_images(
    argv: Callable[..., list[str]], tmp_path: Path
) -> None:
    """As terminals and schedulers send it, while a step waits for images or computes."""
    flags = argv(max_train_steps=100_000, checkpointing_steps=100_000, dataloader_num_workers=2)
    child = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    said = ""
    while "training:   0%|          | 2" not in said:
        said += child.stderr.read(1)
        assert child.poll() is None, said
    os.killpg(child.pid, signal.SIGTERM)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 143, said
    assert "resumes from it" in said.splitlines()[-1]
    assert said.count("SIGTERM: stops after this step") == 1
    [saved] = checkpoint_paths(tmp_path / "out")
    assert problem_of(saved) is None


def test_a_signal_during_validation_is_answered_after_it(
    train: Train, argv: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {
        "validation_prompt": ["a fox"],
        "num_validation_images": 1,
        "validation_num_inference_steps": 1,
        "validation_steps": 1,
    }
    whole = train(output_dir=tmp_path / "whole")
    original = dreambooth.run_calls

    def images(*args: Any) -> list:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dreambooth, "run_calls", images)
        stopped = train_until(Stopped, argv(**flags))
    assert str(stopped).startswith("stopped after step 1 of 3. ")
    assert_same_result(train(resume_from_checkpoint="latest"), whole)


# Averages


def test_the_averages_are_what_is_saved(train: Train, tmp_path: Path) -> None:
    train(checkpointing_steps=1, output_dir=tmp_path / "plain")
    averaged = train(use_ema=True, ema_decay=0.15)
    expected = None
    for step, path in enumerate(checkpoint_paths(tmp_path / "plain")):
        now = torch.cat([p.flatten() for p in torch.load(path / "state.pt")["trainee"]["parameters"]])
        decay = 0.0 if step == 0 else min(0.15, (1 + step) / (10 + step))
        expected = decay * (torch.zeros_like(now) if expected is None else expected) + (1 - decay) * now
    found = load_file(averaged.coeff_file)
    plain = load_file(tmp_path / "plain" / "pytorch_coeff_weights.safetensors")
    assert any(not torch.equal(found[key], plain[key]) for key in found)
    values = torch.cat([value.flatten() for value in found.values()])
    torch.testing.assert_close(values.sort().values, expected.sort().values)  # the file has another order of layers


def test_validation_shows_the_averages(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def images(family: Any, *args: Any) -> list:
        seen.append(coeff_state_dict(family.pipeline))
        return original(family, *args)

    original = dreambooth.run_calls
    monkeypatch.setattr(dreambooth, "run_calls", images)
    flags = {"validation_prompt": ["a fox"], "num_validation_images": 1, "validation_num_inference_steps": 1}
    result = train(use_ema=True, validation_steps=2, **flags)
    shorter = train(use_ema=True, max_train_steps=2, output_dir=result.settings_file.parent / "shorter")
    expected = load_file(shorter.coeff_file)
    assert all(torch.equal(seen[0][key], expected[key]) for key in expected)
