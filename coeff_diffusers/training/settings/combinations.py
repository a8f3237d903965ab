"""Settings that do not go together, and settings that would have no effect beside the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dreambooth import DreamBoothSettings

RATES = ("learning_rate", "lora_learning_rate", "text_encoder_lr", "text_encoder_lora_lr")
COEFFICIENT_RATES, LORA_RATES = RATES[::2], RATES[1::2]

# A run's config.yaml may hold these without a use: what it filled in, rates that it scaled, numbers of images for a
# subject that has no prompt. So they are questioned on the command line alone.
FILLED_IN = (
    *RATES,
    "optimizer",
    "lora_optimizer",
    "adam_weight_decay",
    "resolution",
    "num_validation_images",
    "validation_steps",
    "validation_epochs",
    "validation_num_inference_steps",
    "validation_guidance_scale",
)


def defaults_of(settings: DreamBoothSettings) -> dict[str, Any]:
    """Setting -> its default, beside the others."""
    return {setting.name: setting.default for setting in fields(settings)} | settings.derived_defaults()


def changed(settings: DreamBoothSettings, *names: str) -> list[str]:
    """Those of the names that have another value than by default."""
    defaults = defaults_of(settings)
    return [name for name in names if getattr(settings, name) != defaults[name]]


def combination_problems(settings: DreamBoothSettings) -> list[str]:
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
        given = changed(settings, "text_encoder_lr", "text_encoder_lora_lr")
        problems += [f"--{name} needs --train_text_encoder" for name in given]
    if settings.max_train_steps is not None and settings.num_train_epochs is not None:
        problems.append("--max_train_steps and --num_train_epochs exclude each other")
    if settings.validation_steps is not None and settings.validation_epochs is not None:
        problems.append("--validation_steps and --validation_epochs exclude each other")
    if settings.final_validation_prompt and settings.skip_final_inference:
        problems.append("--final_validation_prompt and --skip_final_inference exclude each other")
    if settings.lr_scheduler == "constant" and settings.lr_warmup_steps:
        problems.append("--lr_warmup_steps has no effect on constant: use --lr_scheduler constant_with_warmup")
    problems += _quantization_problems(settings) + _offload_problems(settings)
    problems += _subjects_problems(settings) if settings.subjects else _source_problems(settings)
    return problems + _folder_problems(settings) + _optimizer_problems(settings) + _hub_problems(settings)


def _quantization_problems(settings: DreamBoothSettings) -> list[str]:
    given = [f"--{name}" for name in changed(settings, "quantize", "gguf_file")]
    if not given:
        return []
    problems = []
    if settings.fsdp:
        problems.append(f"{', '.join(given)}: shards of --fsdp are of plain weights; leave one of them out")
    if settings.use_dora and (settings.gguf_file or settings.quantize == "bnb_int8"):
        how = "--gguf_file" if settings.gguf_file else "--quantize bnb_int8"
        problems.append(
            f"--use_dora: peft cannot read the magnitudes of weights under {how}; take --quantize bnb_nf4, or a LoRA "
            "without it"
        )
    return problems


def _offload_problems(settings: DreamBoothSettings) -> list[str]:
    problems = []
    if settings.group_offload and settings.fsdp:
        problems.append("--group_offload and --fsdp exclude each other: shards stay on their devices")
    if settings.group_offload and settings.checkpoint_every > 1:
        problems.append("--checkpoint_every does not go with --group_offload, which computes all blocks again")
    if settings.group_offload and settings.quantize == "bnb_int8":
        problems.append(
            "--group_offload cannot move the weights of --quantize bnb_int8, which bitsandbytes keeps beside the "
            "layers' own; take bnb_nf4 or torchao_int8"
        )
    if settings.offload_activations and not (settings.gradient_checkpointing or settings.group_offload):
        problems.append("--offload_activations needs --gradient_checkpointing or --group_offload")
    if settings.offload_activations and settings.checkpoint_every > 1:
        problems.append(
            "--checkpoint_every does not go with --offload_activations, which would copy the weights of all blocks "
            "that are not computed again, too"
        )
    return problems


def _source_problems(settings: DreamBoothSettings) -> list[str]:
    problems = []
    if settings.instance_data_dir and settings.dataset_name:
        problems.append("give either --instance_data_dir or --dataset_name, for the subject's images")
    if not settings.dataset_name:
        given = changed(settings, "dataset_config_name", "cache_dir", "image_column")
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
        "aspect_ratio_buckets coeff lora_rank train_text_encoder scale_lr push_to_hub fsdp": "it is for one subject",
    }
    problems = []
    if settings.optimizer not in ("adamw", "soap"):
        problems.append(
            f"--optimizer {settings.optimizer} does not go with --subjects, which adamw and soap train as alone"
        )
    return problems + [
        f"--{'no_' if getattr(settings, name) is False else ''}{name} does not go with --subjects: {reason}"
        for names, reason in excluded.items()
        for name in changed(settings, *names.split())
    ]


def _folder_problems(settings: DreamBoothSettings) -> list[str]:
    names = ("instance_data_dir", "class_data_dir", "output_dir")
    folders = {name: Path(value).resolve() for name in names if (value := getattr(settings, name))}
    return [
        f"--{one} and --{other} must be different folders"
        for one, other in combinations(folders, 2)
        if folders[one] == folders[other]
    ]


def _optimizer_problems(settings: DreamBoothSettings) -> list[str]:
    problems = []
    if settings.use_8bit_adam and settings.lora_optimizer != "adamw":
        problems.append(f"--use_8bit_adam is for --lora_optimizer adamw, not for {settings.lora_optimizer}")
    if "prodigy" in (settings.optimizer, settings.lora_optimizer):
        return problems + _prodigy_problems(settings)
    prodigys = [setting.name for setting in fields(settings) if setting.name.startswith("prodigy_")]
    problems += [f"--{name} needs --optimizer prodigy" for name in changed(settings, *prodigys)]
    if settings.use_8bit_adam and not settings.lora_rank:
        problems.append(
            "--use_8bit_adam would save nothing: bitsandbytes keeps 32 bits for layers of less than 4,096 values, as "
            "coefficients are; it is for a LoRA (--lora_rank)"
        )
    return problems


def _prodigy_problems(settings: DreamBoothSettings) -> list[str]:
    """Prodigy multiplies an estimate of its own by the learning rate, of which it takes one."""
    problems = []
    if settings.scale_lr:
        problems.append("--scale_lr is for --optimizer adamw; prodigy finds the rate itself")
    flags = {"optimizer": COEFFICIENT_RATES, "lora_optimizer": LORA_RATES}
    first, *others = [n for flag, names in flags.items() if getattr(settings, flag) == "prodigy" for n in names]
    flag, rate = "lora_optimizer" if first in LORA_RATES else "optimizer", getattr(settings, first)
    if 0 < rate < 0.1:
        problems.append(f"--{first} should be about 1 for --{flag} prodigy, which finds the rate, got {rate}")
    wrong = [f"--{name}" for name in others if getattr(settings, name) != rate]
    return problems + [f"{name} must be the --{first} for --{flag} prodigy, or left out" for name in wrong]


def _hub_problems(settings: DreamBoothSettings) -> list[str]:
    problems = [
        f"--{name} needs --push_to_hub"
        for name in changed(settings, "hub_model_id", "hub_token")
        if not settings.push_to_hub
    ]
    if settings.report_to in ("wandb", "all") and settings.hub_token:
        problems.append("--hub_token would be in wandb's log of the command line: use `hf auth login` instead")
    return problems


def idle_problems(settings: DreamBoothSettings, names: Collection[str]) -> list[str]:
    """Those of the names that have another value than by default, and no effect beside the other settings."""
    s = settings
    no_coefficients = "is of the coefficients, which --no_coeff leaves out"
    shown = s.validation_prompt or s.final_validation_prompt or s.subjects
    uses: dict[str, tuple[Any, str]] = {
        "coeff_kinds coeff_include coeff_exclude coeff_dropout": (s.coeff, no_coefficients),
        "adam_weight_decay": (s.coeff, f"{no_coefficients}: use --lora_weight_decay"),
        "learning_rate": (s.coeff or s.optimizer == "prodigy", f"{no_coefficients}: use --lora_learning_rate"),
        "text_encoder_lr": (s.coeff, f"{no_coefficients}: use --text_encoder_lora_lr"),
        "lora_alpha lora_dropout lora_layers use_dora lora_optimizer lora_learning_rate lora_weight_decay "
        "text_encoder_lora_lr": (s.lora_rank, "needs a --lora_rank of 1 or more"),
        "optimizer optimizer_args": (
            s.coeff or s.lora_optimizer == s.optimizer,
            f"{no_coefficients}: the LoRA has --lora_optimizer {s.lora_optimizer}",
        ),
        "adam_weight_decay_text_encoder": (
            s.train_text_encoder and s.lora_rank,
            "needs --train_text_encoder and a --lora_rank of 1 or more",
        ),
        "adam_beta1 adam_beta2 adam_epsilon": (
            any("adam" in name or name in ("prodigy", "soap") for name in (s.optimizer, s.lora_optimizer)),
            f"is for SOAP and optimizers with Adam in their name: give {s.optimizer} its own by --optimizer_args",
        ),
        "checkpoint_every": (s.gradient_checkpointing, "needs --gradient_checkpointing"),
        "augment_words": (s.augment, "needs --augment"),
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
    return [
        f"--{name} {reason}"
        for together, (used, reason) in uses.items()
        for name in changed(settings, *together.split())
        if not used and name in names
    ]
