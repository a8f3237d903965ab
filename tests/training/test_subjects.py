"""Many subjects at once: each as if it were trained alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from running import main
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_models import tiny_pipeline
from torch import Tensor

from coeff_diffusers import coeff_per_sample, load_coeff_weights
from coeff_diffusers.training.errors import InputError
from coeff_diffusers.training.run import dreambooth
from coeff_diffusers.training.run.dreambooth import TrainingResult
from coeff_diffusers.training.run.losses import losses_by_subject
from coeff_diffusers.training.run.subjects import ManySubjects
from coeff_diffusers.training.settings import DreamBoothSettings, parse_settings
from coeff_diffusers.training.settings.subjects import read_subjects

WORDS = ["small=s", "large=l", "left=w", "right=e", "top=n", "bottom=b"]  # for the tokenizer takes 16 tokens
MARKS = "{size}{place}"  # which are nothing without --augment
Argv = Callable[..., list[str]]
SUBJECTS = {"instance_data_dir": None, "instance_prompt": None}
NAMES = ["fox", "cat", "old-dog"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three subjects with two, three and four images; the cat's have captions, the fox has a validation prompt."""
    for i, name in enumerate(NAMES):
        (tmp_path / name).mkdir()
        for n in range(i + 2):
            noise = np.random.default_rng([i, n]).integers(0, 256, (16, 18 + n, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / name / f"{n}.png")
            (tmp_path / name / f"{n}.txt").write_text(f"a sks {name}, number {n}"[:14] + MARKS)
    entries: list[dict[str, Any]] = [{"name": n, "images": n, "prompt": f"a sks {n}{MARKS}"} for n in NAMES]
    entries[1]["caption_extension"] = "txt"
    return written(tmp_path / "subjects.yaml", entries)


def written(path: Path, entries: Any) -> Path:
    path.write_text(yaml.safe_dump(entries))
    return path


@pytest.fixture
def train_all(argv: Argv, file: Path) -> Callable[..., dict[str, TrainingResult]]:
    """Runs the script with --subjects and changed flags."""

    def run(**changes: Any) -> dict[str, TrainingResult]:
        results = main(argv(**{**SUBJECTS, "subjects": file, **changes}))
        assert isinstance(results, dict)
        return results

    return run


def coefficients(result: TrainingResult) -> dict[str, Tensor]:
    assert result.coeff_file is not None
    return load_file(result.coeff_file)


# The same as alone


@pytest.mark.parametrize(
    "changes",
    [
        {"random_flip": True, "max_grad_norm": 0.01, "gradient_accumulation_steps": 2, "optimizer": "soap"},
        {"gradient_checkpointing": True, "lr_scheduler": "linear", "snr_gamma": 5.0, "coeff_dropout": 0.3},
        {
            "center_crop": True,
            "cache_latents": True,
            "augment": 0.6,
            "augment_words": WORDS,
            "train_batch_size": 1,
            "dataloader_num_workers": 1,
        },
    ],
    ids=["clipped and accumulated by SOAP", "checkpointed with dropout", "cached and augmented"],
)
def test_each_subject_gets_what_it_gets_alone(
    train_all: Callable[..., dict[str, TrainingResult]], tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert_each_gets_what_it_gets_alone(train_all(**changes), tmp_path)


def test_each_subject_has_its_own_class_images(
    train_all: Callable[..., dict[str, TrainingResult]], file: Path, tmp_path: Path
) -> None:
    entries = yaml.safe_load(file.read_text())
    kinds = {"fox": "beast", "cat": "cats", "old-dog": "beast"}
    entries = [entry | {"class_data_dir": k, "class_prompt": f"a {k}"} for entry, k in zip(entries, kinds.values())]
    written(file, entries)
    few = {"num_class_images": 3, "prior_loss_weight": 0.5, "max_train_steps": 2}
    assert_each_gets_what_it_gets_alone(train_all(with_prior_preservation=True, **few), tmp_path)
    assert [len(list((tmp_path / folder).iterdir())) for folder in ("beast", "cats")] == [3, 3]
    kept = {path: path.read_bytes() for path in (tmp_path / "cats").iterdir()}
    beasts = {path.read_bytes() for path in (tmp_path / "beast").iterdir()}
    assert not beasts & set(kept.values())


@pytest.mark.parametrize("name", ["FluxPipeline", "PixArtSigmaPipeline", "SanaPipeline", "ZImagePipeline"])
def test_transformers_are_trained_as_alone_too(
    train_all: Callable[..., dict[str, TrainingResult]], tmp_path: Path, name: str
) -> None:
    tiny_pipeline(name).save_pretrained(tmp_path / "base")
    changes = {"pretrained_model_name_or_path": tmp_path / "base", "resolution": 32}
    # AdamW would make steps of one size of gradients near zero, which are mostly rounding
    few = {"train_batch_size": 1, "max_train_steps": 2, "coeff_dropout": 0.3, "adam_epsilon": 1, "learning_rate": 0.1}
    assert_each_gets_what_it_gets_alone(train_all(**changes, **few), tmp_path)


def assert_each_gets_what_it_gets_alone(together: dict[str, TrainingResult], tmp_path: Path) -> None:
    assert list(together) == NAMES
    expected = {name: coefficients(result) for name, result in together.items()}
    for name, result in together.items():
        alone = main(["--config", str(result.settings_file), "--output_dir", str(tmp_path / "alone" / name)])
        assert isinstance(alone, TrainingResult)
        # other sizes of batches, other order of summation
        torch.testing.assert_close(expected[name], coefficients(alone), rtol=1e-3, atol=2e-5)
        assert result.losses == pytest.approx(alone.losses, rel=1e-4)
    first, second, _ = expected.values()
    assert any((first[key] - second[key]).abs().max() > 0.003 for key in first)


def test_a_loss_is_taken_of_each_subjects_own_rows() -> None:
    batch = {"subjects": ["a", "a", "b"], "kinds": ["instance"] * 3}
    assert losses_by_subject(torch.tensor([1.0, 3.0, 7.0]), batch, 1.0) == {"a": 2.0, "b": 7.0}


@pytest.mark.slow
def test_subjects_are_shared_out_over_processes_and_nothing_is_averaged(
    train_all: Callable[..., dict[str, TrainingResult]], argv: Argv, file: Path, tmp_path: Path
) -> None:
    """Also over a checkpoint, which holds what all processes train."""
    one = train_all(output_dir=tmp_path / "one", coeff_dropout=0.3)
    expected = {name: coefficients(result) for name, result in one.items()}
    flags = argv(**SUBJECTS, subjects=file, output_dir=tmp_path / "two", checkpointing_steps=2, coeff_dropout=0.3)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(Path(__file__).parents[2] / "training" / "train_dreambooth.py"), *flags]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    for more in (["--max_train_steps", "2"], ["--resume_from_checkpoint", "latest"]):
        done = subprocess.run([*command, *more], check=True, env=environment, stdout=subprocess.PIPE, text=True)
    assert "Resumes from " in done.stdout
    assert done.stdout.count("Written:") == 3
    of_two = 2 * sum(coeff.numel() for coeff in expected["fox"].values())
    assert f"trainable params: {of_two:,} " in done.stdout
    for name, coeff in expected.items():
        found = load_file(tmp_path / "two" / name / "pytorch_coeff_weights.safetensors")
        torch.testing.assert_close(found, coeff, rtol=1e-3, atol=1e-5)  # as above
    state = torch.load(tmp_path / "two" / "checkpoint-2" / "state.pt")
    for share in state["trainee"]["processes"]:
        assert list(share["losses_by_subject"]) == NAMES
    # two subjects in one process, one in the other
    means = [sum(losses) / 3 for losses in zip(*(result.losses for result in one.values()))]
    assert state["losses"] == pytest.approx(means[:2], rel=1e-4)


# Going on


@pytest.mark.parametrize("changes", [{}, {"use_ema": True, "cache_latents": True, "center_crop": True}])
def test_a_run_that_is_continued_ends_with_the_same_files(
    train_all: Callable[..., dict[str, TrainingResult]], tmp_path: Path, changes: dict[str, Any]
) -> None:
    flags = {"max_train_steps": 4, "checkpointing_steps": 2, **changes}
    whole = train_all(**flags, output_dir=tmp_path / "whole")
    first = train_all(**flags)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "fox" / "pytorch_coeff_weights.safetensors").unlink()
    assert set(load_file(tmp_path / "out" / "checkpoint-2" / "fox.safetensors")) == set(coefficients(first["cat"]))
    again = train_all(**flags, resume_from_checkpoint="latest")
    for name in NAMES:
        torch.testing.assert_close(coefficients(again[name]), coefficients(whole[name]), rtol=0, atol=0)
        assert again[name].losses == whole[name].losses


# What a run writes


def test_each_subject_has_a_folder_with_its_file_card_and_settings(
    train_all: Callable[..., dict[str, TrainingResult]], tmp_path: Path
) -> None:
    train_all()
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    each = ("pytorch_coeff_weights.safetensors", "README.md", "config.yaml")
    assert found == {".run.lock", "config.yaml"} | {f"{name}/{file}" for name in NAMES for file in each}
    assert "instance_prompt: a sks cat\n" in (tmp_path / "out" / "cat" / "README.md").read_text()
    again = main(["--config", str(tmp_path / "out" / "config.yaml"), "--output_dir", str(tmp_path / "again")])
    assert isinstance(again, dict)
    before = load_file(tmp_path / "out" / "cat" / "pytorch_coeff_weights.safetensors")
    torch.testing.assert_close(coefficients(again["cat"]), before, rtol=0, atol=0)


def test_validation_images_are_those_of_the_subjects_own_file(
    train_all: Callable[..., dict[str, TrainingResult]], file: Path, base: Path
) -> None:
    entries = yaml.safe_load(file.read_text())
    entries[0]["validation_prompt"] = "a sks fox"
    entries[2]["validation_prompt"] = ["a dog", "a sks fox"]
    written(file, entries)
    few = {"num_validation_images": 1, "validation_num_inference_steps": 2, "validation_steps": 2}
    results = train_all(**few, cache_latents=True, center_crop=True, report_to="tensorboard")
    assert [len(result.images) for result in results.values()] == [2, 0, 3]
    for result in results.values():  # also of the cat, which has no prompt for the images
        assert parse_settings(["--config", str(result.settings_file)]) == result.settings
    assert (results["fox"].images[0].parents[1] / "step-000002" / "grid.png").is_file()
    tags = EventAccumulator(str(file.parent / "out" / "logs" / "dreambooth")).Reload().Tags()
    asked = {tag.partition("/")[0] for tag in tags["images"]}
    assert asked == {"fox: a sks fox", "old-dog: a dog", "old-dog: a sks fox"}
    assert {"loss", *(f"loss/{name}" for name in NAMES)} <= set(tags["scalars"])
    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    for name, image in {"fox": results["fox"].images[1], "old-dog": results["old-dog"].images[2]}.items():
        load_coeff_weights(pipe, results[name].coeff_file, adapter_name=name)
        expected = pipe("a sks fox", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        with Image.open(image) as found:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_what_the_page_shows_is_run(
    train_all: Callable[..., dict[str, TrainingResult]], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "subjects.md").read_text(encoding="utf-8")
    page = page.replace("in the snow", "ran")  # the tiny tokenizer takes 14 letters
    blocks = {kind: page.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("yaml", "python")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets.yaml").write_text(blocks["yaml"])
    for name in ("rex", "tom"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), "red").save(tmp_path / "images" / name / "1.png")
        (tmp_path / "images" / name / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a sks"}')
    few = {"max_train_steps": 1, "num_validation_images": 1, "validation_num_inference_steps": 1}
    train_all(subjects="pets.yaml", output_dir="outputs/pets", **few)
    pipe = StableDiffusionPipeline.from_pretrained(base)
    names = {"pipe": pipe, "load_coeff_weights": load_coeff_weights, "coeff_per_sample": coeff_per_sample}
    exec(blocks["python"], names)
    assert len(names["images"]) == 2


# What cannot be used


def test_everything_that_is_wrong_with_the_file_is_listed(tmp_path: Path) -> None:
    entries = [
        {"name": "a/b", "images": "in", "prompt": "a"},
        {"name": "fox", "images": "in", "caption": "x"},
        {"name": "Fox", "images": 3, "prompt": " ", "validation_prompt": ["a", 1]},
        "dog",
        {"name": "checkpoint-3", "images": "in", "prompt": "a"},
    ]
    with pytest.raises(InputError, match="--subjects: ") as error:
        read_subjects(written(tmp_path / "subjects.yaml", entries))
    problems = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert sorted(problems) == [
        "fox: several have this name",
        "subject 1: name must be of letters, digits, - and _, for it names a folder, and not checkpoint-N, got 'a/b'",
        "subject 2: caption is none of caption_column, caption_extension, class_data_dir, class_prompt, "
        "images, name, prompt, validation_prompt",
        "subject 2: has no prompt",
        "subject 3: images must be text, got 3",
        "subject 3: prompt must be text, got ' '",
        "subject 3: validation_prompt must be text, got ['a', 1]",
        "subject 4: must have name, images and prompt, got 'dog'",
        "subject 5: name must be of letters, digits, - and _, for it names a folder, and not checkpoint-N, got "
        "'checkpoint-3'",
    ]


def test_keys_that_are_given_twice_are_told(tmp_path: Path) -> None:
    entry = "{name: fox, images: in, prompt: a}"
    twice = "name: cat\n  images: in\n  prompt: a\n  prompt: b\n  name: dog"
    (tmp_path / "subjects.yaml").write_text(f"- {entry}\n- {twice}\n")
    with pytest.raises(InputError) as error:
        read_subjects(tmp_path / "subjects.yaml")
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "subject 2: name: is given twice",
        "subject 2: prompt: is given twice",
    ]


def test_subjects_may_share_what_yaml_merges(tmp_path: Path) -> None:
    first = "- &fox {name: fox, images: in, prompt: a}\n"
    (tmp_path / "subjects.yaml").write_text(f"{first}- {{<<: *fox, name: cat}}\n")
    assert [(each.name, each.prompt) for each in read_subjects(tmp_path / "subjects.yaml")] == [
        ("fox", "a"),
        ("cat", "a"),
    ]


@pytest.mark.parametrize(
    ("name", "logging_dir", "use"),
    [
        ("logs", "logs", r"the log \(--logging_dir\)"),
        ("Notes", "notes/2026", r"the log \(--logging_dir\)"),
        ("validation", "/elsewhere", "the validation images"),
        ("logs", "/elsewhere", None),
    ],
)
def test_a_subject_must_not_share_a_folder_with_the_runs_own_files(
    file: Path, tmp_path: Path, name: str, logging_dir: str, use: str | None
) -> None:
    (entry, *_) = yaml.safe_load(file.read_text())
    written(file, [entry | {"name": name}])
    settings = DreamBoothSettings("base", subjects=str(file), output_dir=str(tmp_path), logging_dir=logging_dir)
    if use is None:
        assert list(ManySubjects(str(file)).read_images(settings, None)) == [name]
        return
    with pytest.raises(InputError, match=f"--subjects: {name}: this folder .* is for {use}; choose another name"):
        ManySubjects(str(file)).read_images(settings, None)


def test_class_images_are_of_one_class_and_of_no_subject(tmp_path: Path) -> None:
    folders = {"fox": ("in", "of-foxes"), "cat": ("of-foxes", "same"), "dog": ("here", "same")}
    entries = [
        {"name": name, "images": images, "prompt": "a", "class_data_dir": classes, "class_prompt": f"a {name}"}
        for name, (images, classes) in folders.items()
    ]
    with pytest.raises(InputError) as error:
        read_subjects(written(tmp_path / "subjects.yaml", entries))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        f"{tmp_path / 'of-foxes'} has images of a subject, and is a class_data_dir",
        f"{tmp_path / 'same'} is the class_data_dir of several class_prompt",
    ]


def test_each_subject_needs_a_class_where_class_images_are_asked_for(
    train_all: Callable[..., dict[str, TrainingResult]],
) -> None:
    with pytest.raises(InputError, match=r"fox: (.|\n)*needs --class_prompt(.|\n)*old-dog: (.|\n)*--class_data_dir"):
        train_all(with_prior_preservation=True)


@pytest.mark.parametrize("text", [None, "", "name: fox", "- [", "[]", "- name: 2020-13-45"])
def test_a_file_that_is_no_list_of_subjects_is_told(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "subjects.yaml").write_text(text)
    with pytest.raises(InputError, match=r"--subjects: .*subjects.yaml (cannot be read|must be a list of subjects)"):
        read_subjects(tmp_path / "subjects.yaml")


def test_problems_of_all_subjects_images_are_told_before_anything_is_loaded(
    train_all: Callable[..., dict[str, TrainingResult]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dreambooth, "load_family", None)
    (tmp_path / "fox" / "0.png").write_text("no image")
    (tmp_path / "cat" / "1.txt").unlink()
    with pytest.raises(InputError, match=r"fox: --instance_data_dir: these cannot(.|\n)*cat: --caption_extension: "):
        train_all()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"instance_prompt": "a"},
            "--instance_prompt does not go with --subjects: the file says this of each subject",
        ),
        ({"instance_data_dir": "in"}, "--instance_data_dir does not go with --subjects"),
        ({"validation_prompt": ("a",)}, "--validation_prompt does not go with --subjects"),
        ({"num_train_epochs": 3}, "--num_train_epochs does not go with --subjects: subjects have other numbers of"),
        ({"lora_rank": 4}, "--lora_rank does not go with --subjects: it is for one subject"),
        ({"aspect_ratio_buckets": "16,16"}, "--aspect_ratio_buckets does not go with --subjects"),
        ({"optimizer": "prodigy"}, "--optimizer prodigy does not go with --subjects"),
    ],
)
def test_flags_that_do_not_go_with_subjects_are_told(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError) as error:
        DreamBoothSettings("base", subjects="subjects.yaml", **changes)
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith(f"  {problem}")
