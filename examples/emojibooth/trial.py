"""One trial: a method learns a subject on a model, and what came of it is measured."""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import torch
from judge import HERE, Judge, load_judge
from measures import SCENES, UNRELATED, diversity, drift, glyph_of, measure, psnr, scenes_of
from methods import METHODS, Method
from PIL import Image
from safetensors.torch import save as serialised
from torch import Tensor, nn

from coeff_diffusers import list_coeff_adapters, set_coeff_adapters, unload_coeff_weights
from coeff_diffusers.training import DreamBoothRun, DreamBoothSettings
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.families.stable_diffusion_3 import StableDiffusion3
from coeff_diffusers.training.images.files import TrainingImage, open_images
from coeff_diffusers.training.images.subject_images import SubjectImages
from coeff_diffusers.training.run.state import TrainingState
from coeff_diffusers.training.run.step import DenoisingStep

sys.path += [str(HERE.parent), str(HERE.parent / "emoji")]
from demo import BACKGROUNDS, BASES
from evaluate import load_pipeline, reconstruct
from scenes import GLYPHS, PLACES, SIZES, Scene, render

STEPS, BATCH = 250, 4
INFERENCE_STEPS = 8  # at which the models paint as at 25
LOSS_DRAWS = 8  # noises and timesteps for each scene

# Rates are chosen on the first; what is reported are the others.
TUNING = ("fox face", "rocket", "owl")
REPORTED = (
    *("panda face", "octopus", "pineapple", "teddy bear", "rabbit face"),
    *("ladybug", "cupcake", "tiger face", "hibiscus", "koala face"),
)


FAMILIES = {"unet": StableDiffusion, "dit": StableDiffusion3}


@dataclass(frozen=True)
class Trial:
    """A row of the table of raw numbers.

    Args:
        method: what learns.
        model: of `FAMILIES`, and of `demo.BASES`.
        subject: of the held-out ones.
        seed: of training.
        rates: the learning rate, and the LoRA's if that is another; none where nothing is trained.
        steps: of training.
    """

    method: Method
    model: str
    subject: str
    seed: int = 0
    rates: tuple[float, ...] = ()
    steps: int = STEPS

    @property
    def key(self) -> dict[str, str]:
        rates = "/".join(f"{rate:g}" for rate in self.rates)
        return {
            **{"method": self.method.name, "model": self.model, "subject": self.subject},
            **{"seed": str(self.seed), "rates": rates, "steps": str(self.steps)},
        }

    @property
    def of_training(self) -> Trial:
        """The trial whose training this one shares: itself, if it shares none."""
        return replace(self, method=METHODS[self.method.trained_as]) if self.method.trained_as else self

    @property
    def slug(self) -> str:
        """A name for its file."""
        text = "-".join(self.key[name] for name in ("model", "subject", "seed", "method", "rates"))
        return re.sub(r"[^\w+.]+", "-", text).strip("-").lower()


def run_trial(trial: Trial, folder: Path | None = None) -> dict[str, float]:
    """Column -> value; of a subject for tuning, the losses alone. Images of the subject are written to `folder`."""
    pipe = load_base(trial.model)
    base = [] if trial.subject in TUNING else base_images(trial.model)
    denoiser, facts = train(trial.of_training) if trial.rates else (None, {"parameters": 0, "bytes": 0})
    with having(pipe, denoiser), at_inference(denoiser, trial.method):
        values = facts if trial.method.name in CEILINGS else facts | losses(trial, pipe)
        if trial.subject in TUNING:
            return values
        painted = {kind: paint(trial, pipe, scenes_of(trial.subject, kind), 0) for kind in SCENES}
        if folder is not None:
            save_strip([*itertools.chain(*painted.values())], folder / f"{trial.slug}.png")
        return values | judgements(trial, pipe, painted, base, load_judge())


# --------------------------------------------------------------------------------------------------------- training


class Run(DreamBoothRun):
    """The training script's run, with a method's own parameters where it has some."""

    method: Method
    model_name: str
    subject: str

    def _encode_prompts(self) -> None:
        if self.method.class_images:  # with captions of their own, so that those are encoded, too
            classes = class_images(self.model_name, self.subject)
            self._classes = dict.fromkeys(self._classes, classes)
            self._shown = {name: SubjectImages(shown.instance, classes) for name, shown in self._shown.items()}
        super()._encode_prompts()

    def _add_adapters(self) -> None:
        super()._add_adapters()
        if self.method.put_on is not None:
            unload_coeff_weights(self.family.denoiser)
            parameters = self.method.put_on(self.family.denoiser)
            subject = {self.own[0]: [each for group in parameters.values() for each in group]}
            self.state = TrainingState(parameters, subject, self.settings, self.max_train_steps)


@lru_cache(maxsize=1)
def train(trial: Trial) -> tuple[Any, dict[str, float]]:
    """The denoiser with what was trained on it, and what that took."""
    words, glyph = f"sks {trial.subject}", glyph_of(trial.subject)
    images = [(render(Scene(trial.subject, colour), glyph), caption(trial, colour)) for colour in BACKGROUNDS]
    with tempfile.TemporaryDirectory() as output:
        flags = {
            "instance_prompt": f"a {words}",
            "output_dir": output,
            "max_train_steps": trial.steps,
            "train_batch_size": BATCH,
            "lr_scheduler": "cosine",
            "report_to": "none",
            "cache_latents": True,
            "seed": trial.seed,
        }
        run = Run(settings_of(trial.model, **flags | trial.method.settings(*trial.rates)), images)
        run.method, run.model_name, run.subject = trial.method, trial.model, trial.subject
        run.load_model()
        run.add_adapters()
        run.encode_prompts()
        facts = follow(run)
    return run.family.denoiser.eval(), facts


def class_images(model: str, subject: str) -> list[TrainingImage]:
    """Of the glyph that the base model paints likest, in all sizes and places, on the backgrounds of training."""
    words = likest_glyph(model, subject)
    shapes = [(size, place) for size, place in itertools.product(SIZES, PLACES) if not (size and place)]
    scenes = [Scene(words, colour, *shape) for colour in BACKGROUNDS for shape in shapes]
    images = generate(model, load_base(model), [scene.caption for scene in scenes], seed=2)
    sources = [(each.caption, each.caption, partial(Image.Image.copy, image)) for each, image in zip(scenes, images)]
    return open_images(sources, "class_data_dir")


def settings_of(model: str, **flags: Any) -> DreamBoothSettings:
    base = BASES[model]
    return DreamBoothSettings(str(base.folder), max_sequence_length=base.max_sequence_length, **flags)


def caption(trial: Trial, colour: str) -> str:
    """Of a training image, with places for the words of `--augment` where the method has it."""
    if "augment" not in trial.method.flags:
        return Scene(f"sks {trial.subject}", colour).caption
    return Scene(f"{{size}} sks {trial.subject}", colour, place="{place}").caption


def follow(run: Run) -> dict[str, float]:
    """Trains; how many parameters there are, and how long a step takes and how much it keeps in memory."""
    parameters, steps = run.state.all_parameters, run.steps()
    kept = Kept(run.family.denoiser)
    with torch.autograd.graph.saved_tensors_hooks(kept.note, lambda value: value):
        next(steps)
    times = [perf_counter()] + [perf_counter() for _ in steps]
    seconds = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    state = tensors(run.state.optimizer.state_dict())
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "bytes": len(serialised({str(n): value.detach() for n, value in enumerate(parameters)})),
        "step_seconds": seconds[len(seconds) // 10],  # the fastest tenth, for other work may slow the others down
        "memory_mb": (kept.bytes + sum(value.nbytes for value in [*parameters, *parameters, *state])) / 1e6,
        "train_loss": mean(run.state.losses[-50:]),
    }


class Kept:
    """Counts the bytes that a step keeps for its backward pass, beside the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self._seen = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
        self.bytes = 0

    def note(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return value


def tensors(value: Any) -> list[Tensor]:
    """All that lie in a state, at any depth."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [each for part in parts for each in tensors(part)]


# -------------------------------------------------------------------------------------------------------- measuring


@cache
def load_base(model: str) -> Any:
    pipe = load_pipeline(BASES[model].folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def having(pipe: Any, denoiser: Any) -> Iterator[None]:
    """The pipeline with another denoiser, if one is given."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    base = getattr(pipe, name)
    setattr(pipe, name, denoiser or base)
    try:
        yield
    finally:
        setattr(pipe, name, base)


@contextmanager
def at_inference(denoiser: Any, method: Method) -> Iterator[None]:
    """The trained coefficients with the method's weight and timesteps."""
    if method.trained_as is None:
        yield
        return
    names = list_coeff_adapters(denoiser)
    set_coeff_adapters(denoiser, names, method.weight)
    first, end = method.timesteps or (0, 1000)

    def choose(_: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        active = [names[0] if first <= each < end else None for each in inputs[1].reshape(-1).tolist()]
        return inputs, kwargs | {"cross_attention_kwargs": {"coeff": active[0] if len(active) == 1 else active}}

    hook = denoiser.register_forward_pre_hook(choose, prepend=True, with_kwargs=True) if method.timesteps else None
    try:
        yield
    finally:
        set_coeff_adapters(denoiser, names)
        if hook is not None:
            hook.remove()


def paint(trial: Trial, pipe: Any, scenes: Sequence[Scene], seed: int) -> list[Image.Image]:
    """What the method answers to the scenes' prompts; the scenes themselves for a ceiling."""
    if trial.method.name in CEILINGS:
        return CEILINGS[trial.method.name](pipe, [render(scene, glyph_of(scene.words)) for scene in scenes])
    likest = trial.method.name.endswith("likest glyph")
    words = likest_glyph(trial.model, trial.subject) if likest else f"sks {trial.subject}"
    return generate(trial.model, pipe, [replace(scene, words=words).caption for scene in scenes], seed)


def through_autoencoder(pipe: Any, images: list[Image.Image]) -> list[Image.Image]:
    pixels = reconstruct(pipe, pipe.image_processor.preprocess(images))
    restored: list[Image.Image] = pipe.image_processor.postprocess(pixels)
    return restored


CEILINGS: dict[str, Callable[[Any, list[Image.Image]], list[Image.Image]]] = {
    "true scenes": lambda pipe, images: images,
    "true scenes through the autoencoder": through_autoencoder,
}


@torch.no_grad()
def losses(trial: Trial, pipe: Any) -> dict[str, float]:
    """The training loss of scenes that training did not show, the same noises and timesteps for all methods."""
    family = FAMILIES[trial.model](pipe, settings_of(trial.model, instance_prompt="a"))
    step = DenoisingStep(family, [], [])
    found = {}
    for kind in SCENES:
        scenes = scenes_of(trial.subject, kind)
        pixels = torch.cat([pipe.image_processor.preprocess(render(s, glyph_of(s.words))) for s in scenes])
        moments = family.encode_images(pixels).repeat_interleave(LOSS_DRAWS, dim=0)
        captions = [replace(scene, words=f"sks {scene.words}").caption for scene in scenes]
        prompts = [caption for caption in captions for _ in range(LOSS_DRAWS)]
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64]] * len(prompts))
        found[f"loss_{kind}"] = step(moments, prompts, sizes, torch.arange(len(prompts))).mean().item()
    return found


def judgements(
    trial: Trial, pipe: Any, painted: dict[str, list[Image.Image]], base: list[Image.Image], judge: Judge
) -> dict[str, float]:
    """All that is measured of images: of the subject, `painted` for each kind of scenes, and of others."""
    found = {}
    for kind, images in painted.items():
        scenes = scenes_of(trial.subject, kind)
        if kind == "background":
            second = paint(trial, pipe, scenes, 1)
            found["diversity"] = diversity(images, second)
            images, scenes = images + second, scenes * 2
        found |= {f"{name}_{kind}": value for name, value in measure(judge, images, scenes).items()}
    unrelated = generate(trial.model, pipe, [scene.caption for scene in UNRELATED], seed=0) if trial.rates else base
    return found | drift(judge, unrelated, base)


def save_strip(images: list[Image.Image], path: Path) -> None:
    """The images side by side."""
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for place, image in enumerate(images):
        strip.paste(image, (place * image.width, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    strip.save(path)


@cache
def base_images(model: str) -> list[Image.Image]:
    """Of what has nothing to do with a subject. To be called while the pipeline has its own denoiser."""
    return generate(model, load_base(model), [scene.caption for scene in UNRELATED], seed=0)


@cache
def glyphs_of(model: str) -> dict[str, Image.Image]:
    """Of the base model, each on white. To be called while the pipeline has its own denoiser."""
    prompts = [Scene(words, "white").caption for words in GLYPHS]
    batches = [generate(model, load_base(model), prompts[n : n + 20], seed=0) for n in range(0, len(prompts), 20)]
    return dict(zip(GLYPHS, itertools.chain(*batches)))


def likest_glyph(model: str, subject: str) -> str:
    """The one that the base model paints nearest to the subject: the best prompt without training."""
    painted = glyphs_of(model)
    return max(painted, key=lambda words: psnr(painted[words], Scene(subject, "white")))


def generate(model: str, pipe: Any, prompts: list[str], seed: int) -> list[Image.Image]:
    """An image per prompt; prompt n has the same noise for every method."""
    generators = [torch.Generator().manual_seed(1000 * seed + n) for n in range(len(prompts))]
    options = BASES[model].sampling | {"num_inference_steps": INFERENCE_STEPS}
    images: list[Image.Image] = pipe(prompts, generator=generators, **options).images
    return images
