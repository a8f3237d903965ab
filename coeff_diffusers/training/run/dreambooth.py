"""A run of DreamBooth with attention coefficients, from its settings to its files.

    run = DreamBoothRun(settings)    checks the settings and reads the images, before anything is loaded
    run.load_model()                 text encoders encode all prompts and go, then the rest of the base model comes
    run.add_adapters()               coefficients, at zero, and a LoRA if asked for
    run.encode_prompts()             where text encoders train: by those that do not
    for step in run.steps(): ...     each one optimizer step; checkpoints and validation are made in between
    result = run.finish()            weights, images, model card

[`train_dreambooth`] is all of it.
"""

from __future__ import annotations

import math
import secrets
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, TypeVar, cast

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from safetensors import SafetensorError
from torch import Tensor

import coeff_diffusers
from coeff_diffusers import coeff_adapters
from coeff_diffusers.console import escaped_output, hush
from coeff_diffusers.sampling import sampling_defaults

from ..adapters import (
    add_adapters,
    check_adapters,
    check_trainable,
    count_parameters,
    save_weights,
    trainable_parameters_text,
)
from ..errors import WriteError
from ..families import Family, find_family, find_quantization, load_family, pipeline_index
from ..images.augment import plain
from ..images.buckets import buckets_text, nearest_bucket
from ..images.class_images import complete_class_images
from ..images.dreambooth_dataset import Crop
from ..images.files import TrainingImage
from ..images.latents import encode_crops, is_cacheable, release_vae
from ..images.subject_images import GivenImages, SubjectImages
from ..images.subjects_dataset import SubjectsDataset
from ..results.files import check_output_folder, missing_folders, size_text, write_grid
from ..results.hub import check_hub, open_repository, push
from ..results.model_card import card_of_run, write_card
from ..results.trackers import check_trackers, end_training, log_images, start_trackers
from ..results.validation import all_prompts, final_prompts, run_calls, validation_calls
from ..settings.dreambooth import DEFAULT_STEPS, DEFAULT_VALIDATION_STEPS, RATES, DreamBoothSettings
from ..settings.rules import parse_buckets
from ..writing import write_text
from .checkpoints import Checkpoints, as_begun, check_agreement, check_same_run, facts_of_run, find_checkpoint
from .lock import OutputLock, remove_empty_folders, take_together
from .loop import TrainingStep, advice, make_batches, make_dataset, stop, stops, training_steps
from .memory import (
    checkpoint_blocks,
    offloaded_activations,
    peak_memory_text,
    release_frozen_text_encoders,
    release_text_encoders,
)
from .offload import offload_blocks
from .optimizers import check_optimizer
from .plan import fitting
from .processes import DTYPES, check_processes, start_accelerator
from .state import TrainingState
from .step import DenoisingStep
from .stopping import stop_request
from .subjects import ManySubjects, OneSubject, Subjects

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingResult:
    """What a run wrote, and how it went.

    Args:
        settings: of the run, with what was left open filled in.
        trained: the number of trainable parameters of `"coefficients"`, `"lora"`, and these with `"text_encoder_"`
            before them, where they were.
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


@escaped_output()
def train_dreambooth(
    settings: DreamBoothSettings,
    images: GivenImages | None = None,
    *,
    on_step: Callable[[TrainingStep], object] | None = None,
    cancel: Event | None = None,
) -> TrainingResult | dict[str, TrainingResult] | None:
    """Trains, and writes everything to `settings.output_dir`.

    Args:
        settings: of the run.
        images: the subject's, of Pillow, each alone or with its prompt, instead of a folder or data set in `settings`.
        on_step: is called after each optimizer step.
        cancel: once it is set, from any thread, a checkpoint is saved after the step and [`Stopped`] is raised.

    Returns:
        What was written; `None` in all processes but the main one. With `--subjects`: subject -> what was written, of
        those that this process trained.

    Raises:
        InputError: if something that was given cannot be used. Nothing has been trained then.
        FloatingPointError: if a loss is no longer finite.
        Stopped: after SIGTERM, Ctrl-C or `cancel`; a checkpoint has been saved.
    """
    hush()
    run = DreamBoothRun(settings, images, cancel=cancel)
    run.load_model()
    run.add_adapters()
    run.encode_prompts()
    for step in run.steps():
        if on_step is not None:
            on_step(step)
    return run.finish()


class DreamBoothRun:
    """A run, step by step; its methods are called in their order.

    Args:
        settings: of the run.
        images: as of [`train_dreambooth`].
        cancel: likewise.

    Attributes:
        settings: with what was left open filled in, once the model is loaded.
        accelerator: of accelerate.
        family: the base model, and what is particular about it; once it is loaded.
        state: parameters, optimizer, learning rates, losses; once adapters are added.

    Raises:
        InputError: if settings or images cannot be used. Nothing has been loaded then.
    """

    def __init__(
        self, settings: DreamBoothSettings, images: GivenImages | None = None, *, cancel: Event | None = None
    ) -> None:
        self._lock: OutputLock | None = None
        self._made = missing_folders(settings.output_dir)
        self._cancel = cancel
        with self._holding_folder():
            self._start(settings, images)

    def _start(self, settings: DreamBoothSettings, images: GivenImages | None) -> None:
        check_optimizer(settings)
        check_trackers(settings.report_to)
        check_hub(settings)
        check_output_folder(settings.output_dir)
        self.subjects: Subjects = ManySubjects(settings.subjects) if settings.subjects else OneSubject()
        self.images = self.subjects.read_images(settings, images)
        for alone in self.subjects.settings(settings).values():
            self._made = list(dict.fromkeys((*missing_folders(alone.output_dir), *self._made)))
            check_output_folder(alone.output_dir)
        self._index = pipeline_index(settings)
        self._kind = find_family(settings, self._index)
        self.accelerator: Accelerator = start_accelerator(settings, settings)
        self.own = self.subjects.own(self.accelerator)
        if self.accelerator.is_main_process:
            self._lock = OutputLock(settings.output_dir, list(self.images) if self.subjects.several else ())
            weakref.finalize(self, self._lock.release)
        take_together(self._lock)
        self.resumed = find_checkpoint(settings.resume_from_checkpoint, settings.output_dir, self.accelerator.print)
        check_agreement(self.resumed)
        begun = as_begun(self.resumed, settings, self.accelerator.print)
        if replace(begun, seed=settings.seed) != settings:  # its precision and its accumulation among it
            self.accelerator = start_accelerator(begun, begun)
        self.settings = settings = self._fitting(begun)
        check_processes(settings, settings, self.subjects.several, self.accelerator)
        self._quantization = find_quantization(
            settings, self._index, settings.train_text_encoder, self.accelerator.device
        )

    def _fitting(self, settings: DreamBoothSettings) -> DreamBoothSettings:
        """With what makes the run fit into memory, if that is asked for: as the main process finds, in all."""
        fits = [settings]
        if self.accelerator.is_main_process:
            cacheable = is_cacheable(list(chain(*self.images.values())), settings)
            accelerator = self.accelerator
            fits = [
                fitting(
                    self._kind,
                    settings,
                    self._index,
                    accelerator.device,
                    accelerator.mixed_precision,
                    cacheable,
                    len(self.images),
                    accelerator.print,
                )
            ]
        broadcast_object_list(fits)
        if fits[0] != settings:  # its precision and its accumulation among it
            self.accelerator = start_accelerator(fits[0], fits[0])
        return fits[0]

    @contextmanager
    def _holding_folder(self) -> Iterator[None]:
        """Has the output folder for this run; after an error, lets go of it, and of what was made and is empty."""
        if self._lock:
            self._lock.take()
        try:
            yield
        except BaseException:
            if self._lock:
                self._lock.release()
            remove_empty_folders(self._made)
            raise

    def load_model(self) -> None:
        """The base model, frozen, and class images, where they are missing.

        Text encoders that do not train encode all prompts, and are released, before the denoiser is loaded, and so
        does the VAE with cached latents; but where class images are missing it generates them first.

        Raises:
            InputError: if the settings do not go with this model, or with the checkpoint that is resumed.
        """
        with self._holding_folder():
            self._load_model()
        self._made = []  # from here on they are of use

    def _load_model(self) -> None:
        settings, accelerator = self.settings, self.accelerator
        dtype = DTYPES[accelerator.mixed_precision]
        family = load_family(
            self._kind,
            settings,
            settings,
            accelerator.device,
            dtype,
            self._quantization,
            self._index,
            settings.fsdp,
            partial(offload_blocks, accelerator=accelerator) if settings.group_offload else None,
        )
        self.family: Family = family
        self._sampling = sampling_defaults(family.pipeline)
        alone = self.subjects.settings(settings)
        prompts = [*chain(*(SubjectImages(images).prompts(settings) for images in self.images.values()))]
        prompts += chain(*((*filter(None, [each.class_prompt]), *all_prompts(each)) for each in alone.values()))
        family.check_prompts(prompts)
        self._prompt = prompts[0]
        check_adapters(family, settings, self._prompt)
        self.repository: str | None = None
        if settings.push_to_hub and accelerator.is_main_process:
            self.repository = open_repository(settings, settings.output_dir)
        for side in chain(*parse_buckets(settings.aspect_ratio_buckets)):
            family.check_size(side, "aspect_ratio_buckets")
        shown = len(next(iter(self.images.values())))
        settings = self.settings = with_defaults_of_run(settings, family, shown, accelerator)
        self.alone = self.subjects.settings(settings)
        self._classes: dict[str, list[TrainingImage]] = {name: [] for name in self.alone}
        if settings.with_prior_preservation:
            self._classes = {
                name: complete_class_images(
                    family,
                    each,
                    accelerator,
                    resolution=self.resolution,
                    seed=self.seed,
                    batch_size=settings.sample_batch_size,
                    fsdp=settings.fsdp,
                )
                for name, each in self.alone.items()
            }
        self._shown = {name: SubjectImages(self.images[name], self._classes[name]) for name in self.own}
        if not settings.train_text_encoder:
            self._encode_prompts()
        self._moments = self._encode_images() if settings.cache_latents else {}
        family.load_denoiser()
        everything = [*chain(*self.images.values()), *chain(*self._classes.values())]
        self._facts = facts_of_run(settings, everything, family.denoiser, accelerator.num_processes)
        if self.subjects.several:
            texts = (f"{name} ({len(images)} pictures)" for name, images in self.images.items())
            self._facts["settings"]["subjects"] = ", ".join(texts)
        if self.resumed is not None:
            check_same_run(self.resumed, self._facts)
        if accelerator.is_main_process:  # now, so that a run that is stopped can be resumed with it
            self._write_config(replace(settings, resume_from_checkpoint=None))

    @property
    def seed(self) -> int:
        return int(self.settings.seed or 0)

    @property
    def resolution(self) -> int:
        return int(self.settings.resolution or 0)

    @property
    def max_train_steps(self) -> int:
        return int(self.settings.max_train_steps or 0)

    def add_adapters(self) -> None:
        """Puts on what is trained."""
        with self._holding_folder():
            self._add_adapters()

    def _add_adapters(self) -> None:
        settings, family, accelerator = self.settings, self.family, self.accelerator
        set_seed(self.seed)  # of the LoRA's first values, the same in all processes
        parameters = {name: add_adapters(family, self.alone[name], self._prompt, name) for name in self.own}
        kinds = dict.fromkeys(chain(*parameters.values()))
        together = {kind: list(chain(*(each.get(kind, []) for each in parameters.values()))) for kind in kinds}
        check_trainable(family, together)
        if settings.group_offload:  # adapters are put where their blocks' weights are, in the CPU's memory
            for parameter in chain(*together.values()):
                parameter.data = parameter.data.to(accelerator.device)
        self.trained = {name: count_parameters(each) for name, each in parameters.items()}
        count = f" Subjects: {len(self.alone)}." if self.subjects.several else ""
        accelerator.print(f"{trainable_parameters_text(family, together)}\nSeed: {self.seed}.{count}")
        if buckets := parse_buckets(settings.aspect_ratio_buckets):
            once = dict.fromkeys(chain(*self.images.values()))
            chosen = [nearest_bucket(image.height, image.width, buckets) for image in once]
            accelerator.print(buckets_text(chosen, buckets))
        self.state = TrainingState(
            together,
            {name: list(chain(*each.values())) for name, each in parameters.items()},
            settings,
            self.max_train_steps,
            settings.ema_decay if settings.use_ema else None,
        )
        self.checkpoints = Checkpoints(
            Path(settings.output_dir),
            settings.checkpoints_total_limit,
            accelerator,
            self._facts,
            self.subjects,
            self._write_all_weights,
            self.resumed,
        )

    def encode_prompts(self) -> None:
        """With --train_text_encoder, what text encoders that do not train say of the prompts; they are released.

        Without it `load_model` has encoded all prompts, and released all text encoders.
        """
        if self.settings.train_text_encoder:
            with self._holding_folder():
                self._encode_prompts()

    def _encode_prompts(self) -> None:
        family = self.family
        prompts = [*chain(*(each.prompts(self.settings) for each in self._shown.values()))]
        prompts += [""] if self.settings.caption_dropout else []
        calls = [call for name in self.own for call in chain(*self._calls(name, all_prompts(self.alone[name])))]
        if self.settings.train_text_encoder:
            with self.accelerator.autocast():
                release_frozen_text_encoders(family, prompts, calls)
        else:
            family.remember_prompts(prompts)
            with self.accelerator.autocast():
                release_text_encoders(family, calls)

    def _dataset(self, first_step: int) -> SubjectsDataset:
        """What the run shows from a step on."""
        settings, sharing = self.settings, self.subjects.sharing(self.accelerator)[0]
        return make_dataset(
            self._shown,
            settings,
            resolution=self.resolution,
            seed=self.seed,
            step_draws=settings.train_batch_size * settings.gradient_accumulation_steps * sharing,
            first_step=first_step,
            steps=self.max_train_steps,
        )

    def _encode_images(self) -> dict[Crop, Tensor]:
        """The latents of all images, after which the VAE is released, as far as it can be."""
        dataset = self._dataset(0 if self.resumed is None else self.resumed.step)
        moments = encode_crops(self.family, dataset, silent=not self.accelerator.is_main_process)
        release_vae(self.family, keep_decoder=any(all_prompts(self.alone[name]) for name in self.own))
        return moments

    def steps(self) -> Iterator[TrainingStep]:
        """Trains: yields after each optimizer step; then checkpoints and validation follow where they are due.

        Raises:
            FloatingPointError: if the loss, or a trainable parameter, is no longer finite.
            Stopped: after a signal or `cancel`; a checkpoint has been saved.
            InputError: if the checkpoint that is resumed does not fit, or another run was started into the folder.
        """
        with self._holding_folder():
            yield from self._steps()

    def _steps(self) -> Iterator[TrainingStep]:
        settings, family, accelerator, state = self.settings, self.family, self.accelerator, self.state
        start_trackers(settings.public(), accelerator)
        self.checkpoints.restore(state)
        if len(state.losses) >= self.max_train_steps:
            return
        if settings.gradient_checkpointing:
            trained: list[Any] = family.trained_text_encoders
            if not settings.group_offload:  # which does so itself
                checkpoint_blocks(family.denoiser, settings.checkpoint_every)
            for encoder in trained:
                encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        dataset = self._dataset(len(state.losses))
        dataset.moments = self._moments
        step: Any = DenoisingStep(family, family.trained_text_encoders, state.all_parameters)
        batches: Any = make_batches(dataset, settings.train_batch_size, settings.dataloader_num_workers)
        whole = not settings.group_offload
        step, state.optimizer, batches = self.subjects.prepare(step, state.optimizer, batches, accelerator, whole)
        step.train()
        with stop_request(self._cancel) as request:
            yield from training_steps(
                family,
                step,
                batches,
                state,
                self.subjects,
                settings,
                accelerator,
                steps=self.max_train_steps,
                seed=self.seed,
                prior_loss_weight=settings.prior_loss_weight,
                max_grad_norm=settings.max_grad_norm,
                saving=offloaded_activations(accelerator) if settings.offload_activations else nullcontext,
                after_step=lambda: self._after_step(request),
                safe_text=self.checkpoints.safe_text,
            )

    def _after_step(self, request: Any) -> None:
        """Saves, stops and validates, where it is time to."""
        if self._lock:
            self._lock.take()
        settings, state, steps = self.settings, self.state, self.max_train_steps
        done = len(state.losses)
        rate = settings.learning_rate if settings.coeff and settings.optimizer != "prodigy" else None
        if text := advice(state.losses, steps, rate, bool(settings.lora_rank)):
            self.accelerator.print(text)
        last, stopping = done == steps, stops(request, self.accelerator)
        if not stopping or last:
            if done % settings.checkpointing_steps == 0:
                self.checkpoints.save(state)
            if not last and done % int(settings.validation_steps or steps) == 0:
                with state.averaged():
                    self._validate({name: each.validation_prompt for name, each in self.alone.items()})
                stopping = stops(request, self.accelerator)  # images take their time
        if stopping and not last:
            stop(state, steps, request, self.checkpoints)

    def finish(self) -> TrainingResult | dict[str, TrainingResult] | None:
        """Writes weights, validation images, model card and settings; uploads them if asked for.

        What fails leaves a checkpoint of the last step behind. `finish()` again, or a run with
        `--resume_from_checkpoint latest`, does the rest without training.

        Raises:
            RuntimeError: before all steps are done, or if the upload fails.
            WriteError: if something could not be written, as on a full disk.
        """
        done, steps = len(self.state.losses), self.max_train_steps
        if done < steps:
            raise RuntimeError(f"{done} of {steps} steps are done: finish() comes after all")
        with self._holding_folder():
            result = self._finish()
        if self._lock:
            self._lock.release()
        return result

    def _finish(self) -> TrainingResult | dict[str, TrainingResult] | None:
        settings, accelerator, alone = self.settings, self.accelerator, self.alone
        own = self.own if self.subjects.writes(accelerator) else []
        weights = self._keeping_last_step(
            lambda: {name: self._write_weights(name, Path(alone[name].output_dir)) for name in own}
        )
        final = {name: final_prompts(each) for name, each in alone.items()}
        images = self._keeping_last_step(lambda: self._make_images(final))
        accelerator.print(peak_memory_text(accelerator))
        results = self._keeping_last_step(
            lambda: {name: self._write_results(name, weights[name], images.get(name, [])) for name in own}
        )
        end_training(accelerator)
        if self.repository:
            folder = Path(settings.output_dir)
            address = push(settings, self.repository, folder, settings.logging_dir, self.max_train_steps)
            print(f"Pushed: {address}")
        if not own:
            return None
        return results if self.subjects.several else results[own[0]]

    def _keeping_last_step(self, write: Callable[[], T]) -> T:
        """What `write` returns, with the averages in place; if it fails in any process, a checkpoint is made first."""
        result: T | None = None
        failure: BaseException | None = None
        try:
            with self.state.averaged():
                result = write()
        except (Exception, KeyboardInterrupt) as error:
            failure = error
        if not any(gather_object([failure is not None])):
            return cast(T, result)
        safe = self.checkpoints.save_last(self.state)
        if failure is None:
            raise WriteError(f"the end of the run failed in another process. {safe}")
        if isinstance(failure, OSError | SafetensorError):
            raise WriteError(f"{failure}. {safe}") from failure
        failure.add_note(f"Training is done, and this came after it. {safe}")
        raise failure

    def _calls(self, name: str, prompts: tuple[str, ...]) -> list[list[Any]]:
        return validation_calls(self.family, prompts, self.alone[name], self.seed, self.resolution)

    def _validate(self, prompts: dict[str, tuple[str, ...]]) -> dict[str, list[Path]]:
        """As [`_make_images`]; then all processes go on together."""
        files = self._make_images(prompts)
        self.accelerator.wait_for_everyone()
        return files

    def _make_images(self, prompts: dict[str, tuple[str, ...]]) -> dict[str, list[Path]]:
        """Generates, writes and logs images of each subject: subject -> the files, the grid's first."""
        files, writes = {}, self.subjects.writes(self.accelerator)
        for name in self.own:
            if prompts[name] and (writes or self.settings.fsdp):
                several = len(self.own) > 1
                with coeff_adapters(self.family.denoiser, name) if several else nullcontext():
                    rows = run_calls(self.family, self._calls(name, prompts[name]), self.accelerator)
                if writes:
                    labels = [self.subjects.label(name, prompt) for prompt in prompts[name]]
                    files[name] = self._write_images(name, dict(zip(labels, rows)))
        return files

    def _write_images(self, name: str, rows: dict[str, list[Any]]) -> list[Path]:
        """Writes and logs a row per prompt; if that fails, as on a full disk, it says so."""
        step = len(self.state.losses)
        try:
            files = write_grid(
                list(rows.values()), Path(self.alone[name].output_dir) / "validation" / f"step-{step:06d}"
            )
            if self.accelerator.is_main_process:
                log_images(self.accelerator.trackers, rows, step)
            return files
        except OSError as error:
            print(f"The images of step {step} could not be written: {error}. The run goes on.", file=sys.stderr)
            return []

    def _write_weights(self, name: str, folder: Path, weight_name: str | None = None) -> dict[str, Path]:
        alone = self.alone[name]
        names = {"weight_name": weight_name} if weight_name else {}
        return save_weights(self.family, alone, folder, metadata(alone), adapter_name=name, **names)

    def _write_all_weights(self, folder: Path) -> None:
        """Those that the main process has trained, into one folder."""
        for name in self.own:
            self._write_weights(name, folder, self.subjects.weight_name(name))

    def _write_config(self, settings: DreamBoothSettings) -> Path:
        return write_text(settings.to_yaml(), Path(settings.output_dir) / "config.yaml")

    def _write_results(self, name: str, weights: dict[str, Path], images: list[Path]) -> TrainingResult:
        """Writes the model card, and says what the run wrote, and how to use it."""
        alone = self.alone[name]
        folder = Path(alone.output_dir)
        settings_file = self._write_config(alone)
        card = card_of_run(
            alone,
            repository=self.repository,
            pipeline_class=type(self.family.pipeline).__name__,
            trained=self.trained[name],
            weights=weights,
            validation_prompts=final_prompts(alone),
            images=images,
            sampling=self._sampling,
            training=metadata(alone),
        )
        model_card = write_card(card, folder)
        print("Written:")
        for file in [*weights.values(), *images[:1], model_card, settings_file]:
            print(f"  {file} ({size_text(file)})")
        lines = card.snippet(alone.pretrained_model_name_or_path, alone.output_dir)
        print("To use it:\n  " + lines.replace("\n\n", "\n").replace("\n", "\n  "))
        return TrainingResult(
            settings=alone,
            trained=self.trained[name],
            losses=self.state.losses_by_subject[name],
            coeff_file=weights.get("coefficients"),
            lora_file=weights.get("lora"),
            images=images,
            model_card=model_card,
            settings_file=settings_file,
        )


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


def metadata(settings: DreamBoothSettings) -> dict[str, str]:
    """What a coefficient file says of its training."""
    values = {
        "instance_prompt": plain(settings.instance_prompt),
        "class_prompt": settings.class_prompt,
        "steps": settings.max_train_steps,
        "batch_size": settings.train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "resolution": settings.resolution,
        "aspect_ratio_buckets": settings.aspect_ratio_buckets,
        "learning_rate": settings.learning_rate,
        "optimizer": settings.optimizer,
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
