"""Where a run is logged: any of the trackers that accelerate knows, with images where the tracker takes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from ..errors import InputError


def check_trackers(report_to: str) -> None:
    """Raises InputError if the package of the tracker is missing, which accelerate would only write to its log."""
    name, there = report_to, [str(tracker) for tracker in get_available_trackers()]
    if name not in ("none", "all") and name not in there:
        raise InputError(f"--report_to {name} needs {name}: pip install {name}; or --report_to none")
    if name == "all" and not there:
        raise InputError("--report_to all finds no tracker that is installed: pip install tensorboard")


def start_trackers(config: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Starts them with the settings of the run as their config."""
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in config.items()
    }
    accelerator.init_trackers("dreambooth", config=plain)


def log(values: Mapping[str, float], step: int, accelerator: Accelerator) -> None:
    """Logs; if that fails, as on a full disk, it says so, and the run goes on without a log."""
    try:
        accelerator.log(dict(values), step=step)
    except OSError as error:
        print(f"The log could not be written: {error}. The run goes on without it.", file=sys.stderr)
        accelerator.trackers = []


def end_training(accelerator: Accelerator) -> None:
    """Ends the trackers, of which some write only now, and the group of processes; what `log` says holds here, too."""
    try:
        accelerator.end_training()
    except OSError as error:
        print(f"The end of the log could not be written: {error}.", file=sys.stderr)
        accelerator.trackers = []
        accelerator.end_training()


def log_images(trackers: Sequence[Any], images: Mapping[str, list[Image.Image]], step: int) -> None:
    """Logs a row of images per prompt. Trackers for which accelerate has no such call keep to numbers."""
    for tracker in trackers:
        for prompt, row in images.items():
            if tracker.name == "tensorboard":
                batch = np.stack([np.asarray(image) for image in row])
                tracker.log_images({prompt: batch}, step, dataformats="NHWC")
            elif tracker.name in ("wandb", "swanlab"):
                tracker.log_images({prompt: row}, step)
            elif tracker.name == "comet_ml":
                for i, image in enumerate(row):
                    tracker.tracker.log_image(image, name=f"{prompt} {i}", step=step)
