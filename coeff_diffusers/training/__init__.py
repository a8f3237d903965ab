"""DreamBooth with attention coefficients: a subject from a few images, the base model frozen.

    settings -> families -> images -> adapters -> results -> run        each imports from those left of it

`settings` says what there is to choose, `families` what differs between base models, `images` what is trained on,
`adapters` what is trained, `results` what is written, and `run` does it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InputError, Stopped
    from .run.dreambooth import DreamBoothRun, TrainingResult, train_dreambooth
    from .run.loop import TrainingStep
    from .run.soap import SOAP
    from .settings import DreamBoothSettings, parse_settings

# Modules are loaded by what is asked for: --help needs neither torch nor diffusers, which take seconds.
_MODULES = {
    "SOAP": "run.soap",
    "DreamBoothRun": "run.dreambooth",
    "DreamBoothSettings": "settings",
    "InputError": "errors",
    "Stopped": "errors",
    "TrainingResult": "run.dreambooth",
    "TrainingStep": "run.loop",
    "parse_settings": "settings",
    "train_dreambooth": "run.dreambooth",
}

__all__ = [
    "SOAP",
    "DreamBoothRun",
    "DreamBoothSettings",
    "InputError",
    "Stopped",
    "TrainingResult",
    "TrainingStep",
    "parse_settings",
    "train_dreambooth",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
