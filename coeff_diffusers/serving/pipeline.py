"""One pipeline and its subjects: which requests go together, what cannot be asked for, and images of a batch."""

from __future__ import annotations

import inspect
import logging
import math
import secrets
import tempfile
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..adapters import denoisers
from ..checkpoint import differences
from ..coeff_file import read_file
from ..commands.generate import base_pipeline, pipeline_index
from ..files import printable
from ..per_sample import coeff_per_sample
from ..quantization import Quantization
from ..sampling import sampling_defaults
from ..store import AdapterStore
from ..training.errors import InputError
from ..training.families.single_file import is_single_file
from .folder import no_folder, no_subject, without_folder
from .requests import ImageRequest, Refusal
from .settings import PipelineSettings

logger = logging.getLogger("ray.serve")

OPTIONS = ("num_inference_steps", "guidance_scale", "height", "width")  # of a request, and of a pipeline's call


# of a device that computes nothing any more
DeviceError: Any = getattr(torch, "AcceleratorError", ())  # since torch 2.8


class Abandoned(Exception):  # noqa: N818
    """Nobody waits for a batch any more."""


def check_base_model(settings: PipelineSettings, here: bool = True) -> None:
    """Tells before a base model is loaded what can be told then.

    Args:
        settings: of the server or the app.
        here: whether it is loaded on this machine; others have other packages and devices.

    Raises:
        InputError: if there is none, or it cannot be held as it is asked for.
    """
    model, quantization = settings.pretrained_model_name_or_path, Quantization(settings.quantize, settings.gguf_file)
    try:
        looked_at = quantization.wanted or not is_single_file(model)
        index = pipeline_index(model, settings.single_file_config) if looked_at else {}
    except (OSError, ValueError) as error:
        raise InputError(f"--pretrained_model_name_or_path: {error}") from error
    if quantization.wanted and here:
        try:
            quantization.check(_device().type, index)
        except ValueError as error:
            raise InputError(f"--{'quantize' if settings.quantize else 'gguf_file'}: {error}") from error


def _device() -> torch.device:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


class SubjectPipeline:
    """A base model with a folder of subjects. One batch at a time.

    Attributes:
        beside: adapters that were loaded otherwise than by the store, which may be asked for as well.
    """

    def __init__(self, settings: PipelineSettings) -> None:
        self.settings = settings
        quantization = Quantization(settings.quantize, settings.gguf_file)
        self.pipe = base_pipeline(
            settings.pretrained_model_name_or_path,
            settings.single_file_config,
            settings.dtype,
            quantization,
            _device(),
            settings.group_offload,
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.store = AdapterStore(settings.adapters, max_resident=settings.max_resident).attach(self.pipe)
        self.beside: set[str] = set()
        self.takes = inspect.signature(type(self.pipe).__call__).parameters
        defaults = {name: each.default for name, each in self.takes.items() if each.default is not each.empty}
        self.sampling = sampling_defaults(self.pipe)
        self.defaults = defaults | self.sampling
        scheduler = self.pipe.scheduler
        compatible = getattr(scheduler, "compatibles", [])
        kinds = {kind.__name__: kind for kind in compatible if not hasattr(kind, "_backends")}  # of packages not here
        self.schedulers = kinds | {type(scheduler).__name__: type(scheduler)}
        self.own_scheduler = scheduler

    def options(self, request: ImageRequest) -> dict[str, Any]:
        """Arguments of the pipeline's call that a batch has in common; the model's own where none are asked for."""
        asked = {name: value for name in OPTIONS if (value := getattr(request, name)) is not None}
        own = {name: self.defaults[name] for name in OPTIONS if self.defaults.get(name) is not None}
        return self.sampling | own | asked

    def kind(self, request: ImageRequest) -> Hashable:
        """Requests of one kind go into one batch."""
        scheduler = request.scheduler or type(self.own_scheduler).__name__
        return tuple(self.options(request).items()), scheduler, request.negative_prompt is None

    def check(self, request: ImageRequest) -> ImageRequest:
        """The request with its seed; its subjects are loaded.

        Raises:
            Refusal: if it cannot be answered.
        """
        s = self.settings
        limits = {
            "num_inference_steps": s.max_num_inference_steps,
            "height": s.max_image_size,
            "width": s.max_image_size,
            "num_images_per_prompt": s.max_batch_size,
        }
        for name, most in limits.items():
            if (value := getattr(request, name)) is not None and value > most:
                raise Refusal(422, f"must be {most} at most, got {value}", name)
        for name in (*OPTIONS, "negative_prompt"):
            if getattr(request, name) is not None and name not in self.takes:
                raise Refusal(422, f"{type(self.pipe).__name__} does not take it", name)
        if request.response_format == "png" and request.num_images_per_prompt > 1:
            raise Refusal(422, "png is for a single image; ask for json", "response_format")
        if request.scheduler is not None and request.scheduler not in self.schedulers:
            raise Refusal(
                422, f"must be of {', '.join(sorted(self.schedulers))}, got {request.scheduler}", "scheduler"
            )
        self._check_size(request)
        self._load(request)
        if request.seed is not None:
            return request
        return request.model_copy(update={"seed": secrets.randbelow(2**32)})

    def _check_size(self, request: ImageRequest) -> None:
        multiple = getattr(self.pipe, "vae_scale_factor", 8)
        for name in ("height", "width"):
            if (value := getattr(request, name)) is not None and value % multiple:
                raise Refusal(422, f"must be a multiple of {multiple}, got {value}", name)
        size = {name: value for name in ("height", "width") if (value := self.options(request).get(name)) is not None}
        if len(size) == 1:  # diffusers' pipelines take the model's own for both then, without a word
            missing = "width" if "height" in size else "height"
            raise Refusal(422, f"must be given where {', '.join(size)} is", missing)

    def _load(self, request: ImageRequest) -> None:
        names = list(request.mixture or {})
        self._refuse_unknown(names)
        if infinite := [name for name, weight in (request.mixture or {}).items() if not math.isfinite(weight)]:
            raise Refusal(422, f"times that of {infinite[0]!r} is more than a number can be", "weight")
        try:
            self.store.load(names)
        except (ValueError, OSError) as error:  # a file that was put there by hand
            self._refuse_unknown(names)
            raise Refusal(422, without_folder(error, self.store.folder()), "subject") from error

    def _refuse_unknown(self, names: Sequence[str]) -> None:
        try:
            unknown = [name for name in names if name not in self.beside and name not in self.store]
        except FileNotFoundError as error:
            raise no_folder() from error
        if unknown:
            raise no_subject(unknown[0], "subject")

    def make(
        self, requests: Sequence[ImageRequest], abandoned: Callable[[], bool] = lambda: False
    ) -> list[list[Image.Image] | Refusal]:
        """The images of each request, or why there are none, which is about this request alone.

        Args:
            requests: of one kind, checked.
            abandoned: whether nobody waits for any of them, asked after each step.
        """
        try:
            images = iter(self._call(requests, abandoned))
        except Abandoned:
            return [Refusal(499, "the client went away") for _ in requests]
        except Exception as error:  # one of them may be to blame, or the memory of all
            if len(requests) > 1 and not isinstance(error, DeviceError):
                return [answer for request in requests for answer in self.make([request], abandoned)]
            try:
                self._refuse_unknown(list(requests[0].mixture or {}))  # one that was deleted since
            except Refusal as refusal:
                return [refusal]
            logger.exception("a batch failed")
            if isinstance(error, DeviceError):
                raise
            status = 422 if isinstance(error, ValueError) else 500
            return [Refusal(status, f"{type(error).__name__}: {error}")]
        return [[next(images) for _ in range(request.num_images_per_prompt)] for request in requests]

    def _call(self, requests: Sequence[ImageRequest], abandoned: Callable[[], bool]) -> Sequence[Image.Image]:
        rows = [(request, i) for request in requests for i in range(request.num_images_per_prompt)]
        options: dict[str, Any] = self.options(requests[0])
        if requests[0].negative_prompt is not None:
            options["negative_prompt"] = [request.negative_prompt for request, _ in rows]

        def after_step(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if abandoned():
                raise Abandoned
            return {}

        if "callback_on_step_end" in self.takes:
            options["callback_on_step_end"] = after_step
        kind = self.schedulers[requests[0].scheduler or type(self.own_scheduler).__name__]
        self.pipe.scheduler = (
            self.own_scheduler if kind is type(self.own_scheduler) else kind.from_config(self.own_scheduler.config)
        )
        generators = [torch.Generator().manual_seed(int(request.seed or 0) + i) for request, i in rows]
        subjects = [request.mixture for request, _ in rows]
        with coeff_per_sample(self.pipe, subjects) if any(subjects) else nullcontext():
            images: Sequence[Image.Image] = self.pipe(
                [request.prompt for request, _ in rows], generator=generators, **options
            ).images
        return images

    def settings_of(self, request: ImageRequest) -> dict[str, Any]:
        """What makes the request's images again."""
        said = request.model_dump(exclude={"response_format"})
        return said | self.options(request) | {"scheduler": request.scheduler or type(self.own_scheduler).__name__}

    def check_file(self, name: str, data: bytes) -> None:
        """Raises Refusal unless this is a coefficient file for the pipeline's denoiser."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.safetensors"
            path.write_bytes(data)
            try:
                state_dict, header = read_file(path)
            except (ValueError, OSError) as error:
                raise Refusal(422, without_folder(error, path.parent)) from error
        problems = differences(self.pipe, state_dict, header["coeff_diffusers"])
        known = denoisers(self.pipe)
        problems |= {
            key: f"a batch of several subjects has coefficients of {', '.join(known)} alone"
            for key in state_dict
            if key.partition(".")[0] not in known and key not in problems
        }
        if problems:
            listed = "\n  ".join(f"{printable(what)}: {why}" for what, why in problems.items())
            raise Refusal(422, f"{name}.safetensors does not fit {type(self.pipe).__name__}:\n  {listed}")
