"""DreamBooth with attention coefficients: a subject from a few images, the base model frozen.

    accelerate launch training/train_dreambooth.py --pretrained_model_name_or_path MODEL \\
        --instance_data_dir IMAGES --instance_prompt "a sks dog" --output_dir RESULT

Reads from top to bottom: `main`, `run`, what `run` calls. Flags are in settings.py, images in data.py, the loop in
loop.py, and what is particular to a family of models in families/.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration, broadcast_object_list, set_seed
from diffusers.utils import is_peft_available
from PIL import Image
from torch import nn

import coeff_diffusers
from coeff_diffusers import CoeffConfig, add_coeff_adapter, coeff_adapters, coeff_parameters, save_coeff_weights
from coeff_diffusers.console import escaped_output
from coeff_diffusers.layers import select_layers

from ..adapters.lora import add_lora, lora_targets, save_lora
from ..adapters.text_encoders import add_text_encoder_adapters, check_text_encoders
from ..errors import InputError
from ..families import Family, find_family, load_family
from ..images.buckets import buckets_text, nearest_bucket, parse_buckets
from ..images.class_images import check_class_folder, complete_class_images
from ..images.files import TrainingImage, folder_images
from ..images.hub_datasets import dataset_images
from ..images.latents import check_cacheable
from ..results.files import check_output_folder, size_text, write_grid, write_text
from ..results.hub import check_hub, open_repository, push
from ..results.model_card import write_card
from ..results.trackers import check_trackers, end_training, log_images, start_trackers
from ..results.validation import all_validation_prompts, of_final_images, validation_calls, validation_images
from ..settings.dreambooth import DEFAULT_STEPS, DEFAULT_VALIDATION_STEPS, RATES, DreamBoothSettings, parse_settings
from .checkpoints import Checkpoints, check_agreement, check_same_run, facts_of_run, find_checkpoint, with_seed_of
from .loop import Images, Trainee, train
from .memory import peak_memory_text, release_frozen_text_encoders, release_text_encoders
from .optimizers import check_optimizer
from .sharding import check_processes, held
from .stopping import Stopped
from .subjects import read_subject_images, read_subjects

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PATIENCE = timedelta(hours=2)  # of the other processes, while the main one makes validation images


@dataclass(frozen=True)
class TrainingResult:
    """What a run wrote, and how it went.

    Args:
        settings: of the run, with what was left open filled in.
        trained: how many numbers were trained, of `"coefficients"`, `"lora"`, and these with `"text_encoder_"` before
            them, where they were.
        losses: of each optimizer step, the mean over its batches.
        coeff_file: the coefficients; `None` with `--no_coeff`.
        lora_file: the LoRA; `None` without `--lora_rank`.
        images: the last validation's grid, then its single images row by row; empty without prompts.
        model_card: README.md.
        settings_file: config.yaml, to run again by `--config`.
    """

    settings: DreamBoothSettings
    trained: dict[str, int]
    losses: list[float]
    coeff_file: Path | None
    lora_file: Path | None
    images: list[Path]
    model_card: Path
    settings_file: Path


def main(argv: Sequence[str] | None = None) -> TrainingResult | dict[str, TrainingResult] | None:
    """Runs the command line `argv`; `None` is this process's own. Returns as [`run`], or as [`run_subjects`]."""
    settings = parse_settings(argv)
    return run_subjects(settings) if settings.subjects else run(settings)


@escaped_output()
def run(settings: DreamBoothSettings) -> TrainingResult | None:
    """Trains, and writes everything to `settings.output_dir`.

    Returns:
        What was written; `None` in all processes but the main one.

    Raises:
        InputError: if something that was given cannot be used. Nothing has been trained then.
        FloatingPointError: if the loss is no longer finite.
        Stopped: after SIGTERM or Ctrl-C; a checkpoint has been saved.
    """
    check_optimizer(settings)
    check_trackers(settings)
    check_hub(settings)
    check_output_folder(settings)
    images = Images(read_images(settings))
    check_cacheable(images.instance, settings)
    if settings.with_prior_preservation:
        check_cacheable(check_class_folder(settings), settings)
    kind = find_family(settings)

    accelerator = start_accelerator(settings)
    check_processes(settings, accelerator)
    resumed = find_checkpoint(settings, accelerator.print)
    check_agreement(resumed)
    settings = with_seed_of(resumed, settings)
    family = load_family(kind, settings, accelerator.device, DTYPES[accelerator.mixed_precision])
    prompts = [*images.prompts, *filter(None, [settings.class_prompt]), *all_validation_prompts(settings)]
    family.check_prompts(prompts)
    check_adapters(family, settings)
    repository = open_repository(settings) if settings.push_to_hub and accelerator.is_main_process else None
    check_buckets(family, settings)
    settings = family.settings = with_defaults_of_run(settings, family, len(images.instance), accelerator)
    if settings.with_prior_preservation:
        images = replace(images, classes=complete_class_images(family, settings, accelerator))

    facts = facts_of_run(settings, [*images.instance, *images.classes], accelerator.num_processes)
    if resumed is not None:
        check_same_run(resumed, facts)
    if accelerator.is_main_process:  # now, so that a run that is stopped can be continued with it
        write_text(replace(settings, resume_from_checkpoint=None).to_yaml(), Path(settings.output_dir) / "config.yaml")

    set_seed(settings.seed)  # of the LoRA's first values, the same in all processes
    parameters = add_adapters(family, settings)
    check_trainable(family, parameters)
    accelerator.print(count_text(family, parameters), f"Seed: {settings.seed}.")
    if buckets := parse_buckets(settings.aspect_ratio_buckets):
        once = dict.fromkeys(images.instance)
        chosen = [nearest_bucket(image.height, image.width, buckets) for image in once]
        accelerator.print(buckets_text(chosen, buckets))

    shown = [*images.prompts, *([""] if settings.caption_dropout else [])]
    to_come = replace(settings, validation_prompt=all_validation_prompts(settings))
    calls = [call for row in validation_calls(family, to_come) for call in row]
    if settings.train_text_encoder:
        with accelerator.autocast():
            release_frozen_text_encoders(family, shown, calls)
    else:
        family.remember_prompts(shown)
        with accelerator.autocast():
            release_text_encoders(family, calls)

    start_trackers(settings, accelerator)
    show, show_last = (partial(validate, family, s, accelerator) for s in (settings, of_final_images(settings)))
    write = partial(write_weights, family, settings)
    trainee = Trainee.of(parameters, settings)
    checkpoints = Checkpoints(settings, accelerator, facts, write, resumed)
    losses = train(family, trainee, images, settings, accelerator, show, checkpoints)
    with trainee.averaged():
        weights = write(Path(settings.output_dir)) if accelerator.is_main_process else {}
        images = show_last(len(losses))
    accelerator.print(peak_memory_text(accelerator))
    end_training(accelerator)
    if not accelerator.is_main_process:
        return None
    result = write_results(family, parameters, settings, losses, weights, images)
    if repository:
        print(f"Pushed: {push(settings, repository)}")
    return result


@escaped_output()
def run_subjects(settings: DreamBoothSettings) -> dict[str, TrainingResult]:
    """Trains many subjects at once, and writes a folder for each into `settings.output_dir`.

    Returns:
        Subject -> what was written, of those that this process trained.

    Raises:
        InputError: if something that was given cannot be used. Nothing has been trained then.
        FloatingPointError: if a loss is no longer finite.
        Stopped: after SIGTERM or Ctrl-C; a checkpoint has been saved.
    """
    check_trackers(settings)
    check_output_folder(settings)
    subjects = read_subjects(str(settings.subjects))
    images = read_subject_images(subjects, settings)
    check_cacheable(list(chain(*images.values())), settings)
    for subject in subjects:
        check_output_folder(subject.alone(settings))
    kind = find_family(settings)

    accelerator = start_accelerator(settings)
    check_processes(settings, accelerator)
    if len(subjects) < accelerator.num_processes:
        raise InputError(f"--subjects: {len(subjects)} are too few for {accelerator.num_processes} processes")
    resumed = find_checkpoint(settings, accelerator.print)
    check_agreement(resumed)
    settings = with_seed_of(resumed, settings)
    family = load_family(kind, settings, accelerator.device, DTYPES[accelerator.mixed_precision])
    prompts = chain(*((*subject.validation_prompt, subject.class_prompt or "") for subject in subjects))
    family.check_prompts([*(image.prompt for image in chain(*images.values())), *prompts])
    check_adapters(family, settings)
    settings = family.settings = with_defaults_of_run(settings, family, 0, accelerator)
    classes: dict[str, list[TrainingImage]] = {name: [] for name in images}
    if settings.with_prior_preservation:
        classes = {each.name: complete_class_images(family, each.alone(settings), accelerator) for each in subjects}

    everything = list(chain(*images.values(), *classes.values()))
    facts = facts_of_run(settings, everything, accelerator.num_processes)
    facts["settings"]["subjects"] = ", ".join(f"{name} ({len(shown)} images)" for name, shown in images.items())
    if resumed is not None:
        check_same_run(resumed, facts)
    if accelerator.is_main_process:
        write_text(replace(settings, resume_from_checkpoint=None).to_yaml(), Path(settings.output_dir) / "config.yaml")

    with accelerator.split_between_processes(subjects) as share:
        alone = {subject.name: subject.alone(settings) for subject in share}
    parameters = {name: add_subject(family, name, settings) for name in alone}
    together = {"coefficients": list(chain(*parameters.values()))}
    check_trainable(family, together)
    accelerator.print(count_text(family, together), f"Seed: {settings.seed}. Subjects: {len(subjects)}.")

    own_images = Images([], subjects={name: Images(images[name], classes[name]) for name in alone})
    family.remember_prompts([*own_images.prompts, *([""] if settings.caption_dropout else [])])
    calls = [call for each in alone.values() for row in validation_calls(family, each) for call in row]
    with accelerator.autocast():
        release_text_encoders(family, calls)

    start_trackers(settings, accelerator)
    last = {name: of_final_images(each) for name, each in alone.items()}
    show, show_last = (partial(validate_subjects, family, each, accelerator) for each in (alone, last))
    trainee = Trainee.of(together, settings)
    trainee.subjects = parameters
    checkpoints = Checkpoints(settings, accelerator, facts, partial(write_subjects, family, alone), resumed)
    losses = train(family, trainee, own_images, settings, accelerator, show, checkpoints)
    with trainee.averaged():
        weights = {name: write_weights(family, each, Path(each.output_dir), name) for name, each in alone.items()}
        images = show_last(len(losses))
    accelerator.print(peak_memory_text(accelerator))
    end_training(accelerator)
    for each in alone.values():
        write_text(each.to_yaml(), Path(each.output_dir) / "config.yaml")
    return {
        name: write_results(
            family,
            {"coefficients": parameters[name]},
            each,
            trainee.losses_by_subject[name],
            weights[name],
            images.get(name, []),
        )
        for name, each in alone.items()
    }


def add_subject(family: Family, name: str, settings: DreamBoothSettings) -> list[nn.Parameter]:
    """Puts on a subject's coefficients, and returns them."""
    add_coeff_adapter(family.denoiser, coeff_config(settings), adapter_name=name)
    return coeff_parameters(family.denoiser, name)


def write_subjects(family: Family, alone: dict[str, DreamBoothSettings], folder: Path) -> None:
    """Writes the coefficients of each subject into one folder, in files of their names."""
    for name, settings in alone.items():
        file = f"{name}.safetensors"
        save_coeff_weights(family.pipeline, folder, weight_name=file, adapter_name=name, metadata=metadata(settings))


def validate_subjects(
    family: Family, alone: dict[str, DreamBoothSettings], accelerator: Accelerator, step: int
) -> dict[str, list[Path]]:
    """Generates and writes the validation images of each subject by its own coefficients: subject -> the files."""
    files = {}
    for name, settings in alone.items():
        if settings.validation_prompt:
            with coeff_adapters(family.denoiser, name):
                rows = validation_images(family, settings, accelerator)
            prompts = [f"{name}: {prompt}" for prompt in settings.validation_prompt]
            files[name] = write_images(dict(zip(prompts, rows)), settings, accelerator, step)
    accelerator.wait_for_everyone()
    return files


def read_images(settings: DreamBoothSettings) -> list[TrainingImage]:
    """The subject's images, as often as a pass shows each."""
    if settings.dataset_name is not None:
        return dataset_images(settings) * settings.repeats
    images = folder_images(
        settings.instance_data_dir or "",
        "instance_data_dir",
        settings.instance_prompt,
        settings.caption_column,
        settings.caption_extension,
    )
    return images * settings.repeats


def start_accelerator(settings: DreamBoothSettings) -> Accelerator:
    """Raises InputError if the device has not the precision asked for."""
    torch.backends.cuda.matmul.allow_tf32 = settings.allow_tf32
    # of an earlier run in this process, which had another precision, ended its group of processes, or broke off
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    output_dir = Path(settings.output_dir)
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            mixed_precision=settings.mixed_precision,
            log_with=None if settings.report_to == "none" else settings.report_to,
            project_config=ProjectConfiguration(str(output_dir), logging_dir=str(output_dir / settings.logging_dir)),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except ValueError as error:  # a precision that the device does not have
        raise InputError(f"--mixed_precision: {error}") from error
    precision, device = accelerator.mixed_precision, accelerator.device.type
    if precision not in DTYPES:
        raise InputError(f"--mixed_precision must be of {', '.join(DTYPES)}, got {precision} from accelerate's config")
    if precision == "fp16" and device == "cpu":  # accelerate would run without autocast
        raise InputError("--mixed_precision fp16 needs a GPU, and this runs on cpu; use bf16 or no")
    return accelerator


def with_defaults_of_run(
    settings: DreamBoothSettings, family: Family, images: int, accelerator: Accelerator
) -> DreamBoothSettings:
    """Fills in seed, resolution, steps and learning rates. The result, given as flags, is the same run again."""
    seed = [secrets.randbelow(2**31) if settings.seed is None else settings.seed]
    broadcast_object_list(seed)  # a seed that is drawn must be the same in all processes
    a_step = settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    steps = settings.max_train_steps or DEFAULT_STEPS
    if settings.num_train_epochs is not None:
        steps = math.ceil(settings.num_train_epochs * images / a_step)
    validation_steps = settings.validation_steps or DEFAULT_VALIDATION_STEPS
    if settings.validation_epochs is not None:
        validation_steps = math.ceil(settings.validation_epochs * images / a_step)
    scale = a_step if settings.scale_lr else 1
    rates = [name for name in RATES if settings.train_text_encoder or not name.startswith("text_encoder")]
    return replace(
        settings,
        seed=seed[0],
        resolution=family.check_size(settings.resolution or family.own_resolution, "resolution"),
        max_train_steps=steps,
        num_train_epochs=None,
        validation_steps=validation_steps,
        validation_epochs=None,
        **{name: getattr(settings, name) * scale for name in rates},
        scale_lr=False,
        mixed_precision=accelerator.mixed_precision,
    )


def check_buckets(family: Family, settings: DreamBoothSettings) -> None:
    """Raises InputError if images of this model cannot have the size of a bucket."""
    for bucket in parse_buckets(settings.aspect_ratio_buckets):
        for side in bucket:
            family.check_size(side, "aspect_ratio_buckets")


def check_adapters(family: Family, settings: DreamBoothSettings) -> None:
    """Raises InputError if what is to be trained cannot be put on the model; before class images take their time."""
    if settings.lora_rank and not is_peft_available():
        raise InputError("--lora_rank needs peft: pip install 'coeff_diffusers[lora]'")
    lora_targets(family, settings)
    if settings.coeff:
        try:
            select_layers(family.denoiser, coeff_config(settings))
        except ValueError as error:  # a pattern or a kind that no layer has
            raise InputError(f"--coeff_kinds, --coeff_include, --coeff_exclude: {error}") from error
    if settings.train_text_encoder:
        check_text_encoders(family, settings)


def coeff_config(settings: DreamBoothSettings) -> CoeffConfig:
    return CoeffConfig(
        include=settings.coeff_include,
        exclude=settings.coeff_exclude,
        kinds=settings.coeff_kinds,
        dropout=settings.coeff_dropout,
    )


def add_adapters(family: Family, settings: DreamBoothSettings) -> dict[str, list[nn.Parameter]]:
    """Puts on what is trained: `"coefficients"`, `"lora"`, ... -> their parameters, where they are asked for."""
    parameters = {}
    if settings.lora_rank:
        parameters["lora"] = add_lora(family.denoiser, settings, lora_targets(family, settings))
    if settings.coeff:
        add_coeff_adapter(family.denoiser, coeff_config(settings))
        parameters = {"coefficients": coeff_parameters(family.denoiser)} | parameters
    if settings.train_text_encoder:
        parameters |= add_text_encoder_adapters(family, settings)
    return parameters


def check_trainable(family: Family, parameters: dict[str, list[nn.Parameter]]) -> None:
    """Raises RuntimeError unless exactly these parameters require a gradient, in float32."""
    expected = {parameter for group in parameters.values() for parameter in group}
    names = {p: f"{what} {n}" for what, group in parameters.items() for n, p in enumerate(group)}
    for component, part in family.pipeline.components.items():
        if isinstance(part, nn.Module):
            names |= {parameter: f"{component}.{name}" for name, parameter in part.named_parameters()}
    problems = []
    for parameter, name in names.items():
        if parameter.requires_grad != (parameter in expected):
            problems.append(f"{name} " + ("trains" if parameter.requires_grad else "is frozen"))
        if parameter.requires_grad and parameter.dtype != torch.float32:
            problems.append(f"{name} trains in {parameter.dtype}")
    if problems:
        raise RuntimeError("only coefficients and LoRA may train, in float32, but:\n  " + "\n  ".join(problems))


def count_text(family: Family, parameters: dict[str, list[nn.Parameter]]) -> str:
    parts = [part for part in family.pipeline.components.values() if isinstance(part, nn.Module)]
    trained = numbers(parameters)
    frozen = [p for part in parts for p in part.parameters() if not p.requires_grad]
    count, here = sum(p.numel() for p in frozen), sum(held(p) for p in frozen)
    detail = ", ".join(f"{what} {count:,}" for what, count in trained.items())
    return f"Numbers trained: {sum(trained.values()):,} ({detail}). Frozen: {count:,}" + (
        f", of which each process holds about {here:,}." if here < count else "."
    )


def numbers(parameters: dict[str, list[nn.Parameter]]) -> dict[str, int]:
    return {what: sum(p.numel() for p in group) for what, group in parameters.items()}


def validate(family: Family, settings: DreamBoothSettings, accelerator: Accelerator, step: int) -> list[Path]:
    """Generates, writes and logs the validation images; the main process returns the files, the grid's first."""
    files: list[Path] = []
    if settings.validation_prompt and (accelerator.is_main_process or settings.fsdp):
        rows = validation_images(family, settings, accelerator)
    if settings.validation_prompt and accelerator.is_main_process:
        files = write_images(dict(zip(settings.validation_prompt, rows)), settings, accelerator, step)
    accelerator.wait_for_everyone()
    return files


def write_images(
    rows: dict[str, list[Image.Image]], settings: DreamBoothSettings, accelerator: Accelerator, step: int
) -> list[Path]:
    """Writes and logs a row a prompt, and returns the files; if that fails, as on a full disk, it says so."""
    folder = Path(settings.output_dir) / "validation" / f"step-{step:06d}"
    try:
        files = write_grid(list(rows.values()), folder)
        if accelerator.is_main_process:
            log_images(accelerator.trackers, rows, step)
        return files
    except OSError as error:
        print(f"The images of step {step} could not be written: {error}. The run goes on.", file=sys.stderr)
        return []


def write_weights(
    family: Family, settings: DreamBoothSettings, folder: Path, adapter_name: str = "default"
) -> dict[str, Path]:
    """Writes what was trained into `folder`: `"coefficients"` and `"lora"` -> the file."""
    files = {}
    if settings.coeff:
        files["coefficients"] = save_coeff_weights(
            family.pipeline, folder, adapter_name=adapter_name, metadata=metadata(settings)
        )
    if settings.lora_rank:
        files["lora"] = save_lora(family, folder)
    return files


def metadata(settings: DreamBoothSettings) -> dict[str, str]:
    """What a coefficient file says of its training."""
    values = {
        "instance_prompt": settings.instance_prompt,
        "class_prompt": settings.class_prompt,
        "steps": settings.max_train_steps,
        "batch_size": settings.train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "resolution": settings.resolution,
        "aspect_ratio_buckets": settings.aspect_ratio_buckets,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": settings.lr_scheduler,
        "coeff_dropout": settings.coeff_dropout,
        "lora_rank": settings.lora_rank,
        "seed": settings.seed,
        "mixed_precision": settings.mixed_precision,
        "coeff_diffusers_version": coeff_diffusers.__version__,
        "diffusers_version": diffusers.__version__,
        "torch_version": torch.__version__,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def write_results(
    family: Family,
    parameters: dict[str, list[nn.Parameter]],
    settings: DreamBoothSettings,
    losses: list[float],
    weights: dict[str, Path],
    images: list[Path],
) -> TrainingResult:
    """Writes the model card, and says what the run wrote."""
    folder = Path(settings.output_dir)
    settings_file = folder / "config.yaml"
    pipeline_class, of_card = type(family.pipeline).__name__, of_final_images(settings)
    model_card = write_card(folder, of_card, pipeline_class, numbers(parameters), weights, images)
    print("Written:")
    for file in [*weights.values(), *images[:1], model_card, settings_file]:
        print(f"  {file} ({size_text(file)})")
    return TrainingResult(
        settings=settings,
        trained=numbers(parameters),
        losses=losses,
        coeff_file=weights.get("coefficients"),
        lora_file=weights.get("lora"),
        images=images,
        model_card=model_card,
        settings_file=settings_file,
    )


def main_command() -> None:
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
