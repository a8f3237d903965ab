"""Coefficients, LoRA, and both, on the embedded model: the same subject, images, steps and seeds.

    python examples/compare_adapters.py --subject "polar bear face" --output_dir outputs/compare

Writes `compare.png` and `compare.json`. The loss there is that of the subject on backgrounds which training did not
show, over the same noise and timesteps for all.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import demo
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from coeff_diffusers import load_coeff_weights
from coeff_diffusers.commands.generate import generate
from coeff_diffusers.commands.sheet import sheet

sys.path.append(str(Path(demo.__file__).parent / "emoji"))
from scenes import Scene, render

from coeff_diffusers.training import TrainingResult, train_dreambooth
from coeff_diffusers.training.families.stable_diffusion import StableDiffusion
from coeff_diffusers.training.run.step import DenoisingStep
from coeff_diffusers.training.settings import parse_settings


def main(args: argparse.Namespace) -> dict[str, Any]:
    images = demo.write_instance_images(args.subject, args.output_dir / "instance_images")
    lora = ["--lora_rank", str(args.lora_rank), "--lora_learning_rate", str(args.lora_learning_rate)]
    kinds = {
        "coefficients": [],
        f"LoRA, rank {args.lora_rank}": [
            *lora,
            "--no_coeff",
            "--lr_scheduler",
            "cosine",
        ],  # as the coefficients have it
        "LoRA + coefficients": lora,
    }
    captions = [demo.prompt(args.subject, background) for background in demo.BACKGROUNDS]
    rows = [("training images", images, captions)]
    results: dict[str, Any] = {}
    prompts = [demo.prompt(args.subject, background) for background in demo.NEW_BACKGROUNDS]
    for name, flags in {"base": None, **kinds}.items():
        pipe = StableDiffusionPipeline.from_pretrained(demo.MODEL)
        pipe.set_progress_bar_config(disable=True)
        trained = 0 if flags is None else train_and_load(pipe, args, name, flags)
        run = demo.training_flags(args, args.output_dir / "instance_images")
        results[name] = {"trainable parameters": trained, "loss": round(subject_loss(pipe, args.subject, run), 4)}
        generated = generate(pipe, prompts, [0, 1], **demo.SAMPLING)
        rows.append(
            (f"{name}: {trained:,} parameters", list(generated.values()), [f"{p}, seed {s}" for p, s in generated])
        )
    sheet(rows, title=f"{args.subject}, {args.max_train_steps} steps").save(args.output_dir / "compare.png")
    (args.output_dir / "compare.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    return results


def train_and_load(pipe: Any, args: argparse.Namespace, name: str, flags: list[str]) -> int:
    """Trains as the demo does, with further flags, and loads what came out; returns how many are trainable."""
    output = args.output_dir / name.replace(" ", "-")
    changes = {"output_dir": output} | ({"learning_rate": None} if "--no_coeff" in flags else {})
    run = argparse.Namespace(**{**vars(args), **changes})
    result = train_dreambooth(parse_settings([*demo.training_flags(run, args.output_dir / "instance_images"), *flags]))
    assert isinstance(result, TrainingResult)
    if result.lora_file is not None:
        pipe.load_lora_weights(output, weight_name=result.lora_file.name)
    if result.coeff_file is not None:
        load_coeff_weights(pipe, result.coeff_file)
    return sum(result.trained.values())


@torch.no_grad()
def subject_loss(pipe: Any, subject: str, flags: list[str], draws: int = 16) -> float:
    """The training loss of the subject on new backgrounds, over `draws` fixed noises and timesteps for each."""
    step = DenoisingStep(StableDiffusion(pipe, parse_settings(flags)), [], [])
    glyph = Image.open(demo.SUBJECTS / f"{subject.replace(' ', '-')}.png").convert("RGBA")
    losses = []
    for background in demo.NEW_BACKGROUNDS:
        pixels = pipe.image_processor.preprocess(render(Scene(subject, background), glyph))  # (1, 3, 64, 64)
        moments = step.family.encode_images(pixels).repeat_interleave(draws, dim=0)
        prompts, sizes = [demo.prompt(subject, background)] * draws, torch.tensor([[64, 64, 0, 0, 64, 64]] * draws)
        losses.append(step(moments, prompts, sizes, torch.arange(draws)).mean().item())
    return sum(losses) / len(losses)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="fox face", help="one of examples/emoji/subjects/subjects.json")
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, help="of the coefficients")
    parser.add_argument("--lora_rank", type=int, default=4)
    parser.add_argument("--lora_learning_rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
