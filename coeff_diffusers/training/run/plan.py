"""What a run will hold in memory, told before its model is loaded, and the flags by which it holds less.

The base model is built of fake tensors, by its configs, and the run's own code goes through on them: it encodes a
prompt and an image, takes a training step, decodes an image. What lives at the same time is added up for each phase.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
from accelerate import init_empty_weights
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ...quantization import Quantization
from ..adapters import add_adapters
from ..errors import InputError
from ..families import Family, find_quantization
from ..families.loading import is_model
from ..families.single_file import is_single_file, single_file_config
from ..results.validation import all_prompts
from ..settings.dreambooth import DreamBoothSettings
from ..settings.rules import parse_buckets
from .memory import checkpoint_blocks
from .offload import GroupOffload, check_movable, offloadable_blocks
from .processes import DTYPES
from .quantised import (
    BITS_MOVED,
    bits_of,
    compute_as_quantised,
    largest_layer,
    plain_bytes,
    quantised_layers,
    weight_bytes,
)
from .tally import Tally, fake_tensors

PROMPT = "a"  # longer ones take no more: encoders pad them, or take little
COPIES = 2  # of the layer that is being quantised on a CPU: what peaked with each of the libraries, 1.7 to 3
CONTAINER = Path("/sys/fs/cgroup")  # of this process, where it is in one
SMALL = 2**26  # bytes of weights, below which no device is too small


@dataclass(frozen=True)
class Phase:
    """A part of a run: bytes of the weights that are on the device, and the most of all else at once."""

    name: str
    weights: int
    rest: int

    @property
    def total(self) -> int:
        return self.weights + self.rest


@dataclass(frozen=True)
class Plan:
    """Phases of a run."""

    phases: tuple[Phase, ...]

    @property
    def peak(self) -> int:
        """Bytes, of the phase that takes most."""
        return max(phase.total for phase in self.phases)

    def text(self) -> str:
        return ", ".join(
            f"{phase.name} {gib(phase.total)} ({gib(phase.weights)} of them weights)" for phase in self.phases
        )


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def plan_run(
    kind: type[Family],
    settings: DreamBoothSettings,
    index: Mapping[str, Any],
    precision: str,
    quantization: Quantization,
    subjects: int = 1,
    device_type: str = "cpu",
    saved: Mapping[str, str] | None = None,
) -> Plan:
    """What the run's phases take, each process's part.

    Args:
        kind: of the base model.
        settings: of the run.
        index: what the base model's model_index.json says.
        precision: of accelerate: "no", "fp16" or "bf16".
        quantization: of the base model.
        subjects: how many are trained at once, each with a batch of its own.
        device_type: of the run. The tensors are those of a CPU in any case; but autocast on GPUs norms in float32.
        saved: how the base model was quantised when it was saved, if that has been read.

    Raises:
        Exception: of any kind, where code of this base model wants to see values, which fake tensors have not.
    """
    dtype = DTYPES[precision]
    autocast = nullcontext() if precision == "no" else torch.autocast("cpu", dtype)
    with _quietly(), torch.random.fork_rng(devices=[]):
        family = kind(pipeline_of_configs(settings, index, dtype), settings)
        parts = [part for part in family.pipeline.components.values() if isinstance(part, nn.Module)]
        saved = dict(saved_quantization(settings, index) if saved is None else saved)
        quantised = [name for name in quantization.parts(index) if name not in saved]
        methods = saved | dict.fromkeys(quantised, quantization.method or "")
        bits = {name: bits_of(how) for name, how in methods.items()}
        if quantization.gguf_file:
            methods[family.denoiser_name] = "gguf"
            bits[family.denoiser_name] = _bits_of_file(family.denoiser, quantization.gguf_file)
        method = methods.get(family.denoiser_name, "")
        if settings.group_offload:
            try:
                check_movable(method)
            except ValueError as error:
                raise InputError(f"--group_offload: {error}") from error
        named = family.pipeline.components.items()
        weights = {name: weight_bytes(part, bits.get(name)) for name, part in named if isinstance(part, nn.Module)}
        read = _read_bytes(family, quantised) if device_type == "cpu" else {}
        for name, how in methods.items():
            compute_as_quantised(family.pipeline.components[name], how)
        adapters = add_adapters(family, settings, PROMPT)
        with fake_tensors(*parts), autocast:
            if precision != "no" and device_type != "cpu":
                _norm_in_float32(family.denoiser)
            resident = weights[family.denoiser_name]
            if device_type == "cpu":  # which has all that is offloaded in its memory
                settings = replace(settings, offload_activations=False)
            elif settings.group_offload:
                moved = BITS_MOVED.get(method, bits.get(family.denoiser_name))
                resident -= _bytes_at_home(family.denoiser, moved)
            phases = list(_phases(family, settings, weights, read, resident, adapters, subjects))
            if resident < weights[family.denoiser_name] and method.startswith("bnb"):
                made = Phase("loading", weights[family.denoiser_name], 0)  # on the GPU, by its kernels
                phases.insert([phase.name for phase in phases].index("training"), made)
            return Plan(tuple(phases))


def saved_quantization(settings: DreamBoothSettings, index: Mapping[str, Any]) -> dict[str, str]:
    """Component -> how it was quantised when it was saved, as its config says, of those that were."""
    name, revision = settings.pretrained_model_name_or_path, settings.revision
    if is_single_file(name):
        return {}
    configs = {part: _config(said, name, part, revision) for part, said in index.items() if is_model(said)}
    found = {part: said for part, config in configs.items() if (said := config.get("quantization_config"))}
    return {part: _method(said if isinstance(said, dict) else said.to_dict()) for part, said in found.items()}


def _config(said: Any, source: str, part: str, revision: str | None) -> dict[str, Any]:
    kind = getattr(importlib.import_module(said[0]), said[1])
    if said[0] == "diffusers":
        return dict(kind.load_config(source, subfolder=part, revision=revision))
    return dict(kind.config_class.get_config_dict(source, subfolder=part, revision=revision)[0])


def _method(said: Mapping[str, Any]) -> str:
    """What a quantization_config says, as `quantization_of` would of the model."""
    method = str(said.get("quant_method"))
    if method == "bitsandbytes":
        return "bnb_int8" if said.get("load_in_8bit") else f"bnb_{said.get('bnb_4bit_quant_type')}"
    return f"{method}_{said.get('weights_dtype') or said.get('weights') or said.get('quant_type')}"


def _bits_of_file(denoiser: nn.Module, file: str) -> float:
    """A weight's, of a GGUF file, which may hold each in another way."""
    return 8 * Path(file).stat().st_size / sum(parameter.numel() for parameter in denoiser.parameters())


def _read_bytes(family: Family, quantised: Collection[str]) -> dict[str, int]:
    """Bytes that a CPU has in memory of a file beside what was made of it, for each model that the run quantises.

    A file is mapped, so of a text encoder what is not quantised is there once; of a denoiser it is copied at the end,
    to let go of the file. That of GGUF is not mapped.
    """
    parts = {name: family.pipeline.components[name] for name in quantised}
    found = {name: sum(map(plain_bytes, quantised_layers(part))) for name, part in parts.items()}
    if family.denoiser_name in parts:
        found[family.denoiser_name] = weight_bytes(family.denoiser, None)
    return found


def _bytes_at_home(denoiser: nn.Module, bits: float | None) -> int:
    """Bytes of the blocks that --group_offload has in the CPU's memory, while three of them are on the device."""
    blocks = sorted(weight_bytes(block, bits) for block in offloadable_blocks(denoiser))
    return sum(blocks[:-3])


def _phases(
    family: Family,
    settings: DreamBoothSettings,
    weights: Mapping[str, int],
    read: Mapping[str, int],
    resident: int,
    adapters: Mapping[str, list[nn.Parameter]],
    subjects: int,
) -> Iterator[Phase]:
    vae, denoiser = family.pipeline.vae, weights[family.denoiser_name]
    encoders = [getattr(family.pipeline, name) for name in family.text_encoder_names if name in weights]
    if settings.with_prior_preservation:
        yield Phase("class images", sum(weights.values()) - denoiser + resident, _decoded(family, settings))
    with torch.no_grad(), Tally(*encoders) as tally:
        condition = family.encode([PROMPT])[0]
    kept = sum(size for name, size in read.items() if name != family.denoiser_name)
    made = max((COPIES * largest_layer(encoder) for encoder in encoders if kept), default=0)
    yield Phase("prompts", sum(weights.values()) - denoiser, kept + max(tally.peak, made))
    height, width = _size(family, settings)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), Tally(vae) as tally:
        moments = family.encode_images(torch.empty(1, 3, height, width))
    encoded, held = tally.peak, 0
    if settings.train_text_encoder:
        held += sum(weights[name] for name in family.text_encoder_names if name in weights)
    if settings.cache_latents:
        yield Phase("latents", held + weights["vae"], encoded)
        encoded = 0
    else:
        held += weights["vae"]
    held += resident
    if family.denoiser_name in read:
        made = read[family.denoiser_name] + COPIES * largest_layer(family.denoiser)
        yield Phase("loading", held, made)
    batch = settings.train_batch_size * subjects * (2 if settings.with_prior_preservation else 1)
    step = _training_step(family, settings, moments, condition, encoders, batch)
    trained = sum(p.numel() for group in adapters.values() for p in group) * subjects
    step += 16 * trained  # float32: a parameter, its gradient, two means of AdamW
    yield Phase("training", held, max(encoded, step))
    if all_prompts(settings) or settings.subjects:
        yield Phase("validation", held + weights["vae"] * settings.cache_latents, _decoded(family, settings))


def _training_step(
    family: Family,
    settings: DreamBoothSettings,
    moments: Any,
    condition: dict[str, Any],
    encoders: list[nn.Module],
    batch: int,
) -> int:
    """Bytes of a step, beside all parameters."""
    denoiser: Any = family.denoiser
    if settings.group_offload:
        GroupOffload(denoiser, torch.device("cpu"))
    elif settings.gradient_checkpointing:
        checkpoint_blocks(denoiser, settings.checkpoint_every)
    denoiser.train()
    height, width = _size(family, settings)
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * batch)
    with Tally(denoiser, *encoders) as tally:
        generators = [torch.Generator().manual_seed(0) for _ in range(batch)]
        latents = family.sample_latents(moments.expand(batch, *moments.shape[1:]), generators)
        conditions = family.encode([PROMPT] * batch) if settings.train_text_encoder else [condition] * batch
        with saved_tensors_hooks(_shape, _empty) if settings.offload_activations else nullcontext():
            errors = family.errors(denoiser, latents, family.collate(conditions), sizes, generators)
        errors.mean().backward()
    return int(tally.peak)


def _shape(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _empty(shape: tuple[torch.Size, tuple[int, ...], torch.dtype]) -> Tensor:
    size, stride, dtype = shape
    return torch.empty_strided(size, stride, dtype=dtype)


def _decoded(family: Family, settings: DreamBoothSettings) -> int:
    """Bytes of decoding a batch of images, beside weights."""
    vae, side = family.pipeline.vae, settings.resolution or family.own_resolution
    with torch.no_grad(), torch.autocast("cpu", enabled=False), Tally(vae) as tally:
        moments = family.encode_images(torch.empty(1, 3, side, side))
        before = tally.now
        tally.peak = before
        count = min(settings.sample_batch_size, settings.num_validation_images)
        family.decode_images(moments[:, 0].expand(count, *moments.shape[2:]))
    return int(tally.peak - before)


def _size(family: Family, settings: DreamBoothSettings) -> tuple[int, int]:
    """Height and width of the largest training image."""
    side = settings.resolution or family.own_resolution
    return max(parse_buckets(settings.aspect_ratio_buckets) or ((side, side),), key=lambda size: size[0] * size[1])


def pipeline_of_configs(settings: DreamBoothSettings, index: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The base model's pipeline, its models by their configs alone, without weights."""
    name, revision = settings.pretrained_model_name_or_path, settings.revision
    source = single_file_config(name, settings.single_file_config)[0] if is_single_file(name) else name
    models: dict[str, Any] = {}
    for part, said in index.items():
        if is_model(said):
            kind = getattr(importlib.import_module(said[0]), said[1])
            of_diffusers = said[0] == "diffusers"
            read = kind.load_config if of_diffusers else kind.config_class.from_pretrained
            config = read(source, subfolder=part, revision=revision)
            if of_diffusers:
                config.pop("quantization_config", None)
            with init_empty_weights():
                model = kind.from_config(config) if of_diffusers else kind._from_config(config)
            models[part] = nn.Module.to(model, dtype=dtype).requires_grad_(False).eval()
    unset = {part: None for part, said in index.items() if said in ([None, None], (None, None))}
    return diffusers.DiffusionPipeline.from_pretrained(source, revision=revision, **unset, **models)


def _norm_in_float32(denoiser: nn.Module) -> None:
    """Layer and group norms as autocast has them on GPUs, with float32 inputs and outputs."""
    for module in denoiser.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            for name, value in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty(value.shape), False))
            module.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what libraries say of a model, which they say again when it is loaded."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(level)


# What there is, and what to do about it


def fitting(
    kind: type[Family],
    settings: DreamBoothSettings,
    index: Mapping[str, Any],
    device: torch.device,
    precision: str,
    cacheable: bool,
    subjects: int,
    say: Callable[[str], object],
) -> DreamBoothSettings:
    """Says what the run will take, and what would make it fit; with --memory auto, the settings that fit.

    Args:
        kind: of the base model.
        settings: of the run.
        index: what the base model's model_index.json says.
        device: of the run.
        precision: of accelerate: "no", "fp16" or "bf16".
        cacheable: whether --cache_latents can be had for the images.
        subjects: how many are trained at once.
        say: is told.

    Raises:
        InputError: if it cannot fit, or --memory auto finds nothing that does, or cannot tell.
    """
    auto = settings.memory == "auto"
    if settings.memory == "off" or not (auto or _may_be_large(settings)):
        return settings
    free, whole = free_memory_of(device), whole_memory_of(device)

    saved = cache(partial(saved_quantization, settings, index))  # once for all plans

    def plan(changed: DreamBoothSettings) -> Plan:
        quantization = find_quantization(changed, index, changed.train_text_encoder, device)
        asked = changed.mixed_precision if changed.mixed_precision != settings.mixed_precision else precision
        return plan_run(kind, changed, index, asked or "no", quantization, subjects, device.type, saved())

    try:
        asked = plan(settings)
    except InputError:
        raise
    except Exception as error:  # of whatever wants to see the values of tensors that have none
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        if auto:
            raise InputError(f"--memory auto: this model's memory cannot be told before ({reason})") from error
        say(f"Memory: cannot be told before ({reason}).")
        return settings
    say(f"Memory: {gib(asked.peak)} expected beside what is taken now, of {gib(free)} that are free: {asked.text()}.")
    if asked.peak <= free:
        return settings
    ways = remedies(settings, device, cacheable, bool(saved()))
    chosen, flags, found = _remedied(settings, free, plan, ways)
    return _answer(settings, asked, chosen, flags, found, free, whole, say)


def _remedied(
    settings: DreamBoothSettings, free: int, plan: Callable[[DreamBoothSettings], Plan], ways: list[Remedy]
) -> tuple[DreamBoothSettings, list[str], Plan | None]:
    """The settings with as few remedies as make it fit, those that cost little first; and these flags and their plan.

    A remedy that replaces another, as 4 bits replace 8, takes its place.
    """
    changed, flags, found = settings, {}, None
    for way in ways:
        try:
            tried = way.change(changed)
            found = plan(tried)
        except InputError:  # a package that is not there, or settings that do not go together
            continue
        changed = tried
        flags[way.flags.split()[0]] = f"{way.flags} (costs {way.cost}; {gib(found.peak)})"
        if found.peak <= free:
            break
    return changed, list(flags.values()), found


def _answer(
    settings: DreamBoothSettings,
    asked: Plan,
    chosen: DreamBoothSettings,
    flags: list[str],
    found: Plan | None,
    free: int,
    whole: int,
    say: Callable[[str], object],
) -> DreamBoothSettings:
    """What becomes of a run that does not fit as it was asked for."""
    fits = found is not None and found.peak <= free
    listed = "".join(f"\n  {flag}" for flag in flags)
    if settings.memory == "auto" and fits:
        say(f"--memory auto takes, one after the other:{listed}")
        return replace(chosen, memory="plan")
    ways = (
        f"These flags, one after the other, would make it fit:{listed}"
        if fits
        else f"Not even these flags would make it fit:{listed}\n  A smaller --resolution or model is what is left."
    )
    if settings.memory == "auto":
        raise InputError(f"--memory auto: {gib(free)} are free. {ways}")
    if max(phase.weights for phase in asked.phases) > whole:
        raise InputError(f"the weights alone do not fit into the {gib(whole)} that this device has. {ways}")
    say(f"It may not fit. {ways}")
    return settings


def _may_be_large(settings: DreamBoothSettings) -> bool:
    """Whether to look at all, which takes seconds: not at a folder whose weights are a few MB."""
    name = Path(settings.pretrained_model_name_or_path)
    files = [name] if name.is_file() else [*name.rglob("*.safetensors"), *name.rglob("*.bin")]
    return not files or sum(file.stat().st_size for file in files) > SMALL


def free_memory_of(device: torch.device) -> int:
    """Bytes that a device has free; of a CPU's, what a container leaves to this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free, limit = int(psutil.virtual_memory().available), _limit_of_container()
    if limit is None:
        return free
    used = int((CONTAINER / "memory.current").read_text(encoding="ascii"))
    stat = dict(line.split() for line in (CONTAINER / "memory.stat").read_text(encoding="ascii").splitlines())
    return min(free, limit - used + int(stat.get("inactive_file", 0)))  # of files that were read, and can be dropped


def whole_memory_of(device: torch.device) -> int:
    """Bytes that a device has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    whole, limit = int(psutil.virtual_memory().total), _limit_of_container()
    return whole if limit is None else min(whole, limit)


def _limit_of_container() -> int | None:
    try:
        return int((CONTAINER / "memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # not in a container of that kind, or without a limit ("max")
        return None


@dataclass(frozen=True)
class Remedy:
    """Settings by which a run takes less, and what they cost."""

    flags: str
    cost: str
    change: Callable[[DreamBoothSettings], DreamBoothSettings]


def remedies(
    settings: DreamBoothSettings, device: torch.device, cacheable: bool, quantised: bool = False
) -> list[Remedy]:
    """Those that these settings leave, in the order of what they cost.

    Args:
        settings: of the run.
        device: of the run.
        cacheable: whether --cache_latents can be had.
        quantised: whether the base model was saved so.
    """
    found = []
    if cacheable and not settings.cache_latents:
        found.append(Remedy("--cache_latents", "nothing", lambda s: replace(s, cache_latents=True)))
    if settings.mixed_precision in (None, "no") and _bf16_is_there(device):
        found.append(Remedy("--mixed_precision bf16", "some precision", lambda s: replace(s, mixed_precision="bf16")))
    if not settings.gradient_checkpointing:
        change = Remedy(
            "--gradient_checkpointing", "a third of the speed", lambda s: replace(s, gradient_checkpointing=True)
        )
        found.append(change)
    if settings.train_batch_size > 1:
        images = settings.train_batch_size * settings.gradient_accumulation_steps
        found.append(
            Remedy(
                f"--train_batch_size 1 --gradient_accumulation_steps {images}",
                "some speed",
                lambda s: replace(s, train_batch_size=1, gradient_accumulation_steps=images),
            )
        )
    if not (quantised or settings.quantize or settings.gguf_file or settings.fsdp or settings.use_dora):
        found.append(
            Remedy("--quantize torchao_int8", "some precision", lambda s: replace(s, quantize="torchao_int8"))
        )
        found.append(Remedy("--quantize bnb_nf4", "more precision", lambda s: replace(s, quantize="bnb_nf4")))
    if device.type == "cpu" or settings.fsdp:
        return found
    if not settings.group_offload:
        flags = "--group_offload" + (" --checkpoint_every 1" if settings.checkpoint_every > 1 else "")
        change = Remedy(flags, "speed: blocks are copied twice a step", _with_group_offload)
        found.append(change)
    if not settings.offload_activations:
        change = Remedy(
            "--offload_activations", "speed: they are copied, too", lambda s: replace(s, offload_activations=True)
        )
        found.append(change)
    return found


def _with_group_offload(settings: DreamBoothSettings) -> DreamBoothSettings:
    return replace(settings, group_offload=True, checkpoint_every=1)


def _bf16_is_there(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.is_bf16_supported()
