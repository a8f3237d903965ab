"""DreamBench's command on a data set of two subjects, laid out as the real one, and the embedded model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import demo
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from tiny_encoders import tiny_clip, tiny_vit

from coeff_diffusers.cli import main
from coeff_diffusers.commands import generate, score

sys.path.append(str(Path(demo.__file__).parent / "dreambench"))
import dreambench

pytestmark = pytest.mark.slow

TEXT = """Classes

subject_name,class
fox_toy,stuffed animal
tiger,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} on a red background'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} on a blue background'.format(unique_token, class_token),
]
"""


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    for name, glyph in (("fox_toy", "fox-face"), ("tiger", "tiger-face")):
        (folder / name).mkdir(parents=True)
        for number in range(2):
            Image.open(demo.SUBJECTS / f"{glyph}.png").convert("RGB").save(folder / name / f"0{number}.jpg")
    (folder / "prompts_and_classes.txt").write_text(TEXT)
    return folder


def args_of(dataset: Path, *flags: str) -> Any:
    return dreambench.parse_args(["--dataset_dir", str(dataset), "--output_dir", str(dataset.parent / "out"), *flags])


def test_the_command_trains_generates_and_scores(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(command: list[str], processes: int) -> None:
        """In this process, whose imports are done."""
        ran.append(command[0])
        assert main([*command, *(["--device", "cpu"] if command[0] != "train" else [])]) == 0
        AcceleratorState._reset_state(reset_partial_state=True)

    monkeypatch.setattr(dreambench, "run", run)
    vit = str(tiny_vit(dataset.parent / "vit"))
    encoders = f"--clip_model {tiny_clip(dataset.parent / 'clip')} --dino_model {vit} --dinov2_model {vit}"
    args = args_of(
        dataset, "--model", str(demo.MODEL), "--max_train_steps", "1", "--num_images_per_prompt", "2",
        "--subjects_at_once", "1", "--generate_flags", "--num_inference_steps 1 --batch_size 7",
        "--score_flags", encoders,
    )  # fmt: skip
    table = dreambench.main(args).read_text()
    assert ran == ["train", "train", "generate", "score"]
    scores = json.loads((dataset.parent / "out" / "images" / "scores.json").read_text())
    subjects, unrelated, base = 2 * (2 + 1), 2 * 5 * 2, 2 * 5  # images a prompt by prompts
    assert scores["mean"]["all"].keys() == {"clip_t", "clip_i", "dino", "dinov2", "drift", "images"}
    assert scores["mean"]["all"]["images"] == subjects + unrelated
    assert scores["mean"]["base model"]["images"] == base
    assert sum("dino" in row for row in scores["images"]) == subjects
    assert sum("drift" in row for row in scores["images"]) == unrelated
    assert "| fox_toy | 14 | " in table
    ran.clear()
    monkeypatch.setattr(generate, "load_pipeline", None)
    monkeypatch.setattr(score, "Scorer", None)
    assert dreambench.main(args).read_text() == table  # started again, it finds all of it there
    assert ran == ["generate", "score"]


def test_prompts_and_classes_are_the_data_set_s_own(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        ran.append(command)
        return subprocess.CompletedProcess(command, 3 if "score" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit, match="score ended with 3: start the same command again"):
        dreambench.main(args_of(dataset, "--model", "flux", "--num_processes", "2"))
    train, generate, _ = ran
    assert train[1:7] == ["-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "coeff_diffusers"]
    assert train[7:10] == ["train", "--pretrained_model_name_or_path", "black-forest-labs/FLUX.1-dev"]
    assert "--height" in generate
    lines = [json.loads(line) for line in (dataset.parent / "out" / "prompts.jsonl").read_text().splitlines()]
    assert lines[:3] == [
        {"prompt": "a sks stuffed animal on a red background", "coeff": "fox_toy",
         "clip_prompt": "a stuffed animal on a red background", "file_name": "fox_toy-00.png"},
        {"prompt": "a red sks stuffed animal", "coeff": "fox_toy", "clip_prompt": "a red stuffed animal",
         "file_name": "fox_toy-01.png"},
        {"prompt": "a sks cat on a blue background", "coeff": "tiger", "clip_prompt": "a cat on a blue background",
         "file_name": "tiger-00.png"},
    ]  # fmt: skip
    assert [line["coeff"] for line in lines[3:6]] == ["fox_toy", "tiger", None]


def test_a_data_set_that_is_not_whole_is_refused(dataset: Path) -> None:
    for image in (dataset / "tiger").iterdir():
        image.unlink()
    with pytest.raises(SystemExit, match=r"no images of \['tiger'\]"):
        dreambench.main(args_of(dataset, "--dry_run"))
    (dataset / "prompts_and_classes.txt").write_text(TEXT.replace("Live Subject Prompts", "Others"))
    with pytest.raises(SystemExit, match="must have prompts of objects and of live subjects"):
        dreambench.read_templates(dataset)
    (dataset / "prompts_and_classes.txt").unlink()
    with pytest.raises(SystemExit, match="there is no .*prompts_and_classes.txt"):
        dreambench.main(args_of(dataset, "--dry_run"))
