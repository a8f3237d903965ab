"""The training loop, one for all families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from buckets import parse_buckets
from data import DreamBoothDataset, collate, seed_of
from diffusers.optimization import get_scheduler
from families import Family
from latents import encode_cuts, moments_of, release_vae
from optimizers import make_optimizer, rates_in_use
from settings import DreamBoothSettings
from sources import Picture
from step import DenoisingStep
from subjects import SubjectsDataset, clip_gradients, collate_subjects, losses_by_subject, own_coefficients
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm


@dataclass(frozen=True)
class Pictures:
    """What is trained on.

    Args:
        instance: the subject's pictures.
        classes: pictures of its class; none without prior preservation.
        subjects: of several subjects, those that this process trains: subject -> its pictures, and no others.
    """

    instance: list[Picture]
    classes: list[Picture] = field(default_factory=list)
    subjects: dict[str, list[Picture]] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return [picture.prompt for picture in chain(self.instance, self.classes, *self.subjects.values())]


@dataclass
class Trainee:
    """What trains, and how.

    Args:
        parameters: `"coefficients"`, `"lora"`, and these with `"text_encoder_"` before them, where they train.
        optimizer: with a parameter group for each of them, in this order.
        lr_scheduler: of the same groups. Not prepared by accelerate, so that it counts optimizer steps whatever the
            number of processes.
        apart: parameters of each of several subjects, whose gradients have norms of their own.
        losses_by_subject: of several subjects, subject -> the loss of each optimizer step.
    """

    parameters: dict[str, list[nn.Parameter]]
    optimizer: Any
    lr_scheduler: LRScheduler
    apart: list[list[nn.Parameter]] = field(default_factory=list)
    losses_by_subject: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, parameters: dict[str, list[nn.Parameter]], settings: DreamBoothSettings) -> Trainee:
        optimizer = make_optimizer(parameters, settings)
        return cls(parameters, optimizer, make_lr_scheduler(optimizer, settings))

    @property
    def all_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.parameters.values() for parameter in group]

    @property
    def rates(self) -> dict[str, float]:
        return dict(zip(self.parameters, rates_in_use(self.optimizer)))


def train(
    family: Family,
    trainee: Trainee,
    pictures: Pictures,
    settings: DreamBoothSettings,
    accelerator: Accelerator,
    validate: Callable[[int], object],
) -> list[float]:
    """Trains; `validate` is called between steps with their number. Returns the loss of each optimizer step."""
    if settings.gradient_checkpointing:
        family.denoiser.enable_gradient_checkpointing()
        for encoder in family.trained_text_encoders:
            encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = DenoisingStep(family, family.trained_text_encoders)
    batches = make_batches(settings, accelerator, pictures)
    if settings.cache_latents:
        batches.dataset.moments = encode_cuts(family, batches.dataset, silent=not accelerator.is_main_process)
        release_vae(family, keep_decoder=bool(settings.validation_prompt or settings.subjects))
    step, trainee.optimizer, batches = prepare(step, trainee.optimizer, batches, pictures, accelerator)
    step.train()

    losses: list[float] = []
    step_losses = torch.zeros(max(1, len(pictures.subjects)), device=accelerator.device)
    progress = tqdm(total=settings.max_train_steps, desc="training", disable=not accelerator.is_main_process)
    for number, batch in enumerate(batches):
        # of the coefficients' dropout, another in each process; from the place in the run, so that it can be continued
        torch.manual_seed(seed_of(settings.seed, "dropout", number, accelerator.process_index))
        with accelerator.accumulate(step), own_coefficients(family, batch):
            moments = moments_of(family, batch)
            errors = step(moments, batch["prompts"], batch["sizes"], batch["seeds"])
            by_subject = losses_by_subject(errors, batch, settings.prior_loss_weight)
            loss = torch.stack(list(by_subject.values())).sum()
            check_finite(loss, len(losses) + 1, settings)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                clip_gradients(trainee.apart or [trainee.all_parameters], accelerator, settings.max_grad_norm)
            trainee.optimizer.step()
            trainee.optimizer.zero_grad()
        step_losses += torch.stack(list(by_subject.values())).detach() / settings.gradient_accumulation_steps
        if not accelerator.sync_gradients:
            continue
        rates = trainee.rates
        if not accelerator.optimizer_step_was_skipped:  # as float16's gradient scaler does when it overflows
            trainee.lr_scheduler.step()
        losses.append(accelerator.reduce(step_losses.mean(), "mean").item())
        for subject, value in zip(pictures.subjects, step_losses.tolist()):
            trainee.losses_by_subject.setdefault(subject, []).append(value)
        step_losses.zero_()
        report(progress, losses, rates, accelerator, trainee.losses_by_subject)
        if len(losses) % settings.validation_steps == 0 and len(losses) < settings.max_train_steps:
            validate(len(losses))
    progress.close()
    return losses


def make_lr_scheduler(optimizer: torch.optim.Optimizer, settings: DreamBoothSettings) -> LRScheduler:
    return get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )


def make_batches(settings: DreamBoothSettings, accelerator: Accelerator, pictures: Pictures) -> DataLoader:
    """All batches of the run, in order."""
    processes = 1 if pictures.subjects else accelerator.num_processes
    step_draws = settings.train_batch_size * settings.gradient_accumulation_steps * processes

    def dataset(instance: list[Picture]) -> DreamBoothDataset:
        return DreamBoothDataset(
            settings.max_train_steps * step_draws,
            instance,
            pictures.classes,
            resolution=settings.resolution,
            seed=settings.seed,
            center_crop=settings.center_crop,
            random_flip=settings.random_flip,
            background_color=settings.background_color,
            buckets=parse_buckets(settings.aspect_ratio_buckets),
            step_draws=step_draws,
        )

    each = {name: dataset(instance) for name, instance in pictures.subjects.items()}
    return DataLoader(
        SubjectsDataset(each) if each else dataset(pictures.instance),
        batch_size=settings.train_batch_size,
        collate_fn=collate_subjects if each else collate,
        num_workers=settings.dataloader_num_workers,
    )


def prepare(
    step: DenoisingStep, optimizer: Any, batches: DataLoader, pictures: Pictures, accelerator: Accelerator
) -> tuple[Any, Any, Any]:
    """By accelerate. Of several subjects, each process trains its own: no batch is shared out, nothing is averaged."""
    if not pictures.subjects:
        return accelerator.prepare(step, optimizer, batches)
    batches = prepare_data_loader(
        batches, device=accelerator.device, num_processes=1, process_index=0, put_on_device=True
    )
    return accelerator.prepare_model(step, evaluation_mode=True), accelerator.prepare_optimizer(optimizer), batches


def check_finite(loss: torch.Tensor, step: int, settings: DreamBoothSettings) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss.item()} at step {step} of {settings.max_train_steps}; training stopped and no weights "
            "were written. Try lower learning rates, or --mixed_precision bf16 or no"
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
    accelerator.log(values, step=len(losses))
    progress.set_postfix(loss=f"{losses[-1]:.4f}", lr=", ".join(f"{rate:.2g}" for rate in rates.values()))
    progress.update()
