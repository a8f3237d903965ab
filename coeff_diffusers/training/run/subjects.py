"""How the subjects of a run, one or many, are shared out over its processes: all that differs between the two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch import Tensor

from ..errors import InputError
from ..images.files import TrainingImage
from ..images.subject_images import GivenImages, check_images, read_each, read_images
from ..settings.dreambooth import DreamBoothSettings
from ..settings.subjects import Subject, read_subjects

WEIGHTS = "pytorch_coeff_weights.safetensors"


class Subjects(ABC):
    """The subjects of a run by name. A name is that of the adapter, too."""

    several: bool

    @abstractmethod
    def settings(self, settings: DreamBoothSettings) -> dict[str, DreamBoothSettings]:
        """Subject -> the settings of the run that trains it alone."""

    @abstractmethod
    def read_images(self, settings: DreamBoothSettings, given: GivenImages | None) -> dict[str, list[TrainingImage]]:
        """Subject -> its images. Raises InputError if they, or images of its class, cannot be used."""

    @abstractmethod
    def own(self, accelerator: Accelerator) -> list[str]:
        """Those that this process trains."""

    @abstractmethod
    def sharing(self, accelerator: Accelerator) -> tuple[int, int]:
        """How many processes share an optimizer step's images, and which of them this is."""

    @abstractmethod
    def prepare(
        self, step: Any, optimizer: Any, batches: Any, accelerator: Accelerator, whole: bool
    ) -> tuple[Any, Any, Any]:
        """By accelerate; the step is put on the device if it is to be there as a whole."""

    @abstractmethod
    def gather_losses(self, own: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
        """Subject -> loss, of the subjects of all processes."""

    @abstractmethod
    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds. To be called in all processes."""

    @abstractmethod
    def own_state(self, state: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
        """What of it is this process's."""

    @abstractmethod
    def writes(self, accelerator: Accelerator) -> bool:
        """Whether this process writes the results of its subjects."""

    def weight_name(self, name: str) -> str:
        """The file of a subject's coefficients in a folder of all of them."""
        return f"{name}.safetensors" if self.several else WEIGHTS

    def label(self, name: str, text: str) -> str:
        """What a log calls something of a subject."""
        return f"{name}: {text}" if self.several else text


class OneSubject(Subjects):
    """All processes train the subject: each batch is shared out over them, gradients are averaged."""

    several = False
    name = "default"

    def settings(self, settings: DreamBoothSettings) -> dict[str, DreamBoothSettings]:
        return {self.name: replace(settings, resume_from_checkpoint=None)}

    def read_images(self, settings: DreamBoothSettings, given: GivenImages | None) -> dict[str, list[TrainingImage]]:
        images = read_images(settings, given)
        check_images(images, settings)
        return {self.name: images}

    def own(self, accelerator: Accelerator) -> list[str]:
        return [self.name]

    def sharing(self, accelerator: Accelerator) -> tuple[int, int]:
        return accelerator.num_processes, accelerator.process_index

    def prepare(
        self, step: Any, optimizer: Any, batches: Any, accelerator: Accelerator, whole: bool
    ) -> tuple[Any, Any, Any]:
        places = [whole, None, None]
        step, optimizer, batches = accelerator.prepare(step, optimizer, batches, device_placement=places)
        return step, optimizer, batches

    def gather_losses(self, own: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
        return {name: accelerator.reduce(loss, "mean").item() for name, loss in own.items()}

    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def own_state(self, state: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
        return state

    def writes(self, accelerator: Accelerator) -> bool:
        return bool(accelerator.is_main_process)


class ManySubjects(Subjects):
    """Each process trains its share of the subjects: no batch is shared out, nothing is averaged.

    Args:
        file: of `--subjects`.

    Raises:
        InputError: if the file cannot be used; everything that is wrong with it is listed.
    """

    several = True

    def __init__(self, file: str) -> None:
        self.subjects: Sequence[Subject] = read_subjects(file)

    def settings(self, settings: DreamBoothSettings) -> dict[str, DreamBoothSettings]:
        return {subject.name: subject.alone(settings) for subject in self.subjects}

    def read_images(self, settings: DreamBoothSettings, given: GivenImages | None) -> dict[str, list[TrainingImage]]:
        if given is not None:
            raise InputError("give either images or --subjects, whose file names the images of each")
        return read_each(self.subjects, settings)

    def own(self, accelerator: Accelerator) -> list[str]:
        names = [subject.name for subject in self.subjects]
        if len(names) < accelerator.num_processes:
            raise InputError(f"--subjects: {len(names)} are too few for {accelerator.num_processes} processes")
        with accelerator.split_between_processes(names) as share:
            return list(share)

    def sharing(self, accelerator: Accelerator) -> tuple[int, int]:
        return 1, 0

    def prepare(
        self, step: Any, optimizer: Any, batches: Any, accelerator: Accelerator, whole: bool
    ) -> tuple[Any, Any, Any]:
        batches = prepare_data_loader(
            batches, device=accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
        step = accelerator.prepare_model(step, device_placement=whole, evaluation_mode=True)
        return step, accelerator.prepare_optimizer(optimizer), batches

    def gather_losses(self, own: dict[str, Tensor], accelerator: Accelerator) -> dict[str, float]:
        shares = gather_object([{name: loss.item() for name, loss in own.items()}])
        return {name: loss for share in shares for name, loss in share.items()}

    def gather_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return {"processes": gather_object([state])}

    def own_state(self, state: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
        own: dict[str, Any] = state["processes"][accelerator.process_index]
        return own

    def writes(self, accelerator: Accelerator) -> bool:
        return True
