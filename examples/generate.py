"""Generates with a coefficient file on any diffusers pipeline, beside the base model, for the same prompts and seeds.

    python examples/generate.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --coeff_weights outputs/my-dog --prompt "a sks dog in the snow" "a sks dog on a beach"

Writes `sheet.png`, which shows both, and every picture on its own, to `--output_dir`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from sheet import sheet

from coeff_diffusers import coeff_disabled, load_coeff_weights, set_coeff_adapters


def main(args: argparse.Namespace) -> Path:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[args.dtype]
    pipe = DiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path, torch_dtype=dtype).to(args.device)
    load_coeff_weights(pipe, args.coeff_weights, weight_name=args.weight_name)
    set_coeff_adapters(pipe, "default", args.coeff_scale)
    if args.lora_weights:
        pipe.load_lora_weights(args.lora_weights)
    seeds = range(args.seed, args.seed + args.num_images_per_prompt)
    names = ("num_inference_steps", "guidance_scale", "guidance_rescale")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}

    tuned = generate(pipe, args.prompt, seeds, **options)
    with coeff_disabled(pipe):
        base = generate(pipe, args.prompt, seeds, **options)
    for kind, pictures in (("base", base), ("tuned", tuned)):
        for (prompt, seed), picture in pictures.items():
            picture.save(args.output_dir / f"{args.prompt.index(prompt)}-{file_name(prompt)}-seed{seed}-{kind}.png")
    path = args.output_dir / "sheet.png"
    compare([("without coefficients", base), ("with coefficients", tuned)]).save(path)
    print(f"wrote {path} and {len(base) + len(tuned)} single pictures")
    return path


def generate(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **options: Any
) -> dict[tuple[str, int], Image.Image]:
    """(prompt, seed) -> picture, one at a time, so that a picture depends on its own prompt and seed alone."""
    return {
        (prompt, seed): pipe(prompt, generator=torch.Generator().manual_seed(seed), **options).images[0]
        for prompt in prompts
        for seed in seeds
    }


def compare(kinds: Sequence[tuple[str, dict[tuple[str, int], Image.Image]]], cell: int = 128) -> Image.Image:
    """A sheet with a row for each kind, the same prompt and seed below each other."""
    rows = []
    for heading, pictures in kinds:
        captions = [f"{prompt} (seed {seed})" for prompt, seed in pictures]
        rows.append((heading, list(pictures.values()), captions))
    return sheet(rows, cell=cell)


def file_name(prompt: str) -> str:
    return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:80]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pretrained_model_name_or_path", required=True, help="pipeline: a folder, or a name on the Hub"
    )
    parser.add_argument(
        "--coeff_weights", required=True, help="coefficient file: a path, a folder, or a name on the Hub"
    )
    parser.add_argument("--weight_name", help="the file in that folder, where it holds several")
    parser.add_argument("--coeff_scale", type=float, default=1.0, help="weight of the coefficients")
    parser.add_argument("--lora_weights", help="LoRA file or folder to load as well, in both rows")
    parser.add_argument("--prompt", nargs="+", required=True)
    parser.add_argument("--num_images_per_prompt", type=int, default=2)
    parser.add_argument("--num_inference_steps", type=int, help="the pipeline's own default if not given")
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's own default if not given")
    parser.add_argument("--guidance_rescale", type=float, help="of pipelines that take it")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of each prompt")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pictures"))
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
