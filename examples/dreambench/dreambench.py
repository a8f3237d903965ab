"""DreamBench by one command: 30 subjects, 25 prompts each, 4 images of each prompt, and their scores.

    git clone https://github.com/google/dreambooth
    python examples/dreambench/dreambench.py --dataset_dir dreambooth/dataset --model sd15

Takes prompts and classes from the data set's own `prompts_and_classes.txt` (DreamBooth, arXiv 2208.12242), writes
`subjects-0.yaml` and `prompts.jsonl`, then trains, generates and scores by `coeff-diffusers`, in processes of their
own. Each step goes on where it was stopped: start the same command again. `README.md` beside this file says what it
takes.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

RARE_WORD = "sks"
LIVE = ("cat", "dog")  # the classes whose subjects are live, and have prompts of their own
UNRELATED = (  # our own: scenes without any of the data set's classes, for drift from the base model
    "a bowl of lemons on a kitchen table",
    "a lighthouse above a rocky coast at dusk",
    "an old steam locomotive crossing a stone bridge",
    "a woman reading a newspaper on a park bench",
    "a hot-air balloon over a green valley",
)


class Model(NamedTuple):
    """What a row of the table is made with: flags of train, and of generate."""

    name: str
    train: str
    generate: str


MODELS = {
    "sd15": Model(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "--resolution 512 --mixed_precision bf16 --gradient_checkpointing --cache_latents",
        "--num_inference_steps 50 --guidance_scale 7.5 --dtype bfloat16 --batch_size 8",
    ),
    "sdxl": Model(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "--resolution 1024 --mixed_precision bf16 --gradient_checkpointing --cache_latents",
        "--num_inference_steps 50 --guidance_scale 5 --dtype bfloat16 --batch_size 4",
    ),
    "flux": Model(
        "black-forest-labs/FLUX.1-dev",
        "--resolution 512 --guidance_scale 1 --mixed_precision bf16 --gradient_checkpointing --cache_latents",
        "--num_inference_steps 28 --guidance_scale 3.5 --height 512 --width 512 --dtype bfloat16 --batch_size 2",
    ),
}
SCORING = (
    "--clip_model openai/clip-vit-base-patch32 --dino_model facebook/dino-vits16 --dinov2_model facebook/dinov2-base"
)


def main(args: argparse.Namespace) -> Path:
    """Returns the table of scores."""
    subjects = read_subjects(args.dataset_dir)
    templates = read_templates(args.dataset_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    groups = write_subjects(subjects, args)
    prompts = write_prompts(subjects, templates, args)
    for number, command in enumerate(commands(subjects, groups, prompts, args)):
        done, text = args.output_dir / f"done-{number}.txt", shlex.join(command)
        print("+", text, flush=True)
        trained = command[0] == "train" and done.is_file() and done.read_text(encoding="utf-8") == text
        if args.dry_run or trained:  # generate and score know themselves what is there
            continue
        run(command, args.num_processes)
        done.write_text(text, encoding="utf-8")
    scores: Path = args.output_dir / "images" / "scores.md"
    return scores


def run(command: Sequence[str], processes: int) -> None:
    """Runs a command of `coeff-diffusers`, which takes the machine's memory with it when it ends."""
    launch = [] if processes == 1 else ["accelerate.commands.launch", "--num_processes", str(processes), "-m"]
    done = subprocess.run([sys.executable, "-m", *launch, "coeff_diffusers", *command])
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: start the same command again to go on")


# The data set


def read_subjects(folder: Path) -> dict[str, str]:
    """Folder of a subject -> its class, of the table in the data set."""
    lines = re.findall(r"^(\w+),(\w[\w ]*)$", read(folder), re.MULTILINE)
    subjects = {name: kind for name, kind in lines if name != "subject_name"}
    missing = [name for name in subjects if not any((folder / name).glob("*.jpg"))]
    if not subjects or missing:
        raise SystemExit(f"--dataset_dir {folder}: no images of {missing}" if missing else f"no subjects in {folder}")
    return subjects


def read_templates(folder: Path) -> dict[bool, list[str]]:
    """Live or not -> its prompts, with {0} for the subject's word and {1} for its class."""
    text = read(folder)
    parts = re.split(r"(?=^Object Prompts|^Live Subject Prompts)", text, flags=re.MULTILINE)[1:]
    found = {part.startswith("Live"): re.findall(r"^'(.+)'\.format", part, re.MULTILINE) for part in parts}
    if set(found) != {False, True} or not all(found.values()):
        raise SystemExit(f"{folder / 'prompts_and_classes.txt'} must have prompts of objects and of live subjects")
    return found


def read(folder: Path) -> str:
    path = folder / "prompts_and_classes.txt"
    if not path.is_file():
        raise SystemExit(f"--dataset_dir must be the folder `dataset` of google/dreambooth; there is no {path}")
    return path.read_text(encoding="utf-8")


# What train and generate read


def write_subjects(subjects: dict[str, str], args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """A file of --subjects for each group that is trained at once; returns them with the names in each."""
    names, size = list(subjects), args.subjects_at_once
    groups = []
    for number, start in enumerate(range(0, len(names), size)):
        group = names[start : start + size]
        entries = [{"name": name, "images": str((args.dataset_dir / name).resolve()),
                    "prompt": f"a {RARE_WORD} {subjects[name]}"} for name in group]  # fmt: skip
        path = args.output_dir / f"subjects-{number}.yaml"
        path.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
        groups.append((path, group))
    return groups


def write_prompts(subjects: dict[str, str], templates: dict[bool, list[str]], args: argparse.Namespace) -> Path:
    """The protocol's prompts of each subject, and those for drift; each image by its subject's coefficients."""
    lines: list[dict[str, Any]] = []
    for name, kind in subjects.items():
        for number, template in enumerate(templates[kind in LIVE]):
            words = template.replace("{1}", kind)
            prompt, plain = (" ".join(words.replace("{0}", word).split()) for word in (RARE_WORD, ""))
            # CLIP-T asks for the prompt without the rare word, which means nothing to CLIP
            lines.append(
                {"prompt": prompt, "coeff": name, "clip_prompt": plain, "file_name": f"{name}-{number:02d}.png"}
            )
    for number, prompt in enumerate(UNRELATED[: args.unrelated_prompts]):
        for name in (*subjects, None):
            file = f"{name or 'base'}-unrelated-{number:02d}.png"
            lines.append({"prompt": prompt, "coeff": name, "unrelated": True, "file_name": file})
    path: Path = args.output_dir / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def commands(
    subjects: dict[str, str], groups: list[tuple[Path, list[str]]], prompts: Path, args: argparse.Namespace
) -> list[list[str]]:
    """Of `coeff-diffusers`: a run of train per group, generate, score."""
    model = MODELS.get(args.model, Model(args.model, "", ""))
    base = ["--pretrained_model_name_or_path", model.name]
    found, weights = [], []
    for path, names in groups:
        output = args.output_dir / path.stem
        found.append(["train", *base, "--subjects", str(path), "--output_dir", str(output), "--train_batch_size", "1",
                      "--max_train_steps", str(args.max_train_steps), "--checkpointing_steps", "100",
                      "--checkpoints_total_limit", "1", "--resume_from_checkpoint", "latest", "--report_to", "none",
                      "--seed", "0", *shlex.split(model.train), *shlex.split(args.train_flags)])  # fmt: skip
        weights += [f"{name}={output / name}" for name in names]
    images = str(args.output_dir / "images")
    found.append(["generate", *base, "--coeff_weights", *weights,
                  "--prompts_file", str(prompts), "--output_dir", images,
                  "--num_images_per_prompt", str(args.num_images_per_prompt), *shlex.split(model.generate),
                  *shlex.split(args.generate_flags)])  # fmt: skip
    references = [f"{name}={args.dataset_dir / name}" for name in subjects]
    found.append(["score", "--images", images, "--reference", *references, *shlex.split(args.score_flags)])
    return found


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_dir", type=Path, required=True, help="folder `dataset` of google/dreambooth")
    parser.add_argument("--model", default="sd15", help=f"{', '.join(MODELS)}; or any folder or name on the Hub")
    parser.add_argument("--output_dir", type=Path, help="outputs/dreambench and the model's name if not given")
    parser.add_argument("--num_processes", type=int, default=1, help="GPUs, each with a share of subjects and images")
    parser.add_argument("--subjects_at_once", type=int, default=30, help="in one batch; fewer take less memory")
    parser.add_argument("--max_train_steps", type=int, default=500, help="of each subject, an image of it a step")
    parser.add_argument("--num_images_per_prompt", type=int, default=4)
    parser.add_argument("--unrelated_prompts", type=int, default=len(UNRELATED), help="for drift; 0 for none")
    parser.add_argument("--train_flags", default="", help="further flags of coeff-diffusers train, as one text")
    parser.add_argument("--generate_flags", default="", help="further flags of coeff-diffusers generate")
    parser.add_argument("--score_flags", default=SCORING, help="encoders of coeff-diffusers score")
    parser.add_argument("--dry_run", action="store_true", help="write the files and print the commands")
    args = parser.parse_args(argv)
    args.output_dir = args.output_dir or Path("outputs/dreambench") / Path(args.model).name
    return args


if __name__ == "__main__":
    main(parse_args())
