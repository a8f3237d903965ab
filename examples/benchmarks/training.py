"""The training script on a pipeline of Stable Diffusion 1.5's size: coefficients against LoRA of rank 4.

    python examples/benchmarks/training.py --max_train_steps 4

Random weights, built from config. Each run is a process of its own that calls training/train_dreambooth.py with the
same flags (256 px, batch 1, gradient checkpointing), in float32 and in bfloat16. Seconds are medians over the steps
but the first; memory is the peak of the process's resident memory while it trains, on Linux.
"""

from __future__ import annotations

import argparse
import json
import statistics
import string
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from report import highest_memory, machine, peak_memory, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

KINDS = {
    "coefficients": [],
    "coefficients, latents cached": ["--cache_latents"],
    "LoRA, rank 4": ["--no_coeff", "--lora_rank", "4"],
}
PRECISIONS = ("no", "bf16")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    lines = [
        f"training/train_dreambooth.py, Stable Diffusion 1.5's size, 256 px, batch 1; {machine()}",
        "",
        "| precision | adapter | trainable parameters | seconds per step | ratio | GB at the peak |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_pipeline().save_pretrained(Path(folder) / "base")
        make_images(Path(folder) / "images")
        for precision in PRECISIONS:
            results = {kind: run(Path(folder), kind, precision, args) for kind in KINDS}
            reference = results["LoRA, rank 4"]["seconds"]
            for kind, r in results.items():
                ratio = r["seconds"] / reference
                lines.append(
                    f"| {precision} | {kind} | {r['trained']:,} | {r['seconds']:.2f} | {ratio:.2f} | "
                    f"{r['peak'] / 1024:.2f} |"
                )
    write("\n".join(lines) + "\n", args.output)


def run(folder: Path, kind: str, precision: str, args: argparse.Namespace) -> dict[str, float]:
    """Trains in a process of its own."""
    flags = [kind, precision, str(folder)]
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(args.threads),
        "--max_train_steps",
        str(args.max_train_steps),
    ]
    done = subprocess.run([*command, "--measure", *flags], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(kind: str, precision: str, folder: Path, steps: int) -> dict[str, float]:
    from coeff_diffusers.training import DreamBoothRun, parse_settings

    output = folder / f"{kind}-{precision}"
    flags = {
        "pretrained_model_name_or_path": folder / "base",
        "instance_data_dir": folder / "images",
        "instance_prompt": "a sks dog",
        "output_dir": output,
        "resolution": 256,
        "train_batch_size": 1,
        "max_train_steps": steps,
        "mixed_precision": precision,
        "seed": 0,
    }
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    run = DreamBoothRun(parse_settings([*given, "--gradient_checkpointing", *KINDS[kind]]))
    run.load_model()
    run.add_adapters()
    run.encode_prompts()
    peak_memory(lambda: list(run.steps()))
    peak = highest_memory()
    result = run.finish()
    events = EventAccumulator(str(output / "logs" / "dreambooth")).Reload()
    times = [event.wall_time for event in events.Scalars("loss")]
    seconds = statistics.median(after - before for before, after in pairwise(times))
    return {"trained": sum(result.trained.values()), "seconds": seconds, "peak": peak}


def make_pipeline() -> StableDiffusionPipeline:
    """The configs of Stable Diffusion 1.5, with random weights and a tokenizer of letters."""
    torch.manual_seed(0)
    letters = [*string.printable[:94], *(letter + "</w>" for letter in string.printable[:94])]
    vocabulary = {word: i for i, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    channels = (128, 256, 512, 512)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        unet=UNet2DConditionModel(cross_attention_dim=768, sample_size=64),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_images(folder: Path, side: int = 256) -> None:
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_train_steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/training.md"))
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "PRECISION", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    arguments = parse_args()
    if arguments.measure:
        torch.set_num_threads(arguments.threads)
        kind, precision, folder = arguments.measure
        print(json.dumps(measure(kind, precision, Path(folder), arguments.max_train_steps)))
    else:
        main(arguments)
