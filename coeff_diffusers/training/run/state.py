"""What changes in a run from step to step, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..settings.dreambooth import OptimizerSettings
from .optimizers import make_optimizer, rates_in_use


class TrainingState:
    """Trainable parameters, their optimizer, schedule and averages, and the losses so far.

    Args:
        parameters: `"coefficients"`, `"lora"`, and these with `"text_encoder_"` before them, where they train.
        by_subject: those that this process trains: subject -> its parameters.
        settings: of the optimizer and of the learning rates.
        steps: that the run has in all.
        ema_decay: `None` keeps no averages.

    Attributes:
        optimizer: with a parameter group for each kind of parameters, in this order.
        lr_scheduler: of the same groups. Not prepared by accelerate, so that it counts optimizer steps whatever the
            number of processes.
        losses: of each optimizer step, the mean over all subjects.
        losses_by_subject: subject, of all processes -> the loss of each optimizer step.
    """

    def __init__(
        self,
        parameters: dict[str, list[nn.Parameter]],
        by_subject: dict[str, list[nn.Parameter]],
        settings: OptimizerSettings,
        steps: int,
        ema_decay: float | None = None,
    ) -> None:
        self.parameters, self.by_subject = parameters, by_subject
        self.optimizer: Any = make_optimizer(parameters, settings)
        self.lr_scheduler: LRScheduler = get_scheduler(
            str(settings.lr_scheduler),
            self.optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=steps,
            num_cycles=settings.lr_num_cycles,
            power=settings.lr_power,
        )
        self.ema = None if ema_decay is None else EMAModel(self.all_parameters, decay=ema_decay)
        self.losses: list[float] = []
        self.losses_by_subject: dict[str, list[float]] = {}

    @property
    def all_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.parameters.values() for parameter in group]

    @property
    def learning_rates(self) -> dict[str, float]:
        """By kind of parameters, as they are in use."""
        return dict(zip(self.parameters, rates_in_use(self.optimizer)))

    def note_losses(self, by_subject: dict[str, float]) -> None:
        """Adds those of a step."""
        for subject, loss in by_subject.items():
            self.losses_by_subject.setdefault(subject, []).append(loss)
        self.losses.append(sum(by_subject.values()) / len(by_subject))

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
        """All but `losses`."""
        return {
            "parameters": [parameter.detach().cpu().clone() for parameter in self.all_parameters],
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "losses_by_subject": self.losses_by_subject,
        }

    def load_state_dict(self, state: dict[str, Any], losses: list[float]) -> None:
        self.losses = list(losses)
        # checkpoints of earlier releases have none of a run with one subject
        self.losses_by_subject = state["losses_by_subject"] or {name: list(losses) for name in self.by_subject}
        with torch.no_grad():
            for parameter, value in zip(self.all_parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.all_parameters[0].device)
