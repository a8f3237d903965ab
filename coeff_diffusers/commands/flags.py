"""The flags of `coeff-diffusers generate` and `score`. Help needs no torch, which takes seconds to load."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from ..console import Parser
from ..quantization import METHODS

GENERATE = """Generates images by a coefficient file on any diffusers pipeline, beside the base model's of like seeds.

    coeff-diffusers generate --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --coeff_weights outputs/my-dog --prompt "a sks dog in the snow" "a sks dog on a beach"

Writes `sheet.png`, which shows both, and every image on its own, to `--output_dir`.

Many images, of many subjects, on as many processes as there are GPUs:

    accelerate launch -m coeff_diffusers generate --coeff_weights dog=outputs/my-dog cat=outputs/my-cat \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --prompts_file prompts.jsonl --batch_size 8 --output_dir outputs/many

A line of prompts.jsonl: {"prompt": "a sks dog on a beach", "coeff": "dog", "seed": 3}; of a .txt file: the prompt.
Writes the images and `manifest.jsonl`, which `coeff-diffusers score` reads; those that are there already are not made
again; it is an error if they were made of other prompts, settings or weights. The images are the same whatever the
number of processes.
"""
MAPS = """Draws where each head looks for a word of the prompt, before and after its maps are mixed, over the image.

    coeff-diffusers maps --pretrained_model_name_or_path examples/emoji/model \\
        --coeff_weights examples/emoji/coefficients/fox.safetensors \\
        --prompt "a sks fox face on a blue background" --word "fox face" --output_file maps.png

docs/attention_maps.md explains how to read them.
"""
SCORE = """Scores images of `coeff-diffusers generate`: do they show what the prompt says, and the subject?

    accelerate launch -m coeff_diffusers score --images outputs/many --reference dog=my-dog cat=my-cat \\
        --clip_model openai/clip-vit-base-patch32 --dino_model facebook/dino-vits16

CLIP-T is the cosine of image and prompt (`clip_prompt` of the manifest), CLIP-I, DINO and DINOv2 the mean cosine of
an image with each reference image of its subject, as DreamBooth has them (arXiv 2208.12242, section 4.1); LPIPS, its
measure of diversity, an image's mean distance to the others of its subject and prompt. Drift is 1 minus the cosine by
DINOv2 of an image that shows no subject (`"unrelated": true` in the file of prompts) with the base model's image
(`"coeff": null`) of the same prompt and seed, as PEFT's comparison of methods for image generation has it.

Scores depend on the encoders: compare none that were made with others. Writes, beside the images, `scores.json` and
`scores.csv`, `scores.md` with the means, and `scores.html` with the images; and what is known of each image to
`scores-*.jsonl`, so that a run that was stopped goes on. Reference images are turned as their EXIF entry says, and
laid on white where they are transparent, as in training.
"""


def parse_generate(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        "coeff-diffusers generate", description=GENERATE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", nargs="+", help="prompts to compare with the base model, on a sheet")
    what.add_argument("--prompts_file", type=Path, help="a .txt or .jsonl file with a prompt per line")
    parser.add_argument(
        "--num_images_per_prompt", type=at_least(1), help="2 of --prompt, 1 of --prompts_file by default"
    )
    parser.add_argument("--batch_size", type=at_least(1), help="images at a time, of --prompts_file; 1 by default")
    parser.add_argument("--overwrite", action="store_true", help="make images of --prompts_file again that are there")
    _add_sampling(parser)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the first image of each prompt")
    _add_device(parser)
    _add_quantization(parser)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/images"))
    args = parser.parse_args(argv)
    try:
        args.coeff_weights = named_paths("--coeff_weights", args.coeff_weights)
    except ValueError as error:
        parser.error(str(error))
    _check_size(parser, args)
    if args.prompt and len(args.coeff_weights) > 1:
        parser.error("--prompt compares one coefficient file with the base model; --prompts_file takes several")
    given = [flag for flag, value in (("--batch_size", args.batch_size), ("--overwrite", args.overwrite)) if value]
    if args.prompt and given:
        parser.error(f"{', '.join(given)}: of --prompts_file; --prompt makes all its images anew, one at a time")
    args.batch_size = args.batch_size or 1
    if args.num_images_per_prompt is None:
        args.num_images_per_prompt = 2 if args.prompt else 1
    return args


def _check_size(parser: Parser, args: argparse.Namespace) -> None:
    if (args.height is None) != (args.width is None):
        parser.error("--height and --width: give both, or none; pipelines ignore one that is alone")


def parse_maps(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("coeff-diffusers maps", description=MAPS, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_model(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--word", required=True, help="of the prompt, or several in a row")
    parser.add_argument("--layers", nargs="+", help="patterns of layers' paths; those that change most if not given")
    parser.add_argument("--top", type=at_least(1), default=3, help="how many layers to draw")
    parser.add_argument("--steps", type=at_least(0), nargs="+", help="denoising steps, from 0 on; all if not given")
    _add_sampling(parser)
    parser.add_argument("--seed", type=at_least(0), default=0)
    _add_device(parser)
    _add_quantization(parser)
    parser.add_argument("--output_file", type=Path, default=Path("outputs/maps.png"), help="a .png or .jpg file")
    args = parser.parse_args(argv)
    if args.output_file.suffix not in (".png", ".jpg", ".jpeg"):
        parser.error(f"--output_file: its name must end in .png or .jpg, got {args.output_file}")
    _check_size(parser, args)
    try:
        args.coeff_weights = named_paths("--coeff_weights", args.coeff_weights)
    except ValueError as error:
        parser.error(str(error))
    return args


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="pipeline: a folder, a name on the Hub, or a single .safetensors file",
    )
    parser.add_argument(
        "--single_file_config", help="of a single file: a folder in diffusers format of its kind, for what it lacks"
    )
    parser.add_argument(
        "--coeff_weights",
        nargs="+",
        required=True,
        help="coefficient file: a path, a folder, or a name on the Hub; several as name=path",
    )
    parser.add_argument("--weight_name", help="the file in that folder, where it holds several")
    parser.add_argument("--coeff_scale", type=float, default=1.0, help="weight of the coefficients")
    parser.add_argument("--lora_weights", help="LoRA file or folder to load as well, in both rows")


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize", choices=METHODS, help="hold the denoiser and the large text encoders so; docs/memory.md"
    )
    parser.add_argument("--gguf_file", help="the denoiser's weights in a GGUF file, instead of the pipeline's own")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_inference_steps", type=at_least(1), help="the pipeline's own default if not given")
    parser.add_argument(
        "--guidance_scale", type=float, help="the model's own (generation_config.json), or the pipeline's default"
    )
    parser.add_argument("--guidance_rescale", type=float, help="of pipelines that take it")
    parser.add_argument("--height", type=at_least(1), help="in pixels; the pipeline's own default if not given")
    parser.add_argument("--width", type=at_least(1), help="in pixels; the pipeline's own default if not given")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--device", help="the one that accelerate gives this process, if not given")
    parser.add_argument(
        "--group_offload",
        action="store_true",
        help="keep weights in the CPU's memory, and bring each layer's for as long as it computes",
    )


def parse_score(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser("coeff-diffusers score", description=SCORE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", "--pictures", type=Path, required=True, help="folder that `coeff-diffusers generate` wrote"
    )
    parser.add_argument("--reference", nargs="+", default=[], help="folders with images of the subjects, name=folder")
    parser.add_argument("--clip_model", required=True, help="a CLIP model: a folder, or a name on the Hub")
    parser.add_argument("--dino_model", help="a vision transformer: a folder, or a name on the Hub")
    parser.add_argument("--dinov2_model", help="another, which measures drift, too: facebook/dinov2-base, say")
    parser.add_argument("--lpips", choices=["alex", "vgg", "squeeze"], help="its network; needs the extra [score]")
    parser.add_argument("--batch_size", type=at_least(1), default=16)
    parser.add_argument("--overwrite", action="store_true", help="score again what is scored already")
    parser.add_argument("--device", help="the one that accelerate gives this process, if not given")
    args = parser.parse_args(argv)
    try:
        args.reference = named_paths("--reference", args.reference)
    except ValueError as error:
        parser.error(str(error))
    if args.dino_model and not args.reference:
        parser.error("--dino_model compares with images: give --reference")
    return args


def named_paths(flag: str, values: Sequence[str]) -> dict[str, str]:
    """Name -> path of `name=path`; a path alone is named default."""
    alone = ["=" not in value or Path(value).exists() for value in values]
    pairs = [("default", value) if only else value.split("=", 1) for value, only in zip(values, alone)]
    names = [pair[0] for pair in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{flag}: each needs a name of its own (name=path), got {', '.join(names)}")
    return {pair[0]: pair[1] for pair in pairs}


def at_least(least: int) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `least` on."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {number}")
        return number

    return whole_number
