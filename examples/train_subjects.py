"""Many subjects in one run, on the model that ships with the project.

    python examples/train_subjects.py --subjects "fox face" "panda face" owl rocket

Writes images of glyphs that the embedded model has never seen, and `subjects.yaml`, to `outputs/subjects`; trains
all of them at once; and shows in `subjects.png` what one call of the pipeline then makes, each image by its own
subject's coefficients.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import demo
import torch
import yaml
from diffusers import StableDiffusionPipeline

from coeff_diffusers import coeff_disabled, coeff_per_sample, load_coeff_weights
from coeff_diffusers.commands.sheet import sheet
from coeff_diffusers.console import escaped_output
from coeff_diffusers.training import parse_settings, train_dreambooth

BACKGROUND = "blue"  # which no training image has


@escaped_output()
def main(args: argparse.Namespace) -> Path:
    file = write_subjects(args.subjects, args.output_dir)
    results = train_dreambooth(parse_settings(training_flags(file, args)))
    assert isinstance(results, dict)

    pipe = StableDiffusionPipeline.from_pretrained(demo.MODEL)
    pipe.set_progress_bar_config(disable=True)
    for name, result in results.items():
        load_coeff_weights(pipe, result.coeff_file, adapter_name=name)
    prompts = [demo.prompt(words, BACKGROUND) for words in args.subjects]
    seeds = [torch.Generator().manual_seed(args.seed) for _ in prompts]
    with coeff_per_sample(pipe, list(results)):
        tuned = pipe(prompts, generator=seeds, **demo.SAMPLING).images
    with coeff_disabled(pipe):
        base = pipe(prompts, generator=[seed.manual_seed(args.seed) for seed in seeds], **demo.SAMPLING).images
    path: Path = args.output_dir / "subjects.png"
    rows = [("base model", base, prompts), ("each by its own coefficients, in one call", tuned, prompts)]
    sheet(rows, title=f"{len(results)} subjects, trained in one run").save(path)
    print(f"wrote {path}")
    return path


def write_subjects(subjects: list[str], folder: Path) -> Path:
    """Writes five captioned images of each, and the file of --subjects."""
    entries = []
    for words in subjects:
        name = words.replace(" ", "-")
        demo.write_instance_images(words, folder / "images" / name)
        images, prompt = f"images/{name}", f"a sks {words}"
        entries.append({"name": name, "images": images, "prompt": prompt, "caption_column": "text"})
    path = folder / "subjects.yaml"
    path.write_text(yaml.safe_dump(entries, sort_keys=False))
    return path


def training_flags(file: Path, args: argparse.Namespace) -> list[str]:
    flags = {
        "pretrained_model_name_or_path": demo.MODEL,
        "subjects": file,
        "output_dir": args.output_dir / "trained",
        "max_train_steps": args.max_train_steps,
        "train_batch_size": args.train_batch_size,
        "report_to": "none",
        "seed": args.seed,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--subjects",
        nargs="+",
        default=["fox face", "panda face", "owl", "rocket"],
        help="of examples/emoji/subjects/subjects.json",
    )
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument("--train_batch_size", type=int, default=4, help="images of each subject a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/subjects"))
    return parser.parse_args()


if __name__ == "__main__":
    main(parse_args())
