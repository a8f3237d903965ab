"""The settings of a run, defined once: a field is the flag, its help, its rule, its default, and what is saved.

They stand in groups. A function that needs some of them takes the group they are in, and says so in its signature;
[`DreamBoothSettings`] is every group.
"""

from __future__ import annotations

import re
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import TypeAdapter, ValidationError

from ...quantization import MethodName
from ..errors import InputError
from .combinations import COEFFICIENT_RATES, FILLED_IN, LORA_RATES, RATES, combination_problems, idle_problems
from .config_file import write_config
from .rules import (
    Buckets,
    Colour,
    Count,
    Folder,
    Fraction,
    NotNegative,
    Number,
    Positive,
    Seed,
    Several,
    Text,
    Texts,
    WholeNumber,
    Words,
    adapter,
    problems_of,
)

# diffusers' schedulers but for piecewise_constant, whose rules have no flag here
LrScheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]  # fmt: skip
WeightingScheme = Literal["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"]  # of diffusers.training_utils
Tracker = Literal[
    "tensorboard", "wandb", "comet_ml", "trackio", "aim", "mlflow", "clearml", "dvclive", "swanlab", "all", "none"
]  # fmt: skip
Kind = Literal["self", "cross", "joint"]
Precision = Literal["no", "fp16", "bf16"]


DEFAULT_STEPS = 500
DEFAULT_VALIDATION_STEPS = 100


def flag(help: str, default: Any = MISSING, secret: bool = False) -> Any:
    """A setting. What is secret is shown and saved nowhere."""
    return field(default=default, repr=not secret, metadata={"help": help, "secret": secret})


@dataclass(frozen=True)
class Settings:
    """A group of settings, each of the type that it says.

    Raises:
        InputError: if values are of another type or out of range; every one is listed.
    """

    def __post_init__(self) -> None:
        problems, of_type = [], False
        group: Any = type(self)
        for name, kind in adapters(group).items():
            try:
                object.__setattr__(self, name, kind.validate_python(getattr(self, name)))
            except ValidationError as error:
                for other_type, problem in problems_of(error):
                    of_type = of_type or other_type
                    problems.append(f"--{name} {problem}")
        raise_if(problems + ([] if of_type else self.other_problems()))

    def other_problems(self) -> list[str]:
        """What does not go together, a line each."""
        return []


@cache
def hints(group: Any) -> dict[str, Any]:
    """Setting -> type, with its rule."""
    found = typing.get_type_hints(group, include_extras=True)
    return {each.name: found[each.name] for each in fields(group)}


@cache
def adapters(group: Any) -> dict[str, TypeAdapter[Any]]:
    """Setting -> what checks it."""
    return {name: adapter(hint) for name, hint in hints(group).items()}


def raise_if(problems: list[str]) -> None:
    if problems:
        raise InputError("these settings cannot be used:\n  " + "\n  ".join(problems))


@dataclass(frozen=True)
class BaseModelSettings(Settings):
    """Base model"""

    pretrained_model_name_or_path: Text = flag(
        "The base model: a folder in diffusers format, a name on the Hub, or a single .safetensors file."
    )
    revision: str | None = flag("Revision of the base model on the Hub.", None)
    variant: str | None = flag("Variant of the base model's files, such as 'fp16'.", None)
    single_file_config: Text | None = flag(
        "For a base model in a single file, a folder in diffusers format, or a name on the Hub, of a model of its "
        "kind, for configs, tokenizers and what the file lacks; diffusers' own choice, on the Hub, if not given.",
        None,
    )
    pretrained_vae_model_name_or_path: Text | None = flag(
        "Another VAE for the base model, such as one for SDXL that bears 16 bits; a folder, or a name on the Hub.",
        None,
    )
    quantize: MethodName | None = flag(
        "Hold the frozen denoiser and the large text encoders in 4 or 8 bits: by bitsandbytes (bnb_...), torchao or "
        "optimum-quanto.",
        None,
    )
    gguf_file: Text | None = flag(
        "The denoiser's weights in a GGUF file, instead of the base model's own; --quantize is of the large text "
        "encoders then.",
        None,
    )
    enable_vae_tiling: bool = flag("Have the VAE compute large images in tiles, to save memory.", False)
    enable_vae_slicing: bool = flag("Have the VAE compute one image of a batch at a time, to save memory.", False)


@dataclass(frozen=True)
class SubjectSettings(Settings):
    """Subject"""

    instance_prompt: str = flag("The prompt that stands for the subject, such as 'a sks dog'.", "")
    instance_data_dir: Text | None = flag("Folder with the images of the subject.", None)
    dataset_name: Text | None = flag(
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
    repeats: Count = flag("How often an epoch, a pass over the subject's images, shows each of them.", 1)
    cache_dir: Text | None = flag("Where the datasets library keeps what it loads; its own place if not given.", None)
    subjects: Text | None = flag(
        "Instead of one subject, a YAML file with many that are trained at once: a list with name, images (a folder) "
        "and prompt of each, and caption_column, caption_extension, validation_prompt, class_data_dir, "
        "class_prompt if wanted.",
        None,
    )


@dataclass(frozen=True)
class PriorSettings(Settings):
    """Prior preservation"""

    with_prior_preservation: bool = flag("Train on images of the subject's class as well, against forgetting.", False)
    class_data_dir: Text | None = flag("Folder with class images. What is missing there is generated.", None)
    class_prompt: str | None = flag("The prompt of the class images, such as 'a dog'.", None)
    num_class_images: Count = flag("How many class images to use.", 100)
    prior_loss_weight: NotNegative = flag("Weight of the class images' loss beside the subject's.", 1.0)


@dataclass(frozen=True)
class ImageSettings(Settings):
    """Training images"""

    resolution: Count | None = flag("Side of the training images in pixels; the base model's own if not given.", None)
    aspect_ratio_buckets: Buckets | None = flag(
        "Sizes of training images instead of the resolution, as 'height,width;height,width;...'. Each image gets "
        "the one of the nearest aspect ratio and is cropped at the centre.",
        None,
    )
    center_crop: bool = flag("Crop images that are not square at the centre, not at random.", False)
    caption_dropout: Fraction = flag("Probability with which an image trains with the empty prompt.", 0.0)
    random_flip: bool = flag("Mirror every other image, at random.", False)
    augment: Fraction = flag(
        "Share of draws that show the subject smaller, larger or elsewhere, with the words for it in the caption.", 0.0
    )
    augment_words: Words = flag(
        "Words of --augment for small, large, left, right, top, bottom, such as small=tiny 'left=on the left side'. "
        "They stand where a caption has {size} and {place}, else at its end.",
        (),
    )
    background_color: Colour = flag("Colour that transparent images are laid on: a name, or '#rrggbb'.", "white")
    cache_latents: bool = flag(
        "Encode every image once before training, and free the VAE. Not for random crops.", False
    )
    dataloader_num_workers: WholeNumber = flag("Processes that load images; 0 loads them in the main one.", 0)


@dataclass(frozen=True)
class CoefficientSettings(Settings):
    """Coefficients"""

    coeff: bool = flag("Train attention coefficients. Without them LoRA is trained alone.", True)
    coeff_kinds: Annotated[tuple[Kind, ...], Several] = flag(
        "Kinds of attention that get coefficients.", ("self", "cross", "joint")
    )
    coeff_include: Texts | None = flag("Patterns of attention layers to take, such as 'up_blocks.*'.", None)
    coeff_exclude: Texts | None = flag("Patterns of attention layers to leave out.", None)
    coeff_dropout: Fraction = flag("Probability with which a coefficient is dropped at a training step.", 0.0)
    train_text_encoder: bool = flag(
        "Train coefficients (and the LoRA) on the text encoders as well: on CLIP's where there are any. Prompts are "
        "then encoded in every step.",
        False,
    )


@dataclass(frozen=True)
class LoraSettings(Settings):
    """LoRA"""

    lora_rank: WholeNumber = flag("Rank of the LoRA trained beside the coefficients; 0 trains none.", 0)
    lora_alpha: Positive | None = flag("LoRA is scaled by alpha / rank; the rank itself if not given.", None)
    lora_dropout: Fraction = flag("Probability with which the LoRA drops an input at a training step.", 0.0)
    lora_layers: Texts | None = flag(
        "Patterns of the denoiser's layers that get a LoRA, such as 'attn2.to_q' or 'up_blocks.*.to_v'; separated by "
        "spaces or commas. The family's attention projections if not given.",
        None,
    )
    use_dora: bool = flag(
        "Train a DoRA, which learns the magnitude of each weight apart, instead of a plain LoRA.", False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_layers is not None:  # diffusers' scripts take commas
            layers = (layer for each in self.lora_layers for layer in re.split(r"[\s,]+", each))
            object.__setattr__(self, "lora_layers", tuple(filter(None, layers)))
            raise_if([] if self.lora_layers else ["--lora_layers must hold at least one pattern"])


@dataclass(frozen=True)
class AdapterSettings(LoraSettings, CoefficientSettings):
    """What is trained"""


@dataclass(frozen=True)
class StepSettings(Settings):
    """Training steps"""

    seed: Seed | None = flag("Seed of everything random, 0 included. Drawn, shown and saved if not given.", None)
    train_batch_size: Count = flag("Images of the subject per batch and process.", 4)
    max_train_steps: Count | None = flag(
        f"Optimizer steps; {DEFAULT_STEPS} if num_train_epochs is not given either.", None
    )
    num_train_epochs: Count | None = flag("Passes over the subject's images, instead of max_train_steps.", None)
    gradient_accumulation_steps: Count = flag("Batches per optimizer step.", 1)
    gradient_checkpointing: bool = flag("Compute activations again in the backward pass, to save memory.", False)
    checkpoint_every: Count = flag(
        "Of so many blocks of the denoiser --gradient_checkpointing takes one: 2 is faster than 1, and saves half.",
        1,
    )
    group_offload: bool = flag(
        "Keep the frozen denoiser's blocks in the CPU's memory, and bring each for as long as it computes; its "
        "activations are computed again in the backward pass, as with --gradient_checkpointing.",
        False,
    )
    offload_activations: bool = flag(
        "Keep what --gradient_checkpointing or --group_offload keeps of each block in the CPU's memory.", False
    )
    memory: Literal["plan", "auto", "off"] = flag(
        "Before a model that is not small is loaded: say what it will take, and what would make it fit (plan); take "
        "the flags that do (auto); or go ahead (off).",
        "plan",
    )
    mixed_precision: Precision | None = flag(
        "Precision of the frozen weights and of the computation; trainable parameters stay float32. "
        "accelerate's own setting if not given.",
        None,
    )
    fsdp: bool = flag(
        "Shard the frozen denoiser over the processes, for models that are too large for each of them.", False
    )
    allow_tf32: bool = flag("Let CUDA multiply float32 matrices in TF32, which is faster and less exact.", False)
    use_ema: bool = flag(
        "Keep an exponential moving average of the trainable parameters, which is what is saved and validated.", False
    )
    ema_decay: Fraction = flag("Largest decay of the average; in step n it is at most (1 + n) / (10 + n).", 0.9999)


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """Optimizer and learning rates"""

    optimizer: str = flag(
        "Of the coefficients: soap, adamw, prodigy, or any other of torch, pytorch-optimizer or bitsandbytes by its "
        "name, such as lion, adafactor or adamw8bit. soap if not given, and adamw with --no_coeff.",
        "",
    )
    lora_optimizer: str = flag(
        "Of the LoRA, likewise. If not given, adamw beside coefficients that have soap, and else the --optimizer.", ""
    )
    optimizer_args: Texts = flag(
        "Arguments of --optimizer, such as weight_decay=0.1 'betas=(0.9, 0.99)'; they win over the flags.", ()
    )
    use_8bit_adam: bool = flag(
        "AdamW with its state in 8 bits, by bitsandbytes, to save memory. For the LoRA: bitsandbytes keeps 32 bits "
        "for less than 4,096 values, and a layer's coefficients are fewer.",
        False,
    )
    learning_rate: Positive | None = flag(
        "Learning rate of the coefficients. If not given, 0.04 for SOAP, 1 for Prodigy, which has one for all "
        "parameters, and 0.01 for others.",
        None,
    )
    lora_learning_rate: Positive | None = flag(
        "Learning rate of the LoRA; 0.0001 if not given, and learning_rate for Prodigy.", None
    )
    text_encoder_lr: Positive | None = flag(
        "Learning rate of the text encoders' coefficients; 0.001 if not given, and learning_rate for Prodigy.", None
    )
    text_encoder_lora_lr: Positive | None = flag(
        "Learning rate of the text encoders' LoRA; 0.000005 if not given, and learning_rate for Prodigy.", None
    )
    scale_lr: bool = flag("Multiply the learning rates by batch size, accumulation steps and processes.", False)
    lr_scheduler: LrScheduler | None = flag(
        "How the learning rates change over the run; cosine if coefficients have SOAP, else constant, if not given.",
        None,
    )
    lr_warmup_steps: WholeNumber = flag("Optimizer steps in which the learning rates rise from 0.", 0)
    lr_num_cycles: Count = flag("Restarts of --lr_scheduler cosine_with_restarts.", 1)
    lr_power: Positive = flag("Power of --lr_scheduler polynomial.", 1.0)
    adam_beta1: Fraction = flag("Decay of the gradient's mean, of AdamW and SOAP.", 0.9)
    adam_beta2: Fraction | None = flag("Decay of the gradient's square; 0.999 if not given, and 0.99 for SOAP.", None)
    adam_weight_decay: NotNegative | None = flag(
        "Weight decay of the coefficients, times the learning rate a step; 0.3 for SOAP if not given, else 0.", None
    )
    lora_weight_decay: NotNegative = flag("Weight decay of the LoRA.", 1e-2)
    adam_weight_decay_text_encoder: NotNegative = flag("Weight decay of the text encoders' LoRA.", 1e-3)
    adam_epsilon: Positive = flag("Epsilon of AdamW and SOAP.", 1e-8)
    max_grad_norm: Positive = flag("Gradients are clipped to this norm.", 1.0)
    prodigy_beta3: Fraction | None = flag(
        "Prodigy's decay of its estimate; the root of adam_beta2 if not given.", None
    )
    prodigy_decouple: bool = flag("Prodigy decays weights as AdamW does, not as Adam.", True)
    prodigy_use_bias_correction: bool = flag("Prodigy corrects the bias of the means, as Adam does.", True)
    prodigy_safeguard_warmup: bool = flag("Prodigy's estimate leaves the rates of the warm-up out.", True)

    def __post_init__(self) -> None:
        for name in ("optimizer", "lora_optimizer"):
            if isinstance(value := getattr(self, name), str):  # diffusers' scripts spell it AdamW
                object.__setattr__(self, name, value.lower())
        for name, value in self.derived_defaults().items():
            if getattr(self, name) in (None, ""):
                object.__setattr__(self, name, value)
        super().__post_init__()

    def derived_defaults(self) -> dict[str, Any]:
        """The defaults that follow from other settings."""
        coeff = getattr(self, "coeff", True)
        optimizer = self.optimizer or ("soap" if coeff else "adamw")
        by_soap = coeff and optimizer == "soap"
        beside = "adamw" if by_soap else optimizer
        lora_optimizer = self.lora_optimizer or beside
        rates = dict(zip(RATES, (4e-2 if by_soap else 1e-2, 1e-4, 1e-3, 5e-6)))
        if optimizer == "prodigy":
            rates |= dict.fromkeys(COEFFICIENT_RATES, 1.0 if self.learning_rate is None else self.learning_rate)
        if lora_optimizer == "prodigy":
            first = rates["learning_rate"] if optimizer == "prodigy" else self.lora_learning_rate
            rates |= dict.fromkeys(LORA_RATES, 1.0 if first is None else first)
        return {
            "optimizer": "soap" if coeff else "adamw",
            "lora_optimizer": beside,
            "adam_beta2": None if "soap" in (optimizer, lora_optimizer) else 0.999,  # each has its own then
            "adam_weight_decay": 0.3 if by_soap else 0.0,
            "lr_scheduler": "cosine" if by_soap else "constant",
            **rates,
        }


@dataclass(frozen=True)
class ObjectiveSettings(Settings):
    """Training objective"""

    offset_noise: bool = flag(
        "Add one random number to the noise of each channel, for darker and lighter images; of models with a noise "
        "schedule.",
        False,
    )
    snr_gamma: Positive | None = flag(
        "Weigh timesteps by min-SNR with this gamma (5 is usual); of models with a noise schedule.", None
    )
    weighting_scheme: WeightingScheme = flag(
        "How timesteps are sampled and weighed; of models trained by flow matching.", "none"
    )
    logit_mean: Number = flag("Mean of the timesteps' logits, of --weighting_scheme logit_normal.", 0.0)
    logit_std: Positive = flag("Deviation of the timesteps' logits, of --weighting_scheme logit_normal.", 1.0)
    mode_scale: Number = flag("Scale of --weighting_scheme mode.", 1.29)
    precondition_outputs: bool = flag(
        "Measure the error of the image, not of the velocity; of models trained by flow matching.", False
    )
    guidance_scale: Number | None = flag(
        "Guidance scale that FLUX.1 [dev] is conditioned on in training; 3.5 if not given.", None
    )
    max_sequence_length: Count | None = flag(
        "Tokens of a prompt that the text encoder takes, of models with T5 or a language model; the pipeline's own "
        "default if not given.",
        None,
    )
    vae_encode_mode: Literal["sample", "mode"] = flag(
        "Latents are sampled from the VAE's posterior of an image (sample), or its mean (mode).", "sample"
    )


@dataclass(frozen=True)
class CheckpointSettings(Settings):
    """Checkpoints"""

    checkpointing_steps: Count = flag("Optimizer steps from one checkpoint to the next.", 500)
    checkpoints_total_limit: Count | None = flag("How many checkpoints are kept, the newest; all if not given.", None)
    resume_from_checkpoint: Text | None = flag(
        "Resume a run: 'latest', the newest whole checkpoint in output_dir, or the name or path of one.", None
    )


@dataclass(frozen=True)
class ValidationSettings(Settings):
    """Validation"""

    validation_prompt: Texts = flag("Prompts to generate images for, during and after training.", ())
    num_validation_images: Count = flag("Validation images per prompt; image i has seed + i at every step.", 4)
    final_validation_prompt: Texts = flag(
        "Prompts for the images after training; validation_prompt's if not given.", ()
    )
    skip_final_inference: bool = flag("Generate no images after training.", False)
    validation_steps: Count | None = flag(
        f"Optimizer steps from one validation to the next; {DEFAULT_VALIDATION_STEPS} if validation_epochs is not "
        "given either. After the last step there is always one.",
        None,
    )
    validation_epochs: Count | None = flag("Passes over the images from one validation to the next.", None)
    validation_num_inference_steps: Count = flag("Denoising steps of a validation image.", 25)
    validation_guidance_scale: NotNegative | None = flag(
        "Guidance scale of validation images; the model's own default if not given.", None
    )
    sample_batch_size: Count = flag("How many class or validation images to generate at a time.", 4)


@dataclass(frozen=True)
class OutputSettings(Settings):
    """Output and log"""

    output_dir: Folder = flag("Folder for all that the run writes.", "dreambooth-coeff")
    report_to: Tracker = flag(
        "Where losses, learning rates and validation images are logged; 'all' is every tracker that is installed.",
        "tensorboard",
    )
    logging_dir: Text = flag("Folder of the log, in the output folder unless absolute.", "logs")


@dataclass(frozen=True)
class HubSettings(Settings):
    """Hugging Face Hub"""

    push_to_hub: bool = flag("Upload what the run wrote to the Hugging Face Hub.", False)
    hub_model_id: str | None = flag(
        "Repository to push to, such as 'me/my-dog'; named as the output folder if not given.", None
    )
    hub_token: str | None = flag(
        "Token to push with; that of `hf auth login` if not given, which is safer.", None, secret=True
    )


GROUPS: tuple[type[Settings], ...] = (
    BaseModelSettings,
    SubjectSettings,
    PriorSettings,
    ImageSettings,
    CoefficientSettings,
    LoraSettings,
    StepSettings,
    OptimizerSettings,
    ObjectiveSettings,
    ValidationSettings,
    CheckpointSettings,
    OutputSettings,
    HubSettings,
)


@dataclass(frozen=True)
class DreamBoothSettings(
    HubSettings,
    OutputSettings,
    CheckpointSettings,
    ValidationSettings,
    ObjectiveSettings,
    OptimizerSettings,
    StepSettings,
    AdapterSettings,
    ImageSettings,
    PriorSettings,
    SubjectSettings,
    BaseModelSettings,
):
    """What is trained on what, and how.

    Raises:
        InputError: if values are out of range or do not go together; every problem is listed.
    """

    def other_problems(self) -> list[str]:
        names = {setting.name for setting in fields(self)} - set(FILLED_IN)
        return [*combination_problems(self), *idle_problems(self, names)]

    def to_yaml(self) -> str:
        """The file that `--config` reads."""
        return write_config(self.public())

    def public(self) -> dict[str, Any]:
        """All settings but those that are secret."""
        secret = {setting.name for setting in fields(self) if setting.metadata["secret"]}
        return {name: value for name, value in asdict(self).items() if name not in secret}
