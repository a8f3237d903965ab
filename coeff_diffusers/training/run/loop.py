"""The training loop, one for all families."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..families import Family
from ..images.buckets import parse_buckets
from ..images.dreambooth_dataset import DreamBoothDataset, collate, seed_of
from ..images.files import TrainingImage
from ..images.latents import encode_cuts, moments_of, release_vae
from ..results.trackers import end_training, log
from ..results.validation import all_validation_prompts
from ..settings.dreambooth import DreamBoothSettings
from .checkpoints import Checkpoints
from .optimizers import make_optimizer, rates_in_use
from .step import DenoisingStep
from .stopping import Stopped, StopRequest, leave_stopping_to_the_main_process, stop_request
from .subjects import SubjectsDataset, clip_gradients, collate_subjects, losses_by_subject, own_coefficients


@dataclass(frozen=True)
class Images:
    """What is trained on.

    Args:
        instance: the subject's images.
        classes: images of its class; none without prior preservation.
        subjects: of several subjects, those that this process trains: subject -> its own; no others then.
    """

    instance: list[TrainingImage]
    classes: list[TrainingImage] = field(default_factory=list)
    subjects: dict[str, Images] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        own = [image.prompt for image in chain(self.instance, self.classes)]
        return [*own, *chain(*(each.prompts for each in self.subjects.values()))]


@dataclass
class Trainee:
    """What trains, and how.

    Args:
        parameters: `"coefficients"`, `"lora"`, and these with `"text_encoder_"` before them, where they train.
        optimizer: with a parameter group for each of them, in this order.
        lr_scheduler: of the same groups. Not prepared by accelerate, so that it counts optimizer steps whatever the
            number of processes.
        ema: moving averages of the parameters, with `--use_ema`.
        subjects: of several subjects, those that this process trains: subject -> its parameters.
        losses_by_subject: of several subjects, of all processes: subject -> the loss of each optimizer step.
    """

    parameters: dict[str, list[nn.Parameter]]
    optimizer: Any
    lr_scheduler: LRScheduler
    ema: EMAModel | None = None
    subjects: dict[str, list[nn.Parameter]] = field(default_factory=dict)
    losses_by_subject: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, parameters: dict[str, list[nn.Parameter]], settings: DreamBoothSettings) -> Trainee:
        optimizer = make_optimizer(parameters, settings)
        trainee = cls(parameters, optimizer, make_lr_scheduler(optimizer, settings))
        if settings.use_ema:
            trainee.ema = EMAModel(trainee.all_parameters, decay=settings.ema_decay)
        return trainee

    @property
    def all_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.parameters.values() for parameter in group]

    @property
    def rates(self) -> dict[str, float]:
        return dict(zip(self.parameters, rates_in_use(self.optimizer)))

    def note_losses(self, own: dict[str, float]) -> float:
        """Adds a step's loss of each subject, this process's and the others', and returns the mean over them all."""
        of_all = {subject: loss for share in gather_object([own]) for subject, loss in share.items()}
        for subject, loss in of_all.items():
            self.losses_by_subject.setdefault(subject, []).append(loss)
        return sum(of_all.values()) / len(of_all)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Has the moving averages in the place of the parameters, where there are any, and puts those back."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.all_parameters)
        self.ema.copy_to(self.all_parameters)
        try:
            yield
        finally:
            self.ema.restore(self.all_parameters)

    def state_dict(self) -> dict[str, Any]:
        """To be called in all processes; of several subjects, it holds what each process trains."""
        state = {
            "parameters": [parameter.detach().cpu().clone() for parameter in self.all_parameters],
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "losses_by_subject": self.losses_by_subject,
        }
        return {"processes": gather_object([state])} if self.subjects else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.subjects:
            state = state["processes"][PartialState().process_index]
        self.losses_by_subject = state["losses_by_subject"]
        with torch.no_grad():
            for parameter, value in zip(self.all_parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.all_parameters[0].device)


def train(
    family: Family,
    trainee: Trainee,
    images: Images,
    settings: DreamBoothSettings,
    accelerator: Accelerator,
    validate: Callable[[int], object],
    checkpoints: Checkpoints,
) -> list[float]:
    """Trains; `validate` is called between steps with their number. Returns the loss of each optimizer step.

    Raises:
        FloatingPointError: if the loss, or what trains, is no longer finite.
        Stopped: after a signal to stop; a checkpoint has been saved.
    """
    losses = checkpoints.restore(trainee)
    if len(losses) >= settings.max_train_steps:
        return losses
    if settings.gradient_checkpointing:
        family.denoiser.enable_gradient_checkpointing()
        for encoder in family.trained_text_encoders:
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = DenoisingStep(family, family.trained_text_encoders, trainee.all_parameters)
    batches = make_batches(settings, accelerator, images, len(losses))
    if settings.cache_latents:
        batches.dataset.moments = encode_cuts(family, batches.dataset, silent=not accelerator.is_main_process)
        release_vae(family, keep_decoder=bool(all_validation_prompts(settings) or settings.subjects))
    step, trainee.optimizer, batches = prepare(step, trainee.optimizer, batches, images, accelerator)
    step.train()

    step_losses = torch.zeros(max(1, len(images.subjects)), device=accelerator.device)
    progress = tqdm(
        total=settings.max_train_steps,
        initial=len(losses),
        desc="training",
        disable=not accelerator.is_main_process,
    )
    with progress, stop_request() as request:
        for number, batch in enumerate(batches, len(losses) * settings.gradient_accumulation_steps):
            # of the adapters' dropout, another in each process unless each has its own subjects; from the place in the
            # run, to be the same when it is continued
            process = 0 if images.subjects else accelerator.process_index
            torch.manual_seed(seed_of(settings.seed, "dropout", number, process))
            with accelerator.accumulate(step), own_coefficients(family, batch):
                errors = step(moments_of(family, batch), batch["prompts"], batch["sizes"], batch["seeds"])
                by_subject = losses_by_subject(errors, batch, settings.prior_loss_weight)
                check_finite("the loss", by_subject.sum(), len(losses) + 1, batch, settings, checkpoints)
                accelerator.backward(by_subject.sum())
                if accelerator.sync_gradients:
                    together = list(trainee.subjects.values()) or [trainee.all_parameters]
                    clip_gradients(together, accelerator, settings.max_grad_norm)
                trainee.optimizer.step()
                trainee.optimizer.zero_grad()
            step_losses += by_subject.detach() / settings.gradient_accumulation_steps
            if not accelerator.sync_gradients:
                continue
            rates = trainee.rates
            if not accelerator.optimizer_step_was_skipped:  # as float16's gradient scaler does when it overflows
                size = nn.utils.get_total_norm(trainee.all_parameters)  # before it is averaged, saved or shown
                check_finite("the norm of what trains", size, len(losses) + 1, batch, settings, checkpoints)
                trainee.lr_scheduler.step()
                if trainee.ema is not None:
                    trainee.ema.step(trainee.all_parameters)
            if images.subjects:
                losses.append(trainee.note_losses(dict(zip(images.subjects, step_losses.tolist()))))
            else:
                losses.append(accelerator.reduce(step_losses.mean(), "mean").item())
            step_losses.zero_()
            report(progress, losses, rates, accelerator, trainee.losses_by_subject)
            after_step(trainee, losses, request, settings, accelerator, validate, checkpoints)
    return losses


def after_step(
    trainee: Trainee,
    losses: list[float],
    request: StopRequest,
    settings: DreamBoothSettings,
    accelerator: Accelerator,
    validate: Callable[[int], object],
    checkpoints: Checkpoints,
) -> None:
    """Saves, stops and validates, where it is time to. Raises Stopped after a signal."""
    done, last = len(losses), len(losses) == settings.max_train_steps

    def stop() -> bool:
        """In all processes, if one of them had the signal."""
        if request.signal_number is not None:
            accelerator.set_trigger()
        return accelerator.check_trigger() and not last

    stops = stop()
    if not stops and done % settings.checkpointing_steps == 0:
        checkpoints.save(trainee, losses)
    if not stops and not last and done % settings.validation_steps == 0:
        with trainee.averaged():
            validate(done)
        stops = stop()  # images take their time
    if stops:
        checkpoints.save(trainee, losses)
        end_training(accelerator)
        raise Stopped(
            f"stopped after step {done} of {settings.max_train_steps}. {checkpoints.safe_text()}",
            request.signal_number or signal.SIGTERM,
        )


def make_lr_scheduler(optimizer: torch.optim.Optimizer, settings: DreamBoothSettings) -> LRScheduler:
    return get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )


def make_batches(
    settings: DreamBoothSettings, accelerator: Accelerator, images: Images, steps_done: int = 0
) -> DataLoader:
    """All batches that the run still has to come, in order."""
    processes = 1 if images.subjects else accelerator.num_processes
    step_draws = settings.train_batch_size * settings.gradient_accumulation_steps * processes

    def dataset(shown: Images) -> DreamBoothDataset:
        return DreamBoothDataset(
            (settings.max_train_steps - steps_done) * step_draws,
            shown.instance,
            shown.classes,
            resolution=settings.resolution,
            seed=settings.seed,
            center_crop=settings.center_crop,
            random_flip=settings.random_flip,
            background_color=settings.background_color,
            caption_dropout=settings.caption_dropout,
            buckets=parse_buckets(settings.aspect_ratio_buckets),
            step_draws=step_draws,
            first=steps_done * step_draws,
        )

    each = {name: dataset(shown) for name, shown in images.subjects.items()}
    return DataLoader(
        SubjectsDataset(each) if each else dataset(images),
        batch_size=settings.train_batch_size,
        collate_fn=collate_subjects if each else collate,
        num_workers=settings.dataloader_num_workers,
        worker_init_fn=leave_stopping_to_the_main_process,
    )


def prepare(
    step: DenoisingStep, optimizer: Any, batches: DataLoader, images: Images, accelerator: Accelerator
) -> tuple[Any, Any, Any]:
    """By accelerate. Of several subjects, each process trains its own: no batch is shared out, nothing is averaged."""
    if not images.subjects:
        return accelerator.prepare(step, optimizer, batches)
    batches = prepare_data_loader(
        batches, device=accelerator.device, num_processes=1, process_index=0, put_on_device=True
    )
    return accelerator.prepare_model(step, evaluation_mode=True), accelerator.prepare_optimizer(optimizer), batches


def check_finite(
    what: str,
    value: torch.Tensor,
    step: int,
    batch: dict[str, Any],
    settings: DreamBoothSettings,
    checkpoints: Checkpoints,
) -> None:
    """Raises FloatingPointError that says which images a value came from, and what is safe."""
    if not torch.isfinite(value):
        images = "\n  ".join(f"{name}: {prompt}" for name, prompt in zip(batch["names"], batch["prompts"]))
        raise FloatingPointError(
            f"{what} is {value.item()} at step {step} of {settings.max_train_steps}; training stopped and no weights "
            f"were written. {checkpoints.safe_text()} With the same settings that would come to the same, on a CPU "
            "at least; try lower learning rates, or --mixed_precision bf16 or no, in another --output_dir. "
            f"The images of the batch:\n  {images}"
        )


def report(
    progress: tqdm,
    losses: list[float],
    rates: dict[str, float],
    accelerator: Accelerator,
    by_subject: dict[str, list[float]],
) -> None:
    """Shows and logs the step that is through, with the learning rates that it used."""
    values = {"loss": losses[-1]} | {f"learning_rate/{what}": rate for what, rate in rates.items()}
    values |= {f"loss/{subject}": of_steps[-1] for subject, of_steps in by_subject.items()}
    log(values, len(losses), accelerator)
    progress.set_postfix(loss=f"{losses[-1]:.4f}", lr=", ".join(f"{rate:.2g}" for rate in rates.values()))
    progress.update()
