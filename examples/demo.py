"""The whole job on the model that ships with the project: a subject, its training, a file, and the image it makes.

    make demo            or            python examples/demo.py --subject "fox face"

Trains coefficients for one glyph that the embedded model has never seen, and writes to `outputs/demo`: the file, and
`demo.png` with the training images and what the base model and the tuned one answer to the same prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from PIL import Image

from coeff_diffusers import coeff_disabled, load_coeff_weights
from coeff_diffusers.console import escaped_output, hush

hush()  # before diffusers loads its pipelines, and transformers logs what it makes of them
from diffusers import StableDiffusionPipeline  # noqa: E402

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


@escaped_output()
def main(args: argparse.Namespace) -> Path:
    output = args.output_dir
    instance_dir = output / "instance_images"
    images = write_instance_images(args.subject, instance_dir)
    result = train_dreambooth(parse_settings(training_flags(args, instance_dir)))
    assert isinstance(result, TrainingResult)
    prompts = [prompt(args.subject, background) for background in NEW_BACKGROUNDS]

    pipe = StableDiffusionPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    print("generating ...")
    load_coeff_weights(pipe, result.coeff_file)
    tuned = generate(pipe, prompts, [0, 1], **SAMPLING)
    with coeff_disabled(pipe):
        base = generate(pipe, prompts, [0, 1], **SAMPLING)
    captions = [f"{asked}, seed {seed}" for asked, seed in tuned]
    rows = [
        ("training images", images, [prompt(args.subject, background) for background in BACKGROUNDS]),
        ("base model", list(base.values()), captions),
        (f"the same with {result.trained['coefficients']:,} coefficients", list(tuned.values()), captions),
    ]
    path = output / "demo.png"
    sheet(rows, title=f"A subject the model has never seen: {args.subject}").save(path)
    report(path, result, prompts[0])
    return path


def training_flags(args: argparse.Namespace, instance_dir: Path) -> list[str]:
    """The flags of training/train_dreambooth.py, but for what is `None`; examples/compare_adapters.py has them too."""
    flags = {
        "pretrained_model_name_or_path": MODEL,
        "instance_data_dir": instance_dir,
        "instance_prompt": f"a sks {args.subject}",
        "caption_column": "text",
        "output_dir": args.output_dir,
        "max_train_steps": args.max_train_steps,
        "learning_rate": args.learning_rate,
        "train_batch_size": 4,
        "report_to": "none",
        "seed": args.seed,
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


def report(path: Path, result: TrainingResult, asked: str) -> None:
    file = result.coeff_file
    assert file is not None
    options = ", ".join(f"{name}={value}" for name, value in SAMPLING.items())
    print(
        f"\nwrote {path}, with the training images and both models' answers\n"
        f"wrote {file}: {result.trained['coefficients']:,} parameters, {file.stat().st_size / 1e3:.0f} KB\n\n"
        "To use it, after\n"
        "    from diffusers import StableDiffusionPipeline\n"
        "    from coeff_diffusers import load_coeff_weights\n"
        "three lines:\n"
        f'    pipe = StableDiffusionPipeline.from_pretrained("{os.path.relpath(MODEL)}")\n'
        f'    load_coeff_weights(pipe, "{file}")\n'
        f'    pipe("{asked}", {options}).images[0].save("image.png")'
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="panda face", help="one of examples/emoji/subjects/subjects.json")
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, help="that of the training script if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
