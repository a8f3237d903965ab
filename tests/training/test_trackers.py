"""Where a run is logged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker, TensorBoardTracker
from accelerate.utils import LoggerType
from diffusers import DiffusionPipeline
from PIL import Image
from running import main
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.results import trackers
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.settings.dreambooth import Tracker


def test_every_tracker_of_accelerate_can_be_chosen() -> None:
    """And those of newer ones, where this is an old one."""
    known = {str(kind) for kind in LoggerType if kind != LoggerType.ALL}
    choices = set(get_args(Tracker)) - {"all", "none"}
    assert known <= choices <= known | {"swanlab", "trackio"}


@pytest.mark.parametrize(
    ("name", "there", "message"),
    [
        ("tensorboard", [], "--report_to tensorboard needs tensorboard: pip install tensorboard; or --report_to none"),
        ("comet_ml", [LoggerType.TENSORBOARD], "--report_to comet_ml needs comet_ml: pip install comet_ml"),
        ("all", [], "--report_to all finds no tracker"),
    ],
)
def test_a_missing_package_is_named_before_anything_is_loaded(
    argv: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, name: str, there: list[LoggerType], message: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was loaded first")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: there)
    with pytest.raises(InputError, match=message):
        main(argv(report_to=name))


def test_all_logs_numbers_images_and_settings_to_what_is_installed(train: Callable[..., TrainingResult]) -> None:
    result = train(
        report_to="all",
        max_train_steps=2,
        validation_prompt=["a fox", "fox"],
        num_validation_images=3,
        validation_steps=1,
        validation_num_inference_steps=1,
    )
    events = EventAccumulator(str(result.settings_file.parent / "logs" / "dreambooth")).Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(result.losses)
    assert [event.step for event in events.Images("a fox")] == [1, 2]
    assert [(event.width, event.height) for event in events.Images("fox")] == [(3 * 16, 16)] * 2  # side by side


@pytest.mark.usefixtures("one_process")
def test_a_log_that_cannot_be_ended_does_not_take_the_result_along(
    train: Callable[..., TrainingResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, "finish", full)
    result = train(report_to="tensorboard")
    assert result.coeff_file.exists()
    assert result.model_card.exists()
    assert "The end of the log could not be written: [Errno 28] No space left on device." in capsys.readouterr().err
    assert not torch.distributed.is_initialized()


class Listed(GeneralTracker):
    """Takes images by the calls of accelerate's WandBTracker and of comet_ml's Experiment; writes down what came."""

    requires_logging_directory = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[Any] = []

    @property
    def tracker(self) -> Listed:
        return self

    def log_images(self, values: dict[str, Any], step: int | None = None) -> None:
        self.seen.append((step, {key: [image.size for image in images] for key, images in values.items()}))

    def log_image(self, image_data: Image.Image, name: str, step: int) -> None:
        self.seen.append((step, name, image_data.size))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wandb", [(7, {"a fox": [(3, 2), (3, 2)]})]),
        ("swanlab", [(7, {"a fox": [(3, 2), (3, 2)]})]),
        ("comet_ml", [(7, "a fox 0", (3, 2)), (7, "a fox 1", (3, 2))]),
        ("mlflow", []),
    ],
)
def test_each_tracker_gets_images_in_its_own_way(name: str, expected: list[Any]) -> None:
    tracker = Listed(name)
    image = Image.fromarray(np.zeros((2, 3, 3), dtype=np.uint8))
    trackers.log_images([tracker], {"a fox": [image, image]}, step=7)
    assert tracker.seen == expected
