"""The training loop, one for all families and for any number of subjects."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from coeff_diffusers import coeff_per_sample

from ..errors import Stopped
from ..families import Family
from ..images.dreambooth_dataset import DreamBoothDataset, seed_of
from ..images.latents import moments_of
from ..images.subject_images import SubjectImages
from ..images.subjects_dataset import SubjectsDataset, collate_subjects
from ..results.trackers import end_training, log
from ..settings.dreambooth import ImageSettings, StepSettings
from ..settings.rules import parse_buckets, parse_words
from .checkpoints import Checkpoints
from .losses import clip_gradients, losses_by_subject
from .state import TrainingState
from .stopping import StopRequest, leave_stopping_to_the_main_process
from .subjects import Subjects


@dataclass(frozen=True)
class TrainingStep:
    """An optimizer step that is done.

    Args:
        number: from 1 to `of`.
        of: how many the run has.
        loss: mean over the step's images, and over the subjects.
        losses: subject -> its own.
        learning_rates: `"coefficients"`, `"lora"`, ... -> the rate that the step used.
    """

    number: int
    of: int
    loss: float
    losses: Mapping[str, float]
    learning_rates: Mapping[str, float]


def make_dataset(
    images: Mapping[str, SubjectImages],
    settings: ImageSettings,
    *,
    resolution: int,
    seed: int,
    step_draws: int,
    first_step: int,
    steps: int,
) -> SubjectsDataset:
    """All that the run still has to show, in order.

    Args:
        images: subject -> its own.
        settings: how they are cropped.
        resolution: height and width of crops, if there are no buckets.
        seed: of the run.
        step_draws: images of a subject per optimizer step, over all processes that share them.
        first_step: the steps that are done.
        steps: that the run has in all.
    """
    return SubjectsDataset(
        {
            name: DreamBoothDataset(
                (steps - first_step) * step_draws,
                shown.instance,
                shown.classes,
                resolution=resolution,
                seed=seed,
                center_crop=settings.center_crop,
                random_flip=settings.random_flip,
                background_color=settings.background_color,
                caption_dropout=settings.caption_dropout,
                augment=settings.augment,
                words=parse_words(settings.augment_words),
                buckets=parse_buckets(settings.aspect_ratio_buckets),
                step_draws=step_draws,
                first=first_step * step_draws,
            )
            for name, shown in images.items()
        }
    )


def make_batches(dataset: SubjectsDataset, batch_size: int, workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_subjects,
        num_workers=workers,
        worker_init_fn=leave_stopping_to_the_main_process,
    )


def training_steps(
    family: Family,
    step: nn.Module,
    batches: DataLoader[Any],
    state: TrainingState,
    subjects: Subjects,
    settings: StepSettings,
    accelerator: Accelerator,
    *,
    steps: int,
    seed: int,
    prior_loss_weight: float,
    max_grad_norm: float,
    saving: Callable[[], AbstractContextManager[Any]],
    after_step: Callable[[], None],
    safe_text: Callable[[], str],
) -> Iterator[TrainingStep]:
    """Trains, and yields after each optimizer step.

    Args:
        family: of the base model.
        step: of [`DenoisingStep`], prepared, as `state.optimizer` is.
        batches: prepared or whole, as `subjects` has them.
        state: that is trained.
        subjects: how they are shared out over the processes.
        settings: of accumulation.
        accelerator: of the run.
        steps: that the run has in all.
        seed: of the run.
        prior_loss_weight: as of `dreambooth_loss`.
        max_grad_norm: of the gradients of each subject.
        saving: around the forward pass, has what is saved for the backward pass where it is to be.
        after_step: saves, stops and validates where it is time to.
        safe_text: says what is not lost if the run breaks off.

    Raises:
        FloatingPointError: if the loss, or a trainable parameter, is no longer finite.
    """
    done, accumulated = len(state.losses), settings.gradient_accumulation_steps
    process = subjects.sharing(accelerator)[1]
    sums = {name: torch.zeros((), device=accelerator.device) for name in state.by_subject}
    silent = not accelerator.is_main_process
    with tqdm(total=steps, initial=done, desc="training", disable=silent) as progress:
        for number, batch in enumerate(batches, done * accumulated):
            # of the adapters' dropout; from the place in the run, to be the same when it is resumed
            torch.manual_seed(seed_of(seed, "dropout", number, process))
            # each row goes through its own subject's coefficients; the backward pass may compute activations again
            several = len(state.by_subject) > 1
            rows = coeff_per_sample(family.denoiser, batch["subjects"]) if several else nullcontext()
            with accelerator.accumulate(step), rows:
                given = (batch["prompts"], batch["sizes"], batch["seeds"], batch.get("boxes"))
                moments = moments_of(family, batch)
                with saving():
                    errors = step(moments, *given)
                losses = losses_by_subject(errors, batch, prior_loss_weight)
                loss = torch.stack(list(losses.values())).sum()
                check_finite("the loss", loss, state, steps, batch, safe_text)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    clip_gradients(state.by_subject.values(), accelerator, max_grad_norm)
                state.optimizer.step()
                state.optimizer.zero_grad()
            for name, each in losses.items():
                sums[name] += each.detach() / accumulated
            if not accelerator.sync_gradients:
                continue
            rates = state.learning_rates
            if not accelerator.optimizer_step_was_skipped:  # as float16's gradient scaler does when it overflows
                size = nn.utils.get_total_norm(state.all_parameters)  # before it is averaged, saved or shown
                check_finite("the norm of the trainable parameters", size, state, steps, batch, safe_text)
                state.lr_scheduler.step()
                if state.ema is not None:
                    state.ema.step(state.all_parameters)
            by_subject = subjects.gather_losses(sums, accelerator)
            state.note_losses(by_subject)
            for each in sums.values():
                each.zero_()
            report(progress, state, rates, subjects.several, accelerator)
            yield TrainingStep(len(state.losses), steps, state.losses[-1], by_subject, rates)
            after_step()


def stops(request: StopRequest, accelerator: Accelerator) -> bool:
    """In all processes, if one of them was asked to stop."""
    if request.asked:
        accelerator.set_trigger()
    return bool(accelerator.check_trigger())


def stop(state: TrainingState, steps: int, request: StopRequest, checkpoints: Checkpoints) -> None:
    """Saves a checkpoint and raises Stopped."""
    checkpoints.save(state)
    end_training(checkpoints.accelerator)
    raise Stopped(
        f"stopped after step {len(state.losses)} of {steps}. {checkpoints.safe_text()}",
        request.signal_number or signal.SIGTERM,
    )


def check_finite(
    what: str, value: torch.Tensor, state: TrainingState, steps: int, batch: dict[str, Any], safe: Callable[[], str]
) -> None:
    """Raises FloatingPointError that says which images a value came from, and what is safe."""
    if not torch.isfinite(value):
        images = "\n  ".join(f"{name}: {prompt}" for name, prompt in zip(batch["names"], batch["prompts"]))
        raise FloatingPointError(
            f"{what} is {value.item()} at step {len(state.losses) + 1} of {steps}; training stopped and no weights "
            f"were written. {safe()} With the same settings that would come to the same, on a CPU "
            "at least; try lower learning rates, or --mixed_precision bf16 or no, in another --output_dir. "
            f"The images of the batch:\n  {images}"
        )


def report(
    progress: Any, state: TrainingState, rates: Mapping[str, float], several: bool, accelerator: Accelerator
) -> None:
    """Shows and logs the step that is done, with the learning rates that it used."""
    values = {"loss": state.losses[-1]} | {f"learning_rate/{what}": rate for what, rate in rates.items()}
    if several:
        values |= {f"loss/{subject}": of_steps[-1] for subject, of_steps in state.losses_by_subject.items()}
    log(values, len(state.losses), accelerator)
    progress.set_postfix(loss=f"{state.losses[-1]:.4f}", lr=", ".join(f"{rate:.2g}" for rate in rates.values()))
    progress.update()


def advice(losses: list[float], steps: int, learning_rate: float | None, lora: bool) -> str | None:
    """What to try if the loss has hardly moved after a fifth of the steps; `None` at other steps, or if it has.

    Hardly: the mean of the latest third is less than 5 % below that of the first.
    """
    if steps < 100 or len(losses) != steps // 5:
        return None
    part = len(losses) // 3
    first, latest = sum(losses[:part]) / part, sum(losses[-part:]) / part
    if latest < 0.95 * first:
        return None
    rate = "" if learning_rate is None else f"a --learning_rate above {learning_rate:g}, "
    beside = "" if lora else ", or a LoRA beside the coefficients (--lora_rank 4)"
    return (
        f"The loss has hardly moved in {len(losses)} steps ({first:.4f} to {latest:.4f}). What may help: {rate}more "
        f"steps than {steps}, a caption for each image (--caption_column, --caption_extension){beside}."
    )
