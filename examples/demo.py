"""The whole job on the model that ships with the project: a subject, its training, a file, and the image it makes.

    make demo            or            python examples/demo.py --subject "fox face" --model dit

Trains coefficients for one glyph that the embedded model has never seen, and writes to `outputs/demo`: the file, and
`demo.png` with the training images and what the base model and the tuned one answer to the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from coeff_diffusers import coeff_disabled, load_coeff_weights
from coeff_diffusers.console import escaped_output, hush

hush()  # before diffusers loads its pipelines, and transformers logs what it makes of them
from diffusers import DiffusionPipeline  # noqa: E402

from coeff_diffusers.commands.generate import generate  # noqa: E402
from coeff_diffusers.commands.sheet import sheet  # noqa: E402

HERE = Path(__file__).parent
sys.path.append(str(HERE / "emoji"))
from scenes import Scene, render  # noqa: E402

from coeff_diffusers.training import TrainingResult, parse_settings, train_dreambooth  # noqa: E402

MODEL = HERE / "emoji" / "model"
SUBJECTS = HERE / "emoji" / "subjects"
BACKGROUNDS = ("white", "green", "purple", "gray", "orange")  # of the training images
NEW_BACKGROUNDS = ("blue", "yellow", "pink", "black")  # that are asked for afterwards
SAMPLING = {"num_inference_steps": 25, "guidance_scale": 2.5, "guidance_rescale": 0.7}


class Base(NamedTuple):
    """A model of emoji/: its folder, how its images are made, and what training takes if no flag says otherwise."""

    folder: Path
    sampling: dict[str, Any]
    max_train_steps: int
    max_sequence_length: int | None = None
    left_out: tuple[str, ...] = ()  # parts that it has not, which from_pretrained wants to be told


BASES = {
    "unet": Base(MODEL, SAMPLING, max_train_steps=500),
    "dit": Base(
        HERE / "emoji" / "model_dit",
        {"num_inference_steps": 25, "guidance_scale": 2.5, "max_sequence_length": 1},
        max_train_steps=250,
        max_sequence_length=1,  # of zeros, in the place of T5
        left_out=("text_encoder_3", "tokenizer_3"),
    ),
}


@escaped_output()
def main(args: argparse.Namespace) -> Path:
    output = args.output_dir
    instance_dir = output / "instance_images"
    images = write_instance_images(args.subject, instance_dir)
    base = BASES[args.model]
    result = train_dreambooth(parse_settings(training_flags(args, instance_dir, base)))
    assert isinstance(result, TrainingResult)
    prompts = [prompt(args.subject, background) for background in NEW_BACKGROUNDS]

    pipe = DiffusionPipeline.from_pretrained(base.folder, **dict.fromkeys(base.left_out))
    pipe.set_progress_bar_config(disable=True)
    print("generating ...")
    load_coeff_weights(pipe, result.coeff_file)
    tuned = generate(pipe, prompts, [0, 1], **base.sampling)
    with coeff_disabled(pipe):
        untuned = generate(pipe, prompts, [0, 1], **base.sampling)
    captions = [f"{asked}, seed {seed}" for asked, seed in tuned]
    rows = [
        ("training images", images, [prompt(args.subject, background) for background in BACKGROUNDS]),
        ("base model", list(untuned.values()), captions),
        (f"the same with {result.trained['coefficients']:,} coefficients", list(tuned.values()), captions),
    ]
    path = output / "demo.png"
    sheet(rows, title=f"A subject the model has never seen: {args.subject}").save(path)
    report(path, result, prompts[0], pipe, base)
    return path


def training_flags(args: argparse.Namespace, instance_dir: Path, base: Base = BASES["unet"]) -> list[str]:
    """The flags of training/train_dreambooth.py, but for what is `None`."""
    flags = {
        "pretrained_model_name_or_path": base.folder,
        "instance_data_dir": instance_dir,
        "instance_prompt": f"a sks {args.subject}",
        "caption_column": "text",
        "output_dir": args.output_dir,
        "max_train_steps": args.max_train_steps,
        "learning_rate": args.learning_rate,
        "train_batch_size": 4,
        "report_to": "none",
        "seed": args.seed,
        "max_sequence_length": base.max_sequence_length,
    }
    return [text for name, value in flags.items() if value is not None for text in (f"--{name}", str(value))]


def write_instance_images(subject: str, folder: Path) -> list[Image.Image]:
    """A handful of images of the subject, as a user would bring them: on different backgrounds."""
    known = {entry["words"]: entry["file"] for entry in json.loads((SUBJECTS / "subjects.json").read_text())}
    if subject not in known:
        raise SystemExit(f"--subject must be one of {sorted(known)}, got {subject!r}")
    glyph = Image.open(SUBJECTS / known[subject]).convert("RGBA")
    scenes = [Scene(subject, colour) for colour in BACKGROUNDS]
    images = [render(scene, glyph) for scene in scenes]
    folder.mkdir(parents=True, exist_ok=True)
    for scene, image in zip(scenes, images):
        image.save(folder / f"{scene.background}.png")
    captions = [{"file_name": f"{s.background}.png", "text": prompt(subject, s.background)} for s in scenes]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(caption) + "\n" for caption in captions))
    return images


def prompt(subject: str, background: str) -> str:
    return Scene(f"sks {subject}", background).caption


def report(path: Path, result: TrainingResult, asked: str, pipe: Any, base: Base) -> None:
    file, kind = result.coeff_file, type(pipe).__name__
    assert file is not None
    options = ", ".join(f"{name}={value}" for name, value in base.sampling.items())
    parts = "".join(f", {name}=None" for name in base.left_out)
    print(
        f"\nwrote {path}, with the training images and both models' answers\n"
        f"wrote {file}: {result.trained['coefficients']:,} parameters, {file.stat().st_size / 1e3:.0f} KB\n\n"
        "To use it, after\n"
        f"    from diffusers import {kind}\n"
        "    from coeff_diffusers import load_coeff_weights\n"
        "three lines:\n"
        f'    pipe = {kind}.from_pretrained("{os.path.relpath(base.folder)}"{parts})\n'
        f'    load_coeff_weights(pipe, "{file}")\n'
        f'    pipe("{asked}", {options}).images[0].save("image.png")'
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="fox face", help="one of examples/emoji/subjects/subjects.json")
    parser.add_argument("--model", choices=BASES, default="unet", help="of examples/emoji: model, or model_dit")
    own = ", ".join(f"{base.max_train_steps} of {model}" for model, base in BASES.items())
    parser.add_argument("--max_train_steps", type=int, help=f"{own} if not given")
    parser.add_argument("--learning_rate", type=float, help="that of the training script if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    args = parser.parse_args(argv)
    args.max_train_steps = args.max_train_steps or BASES[args.model].max_train_steps
    return args


if __name__ == "__main__":
    main(parse_args())
