"""What there is to choose of the app: a field is the flag, its help, its rule and its default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..serving.settings import PipelineSettings, Port, parse_flags
from ..training.errors import InputError
from ..training.settings.dreambooth import flag
from ..training.settings.rules import Count, Text

EMBEDDED = Path(__file__).parents[2] / "examples" / "emoji"  # of a clone
DESCRIPTION = """Opens a page to create images of subjects, to look into coefficient files, and to train a subject.

    coeff-diffusers app
    coeff-diffusers app --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --adapters subjects

It answers this machine alone, unless --host says otherwise.
"""


@dataclass(frozen=True)
class AppSettings(PipelineSettings):
    """App"""

    pretrained_model_name_or_path: Text = flag(
        "The base model: a folder in diffusers format, a name on the Hub, or a single .safetensors file. In a clone, "
        "the embedded model if not given.",
        "",
    )
    adapters: Text = flag(
        "Folder of the subjects' coefficient files, NAME.safetensors or NAME/pytorch_coeff_weights.safetensors; or a "
        "repository or a collection of the Hub. If not given, those of the embedded model, or none.",
        "",
    )
    host: str = flag("Address to listen on; 0.0.0.0 is all of the machine's.", "127.0.0.1")
    port: Port = flag("Port to listen on.", 7860)
    concurrency_limit: Count = flag("Visitors whose images are made at once; others wait.", 2)
    max_upload_size: Count = flag("Of an uploaded file, in bytes.", 16 << 20)
    train: bool = flag("Offer training.", True)
    max_train_steps: Count = flag("Steps that a training run may have.", 2000)
    max_train_images: Count = flag("Images that a training run may have.", 12)
    max_train_runs: Count = flag("Training runs that wait for their turn, at most.", 8)
    captioner: Text | None = flag(
        "A model of transformers that describes images, such as BLIP, to suggest captions: a folder or a name on the "
        "Hub.",
        None,
    )


def parse_app(argv: Sequence[str] | None = None) -> AppSettings:
    """The settings of the command line, with the embedded model where no other is named.

    Raises:
        InputError: if they cannot be used; every problem is listed.
        SystemExit: for help, and for flags that there are not.
    """
    return filled_in(parse_flags(AppSettings, "app", DESCRIPTION, argv))


def filled_in(settings: AppSettings) -> AppSettings:
    """With the embedded model, and its subjects, where no model is named.

    Raises:
        InputError: if there is no embedded model, which an installed package has not.
    """
    if settings.pretrained_model_name_or_path:
        return settings
    if not (EMBEDDED / "model").is_dir():
        raise InputError(
            "--pretrained_model_name_or_path must be given: the embedded model is in a clone of the repository alone"
        )
    adapters = settings.adapters or str(EMBEDDED / "coefficients")
    return replace(settings, pretrained_model_name_or_path=str(EMBEDDED / "model"), adapters=adapters)
