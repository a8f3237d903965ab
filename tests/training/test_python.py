"""Training from Python: settings and images in, files and losses out, step by step, in any thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coeff_diffusers.training import (
    DreamBoothRun,
    DreamBoothSettings,
    InputError,
    Stopped,
    TrainingResult,
    TrainingStep,
    train_dreambooth,
)


def settings(base: Path, output: Path, **changes: Any) -> DreamBoothSettings:
    given = {"instance_prompt": "a sks fox", "max_train_steps": 3, "train_batch_size": 2, "seed": 0}
    return DreamBoothSettings(str(base), output_dir=str(output), report_to="none", **given | changes)


def coefficients(result: Any) -> dict[str, torch.Tensor]:
    assert isinstance(result, TrainingResult)
    return load_file(result.coeff_file)


def test_images_of_pillow_train_as_the_files_of_a_folder_do(base: Path, images: Path, tmp_path: Path) -> None:
    steps: list[TrainingStep] = []
    files = train_dreambooth(settings(base, tmp_path / "a", instance_data_dir=str(images)), on_step=steps.append)
    opened = [Image.open(path) for path in sorted(images.iterdir())]
    given = train_dreambooth(settings(base, tmp_path / "b"), opened)
    assert coefficients(files).keys() == coefficients(given).keys()
    for key, value in coefficients(files).items():
        torch.testing.assert_close(coefficients(given)[key], value, rtol=0, atol=0)
    assert [(step.number, step.of, step.loss) for step in steps] == [
        (n, 3, loss) for n, loss in enumerate(files.losses, 1)
    ]
    rates = [step.learning_rates["coefficients"] for step in steps]
    assert rates == pytest.approx([0.04, 0.03, 0.01])  # a cosine of three steps
    captioned = train_dreambooth(settings(base, tmp_path / "c"), [(image, "a fox") for image in opened])
    assert captioned.losses != given.losses


@pytest.mark.parametrize(
    ("images", "changes", "problem"),
    [
        ([], {}, "images: there are none"),
        ("in", {}, "images must be a list of Pillow's images, got 'in'"),
        (["1.png", (Image.new("RGB", (4, 4)), 3)], {}, "pairs .*, but:\n  image 0 is '1.png'\n  image 1 is \\(<PIL"),
        (None, {}, "give either --instance_data_dir or --dataset_name"),
        ([Image.new("RGB", (4, 4))], {"instance_data_dir": "in"}, "give either images, or --instance_data_dir"),
        ([Image.new("F", (4, 4))], {}, "--images: these cannot be read as images:\n  image 0: mode F has numbers"),
    ],
)
def test_images_that_cannot_be_trained_on_are_named(
    base: Path, tmp_path: Path, images: Any, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        train_dreambooth(settings(base, tmp_path / "out", **changes), images)


def test_cancelling_from_another_thread_saves_a_checkpoint_that_resumes(
    base: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train_dreambooth(settings(base, tmp_path / "whole", instance_data_dir=str(images)))
    cancel, stopped = threading.Event(), []

    def stop_after(step: TrainingStep) -> None:
        if step.number == 2:
            cancel.set()

    def train() -> None:
        try:
            here = settings(base, tmp_path / "out", instance_data_dir=str(images))
            train_dreambooth(here, on_step=stop_after, cancel=cancel)
        except Stopped as error:
            stopped.append(str(error))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert stopped[0].startswith("stopped after step 2 of 3. ")
    assert "Ctrl-C" not in capsys.readouterr().err  # there is a way to stop it
    changes = {"instance_data_dir": str(images), "resume_from_checkpoint": "latest"}
    resumed = train_dreambooth(settings(base, tmp_path / "out", **changes))
    assert resumed.losses == whole.losses
    for key, value in coefficients(whole).items():
        torch.testing.assert_close(coefficients(resumed)[key], value, rtol=0, atol=0)


def test_a_run_is_not_finished_before_its_steps_are_done(base: Path, images: Path, tmp_path: Path) -> None:
    run = DreamBoothRun(settings(base, tmp_path / "out", instance_data_dir=str(images)))
    run.load_model()
    run.add_adapters()
    run.encode_prompts()
    for step in run.steps():
        if step.number == 1:
            break
    with pytest.raises(RuntimeError, match="1 of 3 steps are done"):
        run.finish()
    assert not list((tmp_path / "out").glob("*.safetensors"))
