"""`coeff-diffusers generate`: images by coefficient files, beside the base model, or many of a file of prompts."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain, groupby
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image
from tqdm import tqdm

from ..adapters import coeff_adapters, coeff_disabled, set_coeff_adapters
from ..checkpoint import find_file, load_coeff_weights, whole_file
from ..console import escaped_output
from ..per_sample import coeff_per_sample
from ..quantization import Quantization, quantization_of
from ..sampling import sampling_defaults
from ..training.families.single_file import is_single_file, load_single_file
from ..training.families.single_file import single_file_config as config_of_single_file
from ..training.run.offload import NOTHING_ON_CPU
from .requests import (
    MANIFEST,
    ImageRequest,
    Manifest,
    PromptsError,
    file_name,
    read_manifest,
    read_prompts,
    value_of,
    write_manifest,
)
from .sheet import sheet

OPTIONS = ("num_inference_steps", "guidance_scale", "guidance_rescale", "height", "width")


@escaped_output()
def main(args: argparse.Namespace) -> Path:
    """Writes what the flags ask for, and returns the sheet or the manifest."""
    with value_of("--output_dir"):
        args.output_dir.mkdir(parents=True, exist_ok=True)
    options = {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    return make_all(args, options) if args.prompts_file else make_sheet(args, options)


def processes() -> PartialState:
    """This process among those that accelerate started: on CPUs, too, which `PartialState` must be told of."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def base_pipeline(
    name_or_path: str,
    single_file_config: str | None,
    dtype: str,
    quantization: Quantization,
    device: torch.device | str,
    group_offload: bool = False,
) -> Any:
    """A pipeline of diffusers, on the device.

    Args:
        name_or_path: of a folder, a name on the Hub or a single file.
        single_file_config: for the latter.
        dtype: as torch names it.
        quantization: of its denoiser and large text encoders.
        device: where it goes.
        group_offload: keeps its models in the CPU's memory, each part for as long as it computes on the device.

    Raises:
        ValueError, OSError: if it cannot be had.
    """
    place = partial(_with_group_offload, device=device) if group_offload else methodcaller("to", device)
    kind = getattr(torch, dtype)
    if is_single_file(name_or_path):
        options = {"dtype": kind, "quantization": quantization, "device": device}
        return place(load_single_file(name_or_path, single_file_config, **options))
    if single_file_config:
        raise ValueError(f"--single_file_config is for a single file, not {name_or_path}")
    parts = pipeline_index(name_or_path, None)
    left_out = [name for name, of in parts.items() if of in ([None, None], (None, None))]
    index = parts if quantization.wanted else {}
    with quantization.loading():
        arguments = dict.fromkeys(left_out) | quantization.arguments(index, name_or_path, kind)
        pipe = DiffusionPipeline.from_pretrained(name_or_path, dtype=kind, **arguments)
        quantization.check_loaded(pipe, index)
    return place(pipe)


def _with_group_offload(pipe: Any, device: torch.device | str) -> Any:
    """By diffusers' hooks, a layer at a time, which all its models take; on a GPU by a stream.

    Raises:
        ValueError: if its weights are held where these hooks (of 0.42.1) do not move them.
    """
    ways = {quantization_of(part) or "" for part in pipe.components.values()}
    stay = sorted(way for way in ways if way == "bnb_int8" or way.startswith("quanto"))
    if stay:
        raise ValueError(
            f"--group_offload: diffusers does not move weights of {', '.join(stay)}; take bnb_nf4 or torchao_int8"
        )
    device = torch.device(device)
    if device.type == "cpu":
        print(NOTHING_ON_CPU)
    pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")
    return pipe


def pipeline_index(name_or_path: str, single_file_config: str | None) -> dict[str, Any]:
    """What the model_index.json of a base model says, or would say of a single file."""
    if is_single_file(name_or_path):
        return config_of_single_file(name_or_path, single_file_config)[1]
    index: dict[str, Any] = DiffusionPipeline.load_config(name_or_path)
    return index


def load_pipeline(args: argparse.Namespace, files: dict[str, Path], device: torch.device | str) -> Any:
    quantization = Quantization(args.quantize, args.gguf_file)
    if quantization.wanted:
        with value_of("--pretrained_model_name_or_path"):
            index = pipeline_index(args.pretrained_model_name_or_path, args.single_file_config)
        with value_of("--quantize" if args.quantize else "--gguf_file"):
            quantization.check(torch.device(device).type, index)
    with value_of("--pretrained_model_name_or_path"):
        pipe = base_pipeline(
            args.pretrained_model_name_or_path,
            args.single_file_config,
            args.dtype,
            quantization,
            device,
            args.group_offload,
        )
    with value_of("--coeff_weights"):
        for name, file in files.items():
            load_coeff_weights(pipe, file, adapter_name=name)
    set_coeff_adapters(pipe, list(files)[-1], args.coeff_scale)
    if args.lora_weights:
        with value_of("--lora_weights"):
            pipe.load_lora_weights(args.lora_weights)
    return pipe


def make_all(args: argparse.Namespace, options: dict[str, Any]) -> Path:
    """Makes the images of the prompts' file, shared out over the processes; returns the manifest."""
    all_asked = read_prompts(args.prompts_file, list(args.coeff_weights), args.seed, args.num_images_per_prompt)
    files = coeff_files(args.coeff_weights, args.weight_name)
    made_with = {
        "model": args.pretrained_model_name_or_path,
        **({"single_file_config": args.single_file_config} if args.single_file_config else {}),
        **{name: value for name in ("quantize", "gguf_file") if (value := getattr(args, name))},
        "coeff_weights": args.coeff_weights,
        "weight_name": {name: file.name for name, file in files.items()},
        "coeff_scale": args.coeff_scale,
        "lora_weights": args.lora_weights,
        "sha256": {args.coeff_weights[name]: digest([file]) for name, file in files.items()}
        | ({args.lora_weights: lora_digest(args.lora_weights)} if args.lora_weights else {}),
        "dtype": args.dtype,
        **options,
    }
    state = processes()
    manifest: Path = args.output_dir / MANIFEST
    known = read_manifest(manifest) if manifest.exists() else {}
    missing = still_to_make(all_asked, made_with, known, args.output_dir, args.overwrite)
    with state.split_between_processes(batches(missing, args.batch_size)) as share:
        made = make_batches(share, args, files, options, state)
        first = next(made, [])
        state.wait_for_everyone()  # nobody writes before all have looked, and seen their settings work
        if state.is_main_process:
            for asked in missing:  # first, or a run that is stopped here leaves old ones under the new manifest
                (args.output_dir / asked.file_name).unlink(missing_ok=True)
            kept = {name: entry for name, entry in known.items() if (args.output_dir / name).exists()}
            write_manifest(kept | {asked.file_name: (asked, made_with) for asked in all_asked}, manifest)
        state.wait_for_everyone()  # nobody writes an image that would be taken away
        for batch in chain([first], made):
            for asked, image in batch:
                write_image(image, args.output_dir / asked.file_name)
    state.wait_for_everyone()
    state.print(f"wrote {len(missing)} images ({len(all_asked) - len(missing)} were there) and {manifest}")
    state.destroy_process_group()  # or gloo's threads abort the process now and then while it ends
    return manifest


def still_to_make(
    images: Sequence[ImageRequest], made_with: dict[str, Any], known: Manifest, folder: Path, overwrite: bool
) -> list[ImageRequest]:
    """Those of which there is no file yet, all with `overwrite`.

    Raises:
        PromptsError: if files of these names were made of something else.
    """
    there = [image for image in images if (folder / image.file_name).exists()]
    if overwrite or not there:
        return list(images)
    others = [image.file_name for image in there if known.get(image.file_name) != (image, made_with)]
    if others:
        raise PromptsError(
            f"{folder} holds images of these names that were made of other prompts, settings or weights: "
            f"{', '.join(others[:10])}{' ...' if len(others) > 10 else ''}; give --overwrite, or another --output_dir"
        )
    return [image for image in images if image not in there]


def coeff_files(coeff_weights: dict[str, str], weight_name: str | None) -> dict[str, Path]:
    """Name -> the file that is loaded: the one that was meant in a folder, or a repository's in the Hub's cache."""
    with value_of("--coeff_weights"):
        return {name: find_file(path, weight_name) for name, path in coeff_weights.items()}


def digest(files: Sequence[Path]) -> str:
    """SHA-256 of files of weights."""
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def lora_digest(source: str) -> str | None:
    """SHA-256 of a LoRA file, of all in a folder, or of a repository's `pytorch_lora_weights.safetensors`.

    `None` of a repository that has no file of that name: diffusers chooses another, and does not say which.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        return digest(files) if files else None
    try:
        return digest([path if path.is_file() else find_file(source, LORA_WEIGHT_NAME_SAFE)])
    except OSError:
        return None


def batches(images: Sequence[ImageRequest], size: int) -> list[list[ImageRequest]]:
    """Of images with a negative prompt, or of images without: a pipeline takes it for all or for none."""
    groups = [list(group) for _, group in groupby(images, lambda image: image.negative_prompt is None)]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def make_batches(
    share: Sequence[Sequence[ImageRequest]],
    args: argparse.Namespace,
    files: dict[str, Path],
    options: dict[str, Any],
    state: PartialState,
) -> Iterator[list[tuple[ImageRequest, Image.Image]]]:
    """Makes batch by batch, as they are asked for. Loads the pipeline for the first; writes nothing."""
    if not share:
        return
    pipe = load_pipeline(args, files, args.device or state.device)
    pipe.set_progress_bar_config(disable=True)
    for batch in tqdm(share, desc="batches", disable=not state.is_main_process):
        yield list(zip(batch, make_batch(pipe, batch, args.coeff_scale, options)))


def make_batch(
    pipe: Any, batch: Sequence[ImageRequest], coeff_scale: float, options: dict[str, Any]
) -> Sequence[Image.Image]:
    """Makes these images in one call, each with its own coefficients."""
    options = sampling_defaults(pipe) | options
    if batch[0].negative_prompt is not None:
        options = options | {"negative_prompt": [image.negative_prompt for image in batch]}
    with coefficients_of(pipe, [image.coeff for image in batch], coeff_scale):
        images: Sequence[Image.Image] = pipe(
            [image.prompt for image in batch],
            generator=[torch.Generator().manual_seed(image.seed) for image in batch],
            **options,
        ).images
    return images


def write_image(image: Image.Image, path: Path) -> None:
    """Whole or not at all."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        image.save(file, format=Image.registered_extensions()[path.suffix])


def coefficients_of(pipe: Any, names: Sequence[str | None], scale: float) -> AbstractContextManager[None]:
    if len(set(names)) > 1:
        return coeff_per_sample(pipe, names, scale)
    return coeff_disabled(pipe) if names[0] is None else coeff_adapters(pipe, names[0], scale)


def make_sheet(args: argparse.Namespace, options: dict[str, Any]) -> Path:
    """Makes images with the coefficients and without, and the sheet that compares them; returns the sheet."""
    state = processes()
    if state.num_processes > 1:
        raise PromptsError(
            f"--prompt makes its images on one process, and here are {state.num_processes}: start it with python, "
            "or give --prompts_file, whose images are shared out"
        )
    files = coeff_files(args.coeff_weights, args.weight_name)
    pipe = load_pipeline(args, files, args.device or state.device)
    seeds = range(args.seed, args.seed + args.num_images_per_prompt)
    tuned = generate(pipe, args.prompt, seeds, **options)
    with coeff_disabled(pipe):
        base = generate(pipe, args.prompt, seeds, **options)
    for kind, images in (("base", base), ("tuned", tuned)):
        for (prompt, seed), image in images.items():
            name = f"{args.prompt.index(prompt)}-{file_name(prompt)}-seed{seed}-{kind}.png"
            write_image(image, args.output_dir / name)
    path: Path = args.output_dir / "sheet.png"
    write_image(compare([("without coefficients", base), ("with coefficients", tuned)]), path)
    print(f"wrote {path} and {len(base) + len(tuned)} single images")
    return path


def generate(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> dict[tuple[str, int], Image.Image]:
    """(prompt, seed) -> image, one at a time, so that an image depends on its own prompt and seed alone."""
    options = sampling_defaults(pipe) | options
    return {
        (prompt, seed): pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]
        for prompt in prompts
        for seed in seeds
    }


def compare(kinds: Sequence[tuple[str, dict[tuple[str, int], Image.Image]]], cell: int = 128) -> Image.Image:
    """A sheet with a row for each kind, the same prompt and seed below each other."""
    rows = []
    for heading, images in kinds:
        captions = [f"{prompt} (seed {seed})" for prompt, seed in images]
        rows.append((heading, list(images.values()), captions))
    return sheet(rows, cell=cell)
