"""The settings of a run, defined once: a field is the flag, its help, its default, and what is saved with the run."""

from __future__ import annotations

import argparse
import math
import re
import typing
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import ImageColor

from ..errors import InputError
from ..images.buckets import parse_buckets
from .config_file import as_type, read_config, write_config

__all__ = ["DreamBoothSettings", "InputError", "parse_settings"]

# diffusers' schedulers but for piecewise_constant, whose rules have no flag here
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
WEIGHTING_SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")  # of diffusers.training_utils
OPTIMIZERS = ("adamw", "prodigy")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio", "aim", "mlflow", "clearml", "dvclive", "swanlab")
RATES = ("learning_rate", "lora_learning_rate", "text_encoder_lr", "text_encoder_lora_lr")
DEFAULT_STEPS = 500
DEFAULT_VALIDATION_STEPS = 100
EXCLUSIVE = {
    "max_train_steps": "num_train_epochs",
    "num_train_epochs": "max_train_steps",
    "validation_steps": "validation_epochs",
    "validation_epochs": "validation_steps",
}
# A run's config.yaml may hold these without a use: rates that it scaled, numbers of images for a subject that has no
# prompt. So they are questioned on the command line alone.
FILLED_IN = (
    *RATES,
    "resolution",
    "num_validation_images",
    "validation_steps",
    "validation_epochs",
    "validation_num_inference_steps",
    "validation_guidance_scale",
)
ALIASES = {"lora_rank": "rank"}  # diffusers' name, which is also accepted


def flag(help: str, default: Any = MISSING, choices: Sequence[str] | None = None, secret: bool = False) -> Any:
    """A setting. What is secret is shown and saved nowhere."""
    return field(default=default, repr=not secret, metadata={"help": help, "choices": choices, "secret": secret})


@dataclass(frozen=True)
class DreamBoothSettings:
    """What is trained on what, and how.

    Raises:
        InputError: if values are out of range or do not go together; every problem is listed.
    """

    pretrained_model_name_or_path: str = flag(
        "The base model: a folder in diffusers format, a name on the Hub, or a single .safetensors file."
    )
    instance_prompt: str = flag("The prompt that stands for the subject, such as 'a sks dog'.", "")
    instance_data_dir: str | None = flag("Folder with the images of the subject.", None)
    dataset_name: str | None = flag(
        "Instead of a folder, a data set for the datasets library: a name on the Hub, a folder, or a Parquet file.",
        None,
    )
    dataset_config_name: str | None = flag("Configuration of the data set, where it has several.", None)
    image_column: str = flag("Column of the data set that holds the images.", "image")
    caption_column: str | None = flag(
        "Column that holds the prompt of each image, to train with instead of instance_prompt: of the data set, or "
        "of metadata.jsonl or metadata.csv in instance_data_dir, which name the image in file_name.",
        None,
    )
    caption_extension: str | None = flag(
        "Ending of the text files beside the images of instance_data_dir that hold the prompt of each, such as txt.",
        None,
    )
    repeats: int = flag("How often a pass over the subject's images (an epoch) shows each of them.", 1)
    cache_dir: str | None = flag("Where the datasets library keeps what it loads; its own place if not given.", None)
    subjects: str | None = flag(
        "Instead of one subject, a YAML file with many that are trained at once: a list with name, images (a folder) "
        "and prompt of each, and caption_column, caption_extension, validation_prompt, class_data_dir, "
        "class_prompt if wanted.",
        None,
    )
    output_dir: str = flag("Folder for all that the run writes.", "dreambooth-coeff")
    revision: str | None = flag("Revision of the base model on the Hub.", None)
    variant: str | None = flag("Variant of the base model's files, such as 'fp16'.", None)
    single_file_config: str | None = flag(
        "For a base model in a single file, a folder in diffusers format, or a name on the Hub, of a model of its "
        "kind, for configs, tokenizers and what the file lacks; diffusers' own choice, on the Hub, if not given.",
        None,
    )
    pretrained_vae_model_name_or_path: str | None = flag(
        "Another VAE for the base model, such as one for SDXL that bears 16 bits; a folder, or a name on the Hub.",
        None,
    )
    enable_vae_tiling: bool = flag("Have the VAE compute large images in tiles, to save memory.", False)
    enable_vae_slicing: bool = flag("Have the VAE compute an image of a batch at a time, to save memory.", False)
    vae_encode_mode: str = flag(
        "Latents are drawn from what the VAE says of an image (sample), or its mean (mode).",
        "sample",
        ("sample", "mode"),
    )
    seed: int | None = flag("Seed of everything random, 0 included. Drawn, shown and saved if not given.", None)

    with_prior_preservation: bool = flag("Train on images of the subject's class as well, against forgetting.", False)
    class_data_dir: str | None = flag("Folder with class images. What is missing there is generated.", None)
    class_prompt: str | None = flag("The prompt of the class images, such as 'a dog'.", None)
    num_class_images: int = flag("How many class images to use.", 100)
    prior_loss_weight: float = flag("Weight of the class images' loss beside the subject's.", 1.0)
    sample_batch_size: int = flag("How many class or validation images to generate at a time.", 4)

    resolution: int | None = flag("Side of the training images in pixels; the base model's own if not given.", None)
    aspect_ratio_buckets: str | None = flag(
        "Sizes of training images instead of the resolution, as 'height,width;height,width;...'. Each image gets "
        "the one of the nearest aspect ratio and is cropped at the centre.",
        None,
    )
    center_crop: bool = flag("Crop images that are not square at the centre, not at random.", False)
    caption_dropout: float = flag("Probability with which an image trains with the empty prompt.", 0.0)
    random_flip: bool = flag("Mirror every other image, at random.", False)
    background_color: str = flag("Colour that transparent images are laid on: a name, or '#rrggbb'.", "white")

    cache_latents: bool = flag(
        "Encode every image once before training, and free the VAE. Not for crops at random.", False
    )

    coeff: bool = flag("Train attention coefficients. Without them LoRA is trained alone.", True)
    coeff_kinds: tuple[str, ...] = flag(
        "Kinds of attention that get coefficients.", ("self", "cross", "joint"), ("self", "cross", "joint")
    )
    coeff_include: tuple[str, ...] | None = flag("Patterns of attention layers to take, such as 'up_blocks.*'.", None)
    coeff_exclude: tuple[str, ...] | None = flag("Patterns of attention layers to leave out.", None)
    coeff_dropout: float = flag("Probability with which a coefficient is dropped at a training step.", 0.0)
    lora_rank: int = flag("Rank of the LoRA trained beside the coefficients; 0 trains none.", 0)
    lora_dropout: float = flag("Probability with which the LoRA drops an input at a training step.", 0.0)
    lora_layers: tuple[str, ...] | None = flag(
        "Patterns of the denoiser's layers that get a LoRA, such as 'attn2.to_q' or 'up_blocks.*.to_v'; separated by "
        "spaces or commas. The family's attention projections if not given.",
        None,
    )
    use_dora: bool = flag(
        "Train a DoRA, which learns the length of each weight apart, instead of a plain LoRA.", False
    )
    train_text_encoder: bool = flag(
        "Train coefficients (and the LoRA) on the text encoders as well: on CLIP's where there are any. Prompts are "
        "then encoded in every step.",
        False,
    )
    lora_alpha: float | None = flag("LoRA is scaled by alpha / rank; the rank itself if not given.", None)

    max_sequence_length: int | None = flag(
        "Tokens of a prompt that the text encoder takes, of models with T5 or a language model; the pipeline's own "
        "default if not given.",
        None,
    )

    train_batch_size: int = flag("Subject images a step and process.", 4)
    max_train_steps: int | None = flag(
        f"Optimizer steps; {DEFAULT_STEPS} if num_train_epochs is not given either.", None
    )
    num_train_epochs: int | None = flag("Passes over the subject's images, instead of max_train_steps.", None)
    gradient_accumulation_steps: int = flag("Batches an optimizer step.", 1)
    gradient_checkpointing: bool = flag("Compute activations again in the backward pass, to save memory.", False)
    mixed_precision: str | None = flag(
        "Precision of the frozen weights and of the computation; what is trained stays float32. "
        "accelerate's own setting if not given.",
        None,
        ("no", "fp16", "bf16"),
    )
    fsdp: bool = flag(
        "Share the frozen denoiser out over the processes, for models that are too large for each of them.", False
    )
    allow_tf32: bool = flag("Let CUDA multiply float32 matrices in TF32, which is faster and less exact.", False)
    dataloader_num_workers: int = flag("Processes that prepare images; 0 prepares them in the main one.", 0)

    optimizer: str = flag("What changes the weights. Prodigy finds the learning rate itself.", "adamw", OPTIMIZERS)
    use_8bit_adam: bool = flag(
        "AdamW with its state in 8 bits, by bitsandbytes, to save memory. For the LoRA: bitsandbytes keeps 32 bits "
        "for less than 4,096 numbers, and a layer's coefficients are fewer.",
        False,
    )
    prodigy_beta3: float | None = flag("Prodigy's decay of its estimate; the root of adam_beta2 if not given.", None)
    prodigy_decouple: bool = flag("Prodigy decays weights as AdamW does, not as Adam.", True)
    prodigy_use_bias_correction: bool = flag("Prodigy corrects the bias of the means, as Adam does.", True)
    prodigy_safeguard_warmup: bool = flag("Prodigy's estimate leaves the rates of the warm-up out.", True)
    learning_rate: float | None = flag(
        "Learning rate of the coefficients; 0.01 if not given, or 1 for Prodigy, which has one for all that trains.",
        None,
    )
    lora_learning_rate: float | None = flag(
        "Learning rate of the LoRA; 0.0001 if not given, and learning_rate for Prodigy.", None
    )
    text_encoder_lr: float | None = flag(
        "Learning rate of the text encoders' coefficients; 0.001 if not given, and learning_rate for Prodigy.", None
    )
    text_encoder_lora_lr: float | None = flag(
        "Learning rate of the text encoders' LoRA; 0.000005 if not given, and learning_rate for Prodigy.", None
    )
    scale_lr: bool = flag("Multiply the learning rates by batch size, accumulation steps and processes.", False)
    lr_scheduler: str = flag("How the learning rates change over the run.", "constant", LR_SCHEDULERS)
    lr_warmup_steps: int = flag("Optimizer steps in which the learning rates rise from 0.", 0)
    lr_num_cycles: int = flag("Restarts of --lr_scheduler cosine_with_restarts.", 1)
    lr_power: float = flag("Power of --lr_scheduler polynomial.", 1.0)
    adam_beta1: float = flag("AdamW's decay of the gradient's mean.", 0.9)
    adam_beta2: float = flag("AdamW's decay of the gradient's square.", 0.999)
    adam_weight_decay: float = flag("AdamW's weight decay of the coefficients.", 0.0)
    lora_weight_decay: float = flag("AdamW's weight decay of the LoRA.", 1e-2)
    adam_weight_decay_text_encoder: float = flag("AdamW's weight decay of the text encoders' LoRA.", 1e-3)
    adam_epsilon: float = flag("AdamW's epsilon.", 1e-8)
    max_grad_norm: float = flag("Gradients are scaled down to this norm.", 1.0)
    offset_noise: bool = flag(
        "Add one random number to the noise of each channel, for darker and lighter images; of models with a noise "
        "schedule.",
        False,
    )
    snr_gamma: float | None = flag(
        "Weigh timesteps by min-SNR with this gamma (5 is usual); of models with a noise schedule.", None
    )
    weighting_scheme: str = flag(
        "How timesteps are drawn and weighed; of models trained by flow matching.", "none", WEIGHTING_SCHEMES
    )
    logit_mean: float = flag("Mean of the timesteps' logits, of --weighting_scheme logit_normal.", 0.0)
    logit_std: float = flag("Deviation of the timesteps' logits, of --weighting_scheme logit_normal.", 1.0)
    mode_scale: float = flag("Scale of --weighting_scheme mode.", 1.29)
    precondition_outputs: bool = flag(
        "Measure the error of the image, not of the velocity; of models trained by flow matching.", False
    )
    guidance_scale: float | None = flag(
        "Guidance scale that training tells the model, of FLUX.1 [dev], where it is a condition; 3.5 if not given.",
        None,
    )

    use_ema: bool = flag(
        "Average what is trained over the steps (exponentially); the averages are what is saved and shown.", False
    )
    ema_decay: float = flag("Largest decay of the averages; in step n it is at most (1 + n) / (10 + n).", 0.9999)
    checkpointing_steps: int = flag("Optimizer steps from one saved state of the run to the next.", 500)
    checkpoints_total_limit: int | None = flag("How many saved states are kept, the newest; all if not given.", None)
    resume_from_checkpoint: str | None = flag(
        "Go on with a run: 'latest', the newest whole state in output_dir, or the name or path of one.", None
    )

    validation_prompt: tuple[str, ...] = flag("Prompts to generate images for, during and after training.", ())
    num_validation_images: int = flag("Validation images a prompt; image i has seed + i at every step.", 4)
    final_validation_prompt: tuple[str, ...] = flag(
        "Prompts for the images after training; validation_prompt's if not given.", ()
    )
    skip_final_inference: bool = flag("Generate no images after training.", False)
    validation_steps: int | None = flag(
        f"Optimizer steps from one validation to the next; {DEFAULT_VALIDATION_STEPS} if validation_epochs is not "
        "given either. After the last step there is always one.",
        None,
    )
    validation_epochs: int | None = flag("Passes over the images from one validation to the next.", None)
    validation_num_inference_steps: int = flag("Denoising steps of a validation image.", 25)
    validation_guidance_scale: float | None = flag(
        "Guidance scale of validation images; the pipeline's own default if not given.", None
    )
    report_to: str = flag(
        "Where losses, learning rates and validation images are logged; 'all' is every tracker that is installed.",
        "tensorboard",
        (*TRACKERS, "all", "none"),
    )
    logging_dir: str = flag("Folder of the log, in the output folder unless absolute.", "logs")

    push_to_hub: bool = flag("Upload what the run wrote to the Hugging Face Hub.", False)
    hub_model_id: str | None = flag(
        "Repository to push to, such as 'me/my-dog'; named as the output folder if not given.", None
    )
    hub_token: str | None = flag(
        "Token to push with; that of `hf auth login` if not given, which is safer.", None, secret=True
    )

    def __post_init__(self) -> None:
        problems = []
        for name, hint in _hints().items():
            try:
                object.__setattr__(self, name, as_type(getattr(self, name), hint))
            except TypeError as error:
                problems.append(f"--{name} {error}")
        _raise_if(problems)
        if self.lora_layers is not None:  # diffusers' scripts take commas
            layers = (layer for each in self.lora_layers for layer in re.split(r"[\s,]+", each))
            object.__setattr__(self, "lora_layers", tuple(filter(None, layers)))
        object.__setattr__(self, "optimizer", self.optimizer.lower())  # diffusers' scripts spell it AdamW
        for name, value in _default_rates(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        problems = [
            *_range_problems(self),
            *_choice_problems(self),
            *_combination_problems(self),
            *_idle_problems(self, {setting.name for setting in fields(self)} - set(FILLED_IN)),
            *_optimizer_problems(self),
            *_hub_problems(self),
        ]
        _raise_if(problems)

    def to_yaml(self) -> str:
        """The file that `--config` reads."""
        return write_config(self.public())

    def public(self) -> dict[str, Any]:
        """All settings but those that are secret."""
        secret = {setting.name for setting in fields(self) if setting.metadata["secret"]}
        return {name: value for name, value in asdict(self).items() if name not in secret}


@lru_cache(maxsize=1)
def _hints() -> dict[str, Any]:
    """Setting -> type."""
    return typing.get_type_hints(DreamBoothSettings)


def parse_settings(argv: Sequence[str] | None = None) -> DreamBoothSettings:
    """The settings of the command line and of its `--config`; `None` is this process's own."""
    parser = argparse.ArgumentParser(
        description="Trains attention coefficients for a subject, on a few images of it.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given may stand in the file
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings. Flags given beside it win over it.")
    hints = _hints()
    for setting in fields(DreamBoothSettings):
        _add_flag(parser, setting, hints[setting.name])
    given = vars(parser.parse_args(argv))
    config = given.pop("config", None)
    may_be_no = [setting.name for setting in fields(DreamBoothSettings) if "no" in (setting.metadata["choices"] or ())]
    values = _under(read_config(config, hints, may_be_no) if config else {}, given)
    missing = [f"--{s.name}" for s in fields(DreamBoothSettings) if s.default is MISSING and s.name not in values]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    settings = DreamBoothSettings(**values)
    _raise_if(_idle_problems(settings, set(FILLED_IN) & set(given)))
    return settings


def _under(of_file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The file's values where the command line has none, and nothing that excludes what it has."""
    for name, excluded in EXCLUSIVE.items():
        if name in given:
            of_file.pop(excluded, None)
    return of_file | given


class _Switch(argparse.Action):
    """`--name` and `--no_name`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith("--no_"))


def _add_flag(parser: argparse.ArgumentParser, setting: Field[Any], hint: Any) -> None:
    name, help_text = setting.name, setting.metadata["help"].replace("%", "%%")
    if hint is bool:
        shown = " Default: on." if setting.default else ""
        parser.add_argument(f"--{name}", f"--no_{name}", nargs=0, action=_Switch, help=help_text + shown)
        return
    alternatives = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    several = hint if typing.get_origin(hint) is tuple else alternatives[0]
    many = typing.get_origin(several) is tuple
    required = setting.default is MISSING
    shown = "" if required or setting.default in (None, ()) else f" Default: {setting.default}."
    parser.add_argument(
        f"--{name}",
        *([f"--{ALIASES[name]}"] if name in ALIASES else []),
        dest=name,
        type=str.lower if setting.metadata["choices"] and not many else str if many else alternatives[0],
        nargs="+" if many else None,
        choices=setting.metadata["choices"],
        help=help_text + shown,
    )


def _raise_if(problems: Sequence[str]) -> None:
    if problems:
        raise InputError("these settings cannot be used:\n  " + "\n  ".join(problems))


def _range_problems(settings: DreamBoothSettings) -> list[str]:
    """Numbers out of range, a line each. `None` means "not given" and is in range."""
    ranges = {
        "at least 1": (
            lambda value: value >= 1,
            "num_class_images sample_batch_size resolution train_batch_size max_train_steps num_train_epochs "
            "repeats max_sequence_length gradient_accumulation_steps lr_num_cycles num_validation_images "
            "validation_steps validation_epochs validation_num_inference_steps checkpointing_steps "
            "checkpoints_total_limit",
        ),
        "0 or more": (
            lambda value: value >= 0,
            "lora_rank prior_loss_weight dataloader_num_workers lr_warmup_steps adam_weight_decay "
            "lora_weight_decay adam_weight_decay_text_encoder validation_guidance_scale",
        ),
        "above 0": (
            lambda value: value > 0,
            "lora_alpha learning_rate lora_learning_rate text_encoder_lr text_encoder_lora_lr lr_power adam_epsilon "
            "max_grad_norm snr_gamma logit_std",
        ),
        "in [0, 2^32 - 1]": (lambda value: 0 <= value < 2**32, "seed"),  # what numpy takes
        "in [0, 1)": (
            lambda value: 0 <= value < 1,
            "coeff_dropout lora_dropout caption_dropout adam_beta1 adam_beta2 prodigy_beta3 ema_decay",
        ),
    }
    given = {name: value for name, value in vars(settings).items() if value is not None}
    endless = [name for name, value in given.items() if isinstance(value, float) and not math.isfinite(value)]
    return [f"--{name} must be a finite number, got {given[name]}" for name in endless] + [
        f"--{name} must be {rule}, got {given[name]}"
        for rule, (holds, names) in ranges.items()
        for name in names.split()
        if name in given and name not in endless and not holds(given[name])
    ]


def _choice_problems(settings: DreamBoothSettings) -> list[str]:
    problems = []
    for setting in fields(settings):
        choices, value = setting.metadata["choices"], getattr(settings, setting.name)
        wrong = [v for v in (value if isinstance(value, tuple | list) else [value]) if choices and v not in choices]
        if wrong and value is not None:
            problems.append(f"--{setting.name} must be of {', '.join(choices)}, got {', '.join(map(str, wrong))}")
    try:
        ImageColor.getrgb(settings.background_color)
    except ValueError:
        problems.append(
            f"--background_color must be a colour such as white or #ffffff, got {settings.background_color!r}"
        )
    try:
        parse_buckets(settings.aspect_ratio_buckets)
    except ValueError as error:
        problems.append(f"--aspect_ratio_buckets {error}")
    return problems


def _combination_problems(settings: DreamBoothSettings) -> list[str]:
    class_flags = {"--class_data_dir": settings.class_data_dir, "--class_prompt": settings.class_prompt}
    missing = [name for name, value in class_flags.items() if not value]
    problems = [f"--with_prior_preservation needs {name}" for name in missing if settings.with_prior_preservation]
    if settings.subjects:
        problems = []  # the file says these of each subject
    elif not settings.with_prior_preservation:
        problems += [f"{name} needs --with_prior_preservation" for name in class_flags if name not in missing]
    if not settings.instance_prompt.strip() and not settings.subjects:
        problems.append("--instance_prompt must not be empty")
    if not settings.coeff and not settings.lora_rank:
        problems.append("--no_coeff leaves nothing to train: give a --lora_rank of 1 or more")
    if not settings.train_text_encoder:
        defaults = _default_rates(settings)
        names = ("text_encoder_lr", "text_encoder_lora_lr")
        problems += [f"--{n} needs --train_text_encoder" for n in names if getattr(settings, n) != defaults[n]]
    if settings.max_train_steps is not None and settings.num_train_epochs is not None:
        problems.append("--max_train_steps and --num_train_epochs exclude each other")
    if settings.validation_steps is not None and settings.validation_epochs is not None:
        problems.append("--validation_steps and --validation_epochs exclude each other")
    if settings.final_validation_prompt and settings.skip_final_inference:
        problems.append("--final_validation_prompt and --skip_final_inference exclude each other")
    if settings.lr_scheduler == "constant" and settings.lr_warmup_steps:
        problems.append("--lr_warmup_steps has no effect on constant: use --lr_scheduler constant_with_warmup")
    return problems + _source_problems(settings) + _folder_problems(settings)


def _idle_problems(settings: DreamBoothSettings, names: Collection[str]) -> list[str]:
    """Those of the names that have another value than by default, and no effect beside the other settings."""
    s = settings
    no_coefficients = "is of the coefficients, which --no_coeff leaves out"
    shown = s.validation_prompt or s.final_validation_prompt or s.subjects
    uses = {
        "coeff_kinds coeff_include coeff_exclude coeff_dropout": (s.coeff, no_coefficients),
        "adam_weight_decay": (s.coeff, f"{no_coefficients}: use --lora_weight_decay"),
        "learning_rate": (s.coeff or s.optimizer == "prodigy", f"{no_coefficients}: use --lora_learning_rate"),
        "text_encoder_lr": (s.coeff, f"{no_coefficients}: use --text_encoder_lora_lr"),
        "lora_alpha lora_dropout lora_layers use_dora lora_learning_rate lora_weight_decay text_encoder_lora_lr": (
            s.lora_rank,
            "needs a --lora_rank of 1 or more",
        ),
        "adam_weight_decay_text_encoder": (
            s.train_text_encoder and s.lora_rank,
            "needs --train_text_encoder and a --lora_rank of 1 or more",
        ),
        "num_class_images prior_loss_weight": (s.with_prior_preservation, "needs --with_prior_preservation"),
        "ema_decay": (s.use_ema, "needs --use_ema"),
        "lr_num_cycles": (s.lr_scheduler == "cosine_with_restarts", "needs --lr_scheduler cosine_with_restarts"),
        "lr_power": (s.lr_scheduler == "polynomial", "needs --lr_scheduler polynomial"),
        "logit_mean logit_std": (s.weighting_scheme == "logit_normal", "needs --weighting_scheme logit_normal"),
        "mode_scale": (s.weighting_scheme == "mode", "needs --weighting_scheme mode"),
        "center_crop": (
            not s.aspect_ratio_buckets,
            "has no effect beside --aspect_ratio_buckets, which always crop at the centre",
        ),
        "resolution": (
            not s.aspect_ratio_buckets or s.with_prior_preservation or shown,
            "has no effect beside --aspect_ratio_buckets, but on class and validation images",
        ),
        "validation_steps validation_epochs": (s.validation_prompt or s.subjects, "needs a --validation_prompt"),
        "num_validation_images validation_num_inference_steps validation_guidance_scale": (
            shown,
            "needs a --validation_prompt or --final_validation_prompt",
        ),
    }
    defaults = {setting.name: setting.default for setting in fields(settings)} | _default_rates(settings)
    return [
        f"--{name} {reason}"
        for together, (used, reason) in uses.items()
        for name in together.split()
        if not used and name in names and getattr(settings, name) != defaults[name]
    ]


def _source_problems(settings: DreamBoothSettings) -> list[str]:
    if settings.subjects:
        return _subjects_problems(settings)
    problems = []
    if bool(settings.instance_data_dir) == bool(settings.dataset_name):
        problems.append("give either --instance_data_dir or --dataset_name, for the subject's images")
    of_dataset = ("dataset_config_name", "cache_dir", "image_column")
    if not settings.dataset_name:
        defaults = {setting.name: setting.default for setting in fields(settings)}
        given = [name for name in of_dataset if getattr(settings, name) != defaults[name]]
        problems += [f"--{name} needs --dataset_name" for name in given]
    elif settings.caption_extension:
        problems.append("--caption_extension is of files beside images; a data set has a --caption_column")
    if settings.caption_column and settings.caption_extension:
        problems.append("--caption_column and --caption_extension exclude each other")
    return problems


def _subjects_problems(settings: DreamBoothSettings) -> list[str]:
    """What each subject has for itself, and what cannot be had for many at once as for one alone."""
    excluded = {
        "instance_prompt instance_data_dir dataset_name dataset_config_name image_column caption_column "
        "caption_extension cache_dir class_data_dir class_prompt validation_prompt "
        "final_validation_prompt": "the file says this of each subject",
        "num_train_epochs validation_epochs repeats": "subjects have other numbers of images; count steps",
        "aspect_ratio_buckets coeff lora_rank train_text_encoder optimizer "
        "scale_lr push_to_hub fsdp": "it is for one subject",
    }
    defaults = {setting.name: setting.default for setting in fields(settings)}
    return [
        f"--{'no_' if defaults[name] is True else ''}{name} does not go with --subjects: {reason}"
        for names, reason in excluded.items()
        for name in names.split()
        if getattr(settings, name) != defaults[name]
    ]


def _default_rates(settings: DreamBoothSettings) -> dict[str, float]:
    """Of settings whose default follows from others."""
    if settings.optimizer == "prodigy":
        rate = 1.0 if settings.learning_rate is None else settings.learning_rate
        return dict.fromkeys(RATES, rate)
    return dict(zip(RATES, (1e-2, 1e-4, 1e-3, 5e-6)))


def _optimizer_problems(settings: DreamBoothSettings) -> list[str]:
    if settings.optimizer == "prodigy":
        return _prodigy_problems(settings)
    problems = [
        f"--{setting.name} needs --optimizer prodigy"
        for setting in fields(settings)
        if setting.name.startswith("prodigy_") and getattr(settings, setting.name) != setting.default
    ]
    if settings.use_8bit_adam and not settings.lora_rank:
        problems.append(
            "--use_8bit_adam would save nothing: bitsandbytes keeps 32 bits for layers of less than 4,096 numbers, as "
            "coefficients are; it is for a LoRA (--lora_rank)"
        )
    return problems


def _hub_problems(settings: DreamBoothSettings) -> list[str]:
    problems = [
        f"--{name} needs --push_to_hub"
        for name in ("hub_model_id", "hub_token")
        if getattr(settings, name) is not None and not settings.push_to_hub
    ]
    if settings.report_to in ("wandb", "all") and settings.hub_token:
        problems.append("--hub_token would be in wandb's log of the command line: use `hf auth login` instead")
    return problems


def _prodigy_problems(settings: DreamBoothSettings) -> list[str]:
    """Prodigy multiplies an estimate of its own by the learning rate, of which it takes one."""
    problems = []
    if settings.use_8bit_adam:
        problems.append("--use_8bit_adam is for --optimizer adamw, not for prodigy")
    if settings.scale_lr:
        problems.append("--scale_lr is for --optimizer adamw; prodigy finds the rate itself")
    rate = settings.learning_rate
    if 0 < rate < 0.1:
        problems.append(f"--learning_rate should be about 1 for --optimizer prodigy, which finds the rate, got {rate}")
    others = [f"--{name}" for name in RATES if getattr(settings, name) != rate]
    return problems + [f"{name} must be the --learning_rate for --optimizer prodigy, or left out" for name in others]


def _folder_problems(settings: DreamBoothSettings) -> list[str]:
    names = ("instance_data_dir", "class_data_dir", "output_dir")
    folders = {name: Path(value).resolve() for name in names if (value := getattr(settings, name))}
    return [
        f"--{one} and --{other} must be different folders"
        for one, other in combinations(folders, 2)
        if folders[one] == folders[other]
    ]
