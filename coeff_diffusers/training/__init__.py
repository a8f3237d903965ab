"""DreamBooth with attention coefficients: a subject from a few images, the base model frozen.

    settings -> families -> images -> adapters -> results -> run        each imports from those left of it

`settings` says what there is to choose, `families` what differs between base models, `images` what is trained on,
`adapters` what is trained, `results` what is written, and `run` does it.
"""

from .errors import InputError, Stopped
from .run.dreambooth import DreamBoothRun, TrainingResult, train_dreambooth
from .run.loop import TrainingStep
from .settings import DreamBoothSettings, parse_settings

__all__ = [
    "DreamBoothRun",
    "DreamBoothSettings",
    "InputError",
    "Stopped",
    "TrainingResult",
    "TrainingStep",
    "parse_settings",
    "train_dreambooth",
]
