"""The base model that all visitors share. Each call has its own choice of adapters, scheduler and tokenizers."""

from __future__ import annotations

import copy
import inspect
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..adapters import delete_coeff_adapters
from ..checkpoint import differences, load_coeff_weights
from ..maps import AttentionMaps, attention_maps
from ..per_sample import coeff_per_sample
from ..resolved import CHANGES
from ..serving.folder import SubjectFolder
from ..serving.pipeline import Abandoned, SubjectPipeline
from ..serving.requests import ImageRequest, Refusal
from .settings import AppSettings

Progress = Callable[[int, int], None]  # steps that are done, and of how many


class SharedPipeline:
    """A base model with a folder of subjects, for any number of threads.

    Args:
        settings: of the app, with a base model.

    Attributes:
        settings: as given.
        takes: names of the arguments of the pipeline's call.
        defaults: of these arguments, the base model's own.

    Raises:
        OSError, ValueError: if there is no such model or folder.
    """

    def __init__(self, settings: AppSettings) -> None:
        self._none = tempfile.TemporaryDirectory(prefix="coeff-app-")  # a folder without subjects
        self.settings = replace(settings, adapters=settings.adapters or self._none.name)
        self._batches = SubjectPipeline(self.settings)
        if not makes_images_of_prompts(self.pipe):
            raise ValueError(f"{type(self.pipe).__name__} does not make an image of a prompt alone")
        self._folder = SubjectFolder(self.settings.adapters)
        self.takes, self.defaults = self._batches.takes, self._batches.defaults

    @property
    def pipe(self) -> Any:
        """The pipeline. Its calls are made by `make` and `maps`."""
        return self._batches.pipe

    def names(self) -> list[str]:
        """The subjects of the folder."""
        return self._folder.names()

    def words(self, name: str) -> str:
        """The prompt that a subject of the folder was trained with, as its file says; empty if it does not."""
        try:
            return self._folder.describe(name).instance_prompt or ""
        except Refusal:
            return ""

    def differences(self, tensors: dict[str, Any], header: dict[str, Any]) -> dict[str, str]:
        """What of a file does not fit the base model: part -> why."""
        return differences(self.pipe, tensors, header["coeff_diffusers"])

    def load(self, file: Path, adapter_name: str) -> None:
        """Loads an adapter beside the folder's. Raises ValueError if it does not fit."""
        load_coeff_weights(self.pipe, file, adapter_name=adapter_name, activate=False)
        self._batches.beside.add(adapter_name)

    def unload(self, names: Sequence[str]) -> None:
        """Takes such adapters away; calls that are running end with them."""
        with CHANGES:
            self._batches.beside.difference_update(names)
            if names:
                delete_coeff_adapters(self.pipe, list(names))

    def make(
        self, requests: Sequence[ImageRequest], progress: Progress, gone: threading.Event | None = None
    ) -> list[Image.Image]:
        """An image for each request, all of one kind, as many at once as a batch holds.

        Args:
            requests: each for one image.
            progress: is told after each step.
            gone: once it is set, the call ends.

        Raises:
            Refusal: if one of them cannot be made.
        """
        own = self._for_one_call()
        checked = [own.check(request) for request in requests]
        size = self.settings.max_batch_size
        batches = [checked[start : start + size] for start in range(0, len(checked), size)]
        steps = len(batches) * int(own.options(checked[0]).get("num_inference_steps", 1))
        images: list[Image.Image] = []
        done = 0

        def after_step() -> bool:
            nonlocal done
            done += 1
            progress(min(done, steps), steps)
            return gone is not None and gone.is_set()

        for batch in batches:
            for answer in own.make(batch, after_step):
                if isinstance(answer, Refusal):
                    raise answer
                images += answer
        return images

    def maps(
        self, request: ImageRequest, word: str, progress: Progress, gone: threading.Event | None = None
    ) -> AttentionMaps:
        """Where each head looks for a word of the request's prompt.

        Raises:
            Refusal: if its image cannot be made, or the word is not in the prompt.
        """
        own = self._for_one_call()
        request = own.check(request)
        options = own.options(request)
        steps = int(options.get("num_inference_steps", 1))
        if request.negative_prompt is not None:
            options["negative_prompt"] = request.negative_prompt

        def after_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            progress(step + 1, steps)
            if gone is not None and gone.is_set():
                raise Abandoned
            return {}

        if "callback_on_step_end" in self.takes:
            options["callback_on_step_end"] = after_step
        generator = torch.Generator().manual_seed(int(request.seed or 0))
        try:
            with coeff_per_sample(own.pipe, [request.mixture]) if request.mixture else nullcontext():
                return attention_maps(own.pipe, request.prompt, word, generator=generator, **options)
        except Abandoned as error:
            raise Refusal(499, "the visitor went away") from error
        except ValueError as error:
            raise Refusal(422, str(error)) from error

    def _for_one_call(self) -> SubjectPipeline:
        """The same models, with what else a call changes as its own: scheduler and tokenizers."""
        own, pipe = copy.copy(self._batches), copy.copy(self.pipe)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        for name, part in pipe.components.items():
            if name.startswith("tokenizer") and part is not None:
                setattr(pipe, name, copy.deepcopy(part))
        own.pipe, own.own_scheduler = pipe, pipe.scheduler
        return own


def makes_images_of_prompts(pipe: Any) -> bool:
    """Whether a pipeline makes images of a prompt, without an image or the like beside it."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    needed = [name for name, each in parameters.items() if each.default is each.empty and name not in ("self", "args")]
    return "prompt" in parameters and "image" not in needed
