"""Images of a file of prompts, and their scores, on one process and on two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from tiny_encoders import tiny_clip, tiny_vit
from two_processes import on_two_processes

from coeff_diffusers import add_coeff_adapter, coeff_parameters, save_coeff_weights
from coeff_diffusers.commands import generate, score
from coeff_diffusers.commands.flags import parse_generate, parse_score
from coeff_diffusers.commands.requests import PromptsError, read_manifest, read_prompts

pytestmark = pytest.mark.slow

LINES = [
    {"prompt": "a sks fox face", "coeff": "fox", "clip_prompt": "a fox face"},
    {"prompt": "a pig face", "coeff": None, "seed": 5},
    {"prompt": "a sks owl on a red background", "coeff": "owl", "file_name": "owl.png"},
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of coefficients, fox and owl."""
    folder = tmp_path_factory.mktemp("weights")
    pipe = StableDiffusionPipeline.from_pretrained(demo.MODEL)
    torch.manual_seed(0)
    for name in ("fox", "owl"):
        add_coeff_adapter(pipe, adapter_name=name)
        with torch.no_grad():
            for parameter in coeff_parameters(pipe, name):
                parameter.normal_(std=0.5)
        save_coeff_weights(pipe, folder / name, adapter_name=name)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def flags(weights: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    return [
        "--pretrained_model_name_or_path", str(demo.MODEL), "--prompts_file", str(prompts), "--device", "cpu",
        "--coeff_weights", f"fox={weights / 'fox'}", f"owl={weights / 'owl'}", "--num_inference_steps", "2",
        "--output_dir", str(output), *more,
    ]  # fmt: skip


def sheet_flags(weights: Path, output: Path) -> list[str]:
    return [
        "--pretrained_model_name_or_path", str(demo.MODEL), "--coeff_weights", str(weights / "fox"),
        "--prompt", "a sks fox face", "--num_images_per_prompt", "1", "--num_inference_steps", "1",
        "--output_dir", str(output), "--device", "cpu",
    ]  # fmt: skip


def pixels(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in folder.glob("*.png")}


def make(weights: Path, prompts: Path, output: Path, *more: str) -> dict[str, np.ndarray]:
    generate.main(parse_generate(flags(weights, prompts, output, *more)))
    return pixels(output)


def test_each_line_is_made_with_its_own_coefficients(weights: Path, prompts: Path, tmp_path: Path) -> None:
    made = make(weights, prompts, tmp_path / "many", "--batch_size", "3")
    assert set(made) == {"00001-a-sks-fox-face-seed0.png", "00002-a-pig-face-seed5.png", "owl.png"}
    for name in ("fox", "owl"):
        sheet = [
            "--pretrained_model_name_or_path", str(demo.MODEL), "--coeff_weights", str(weights / name),
            "--prompt", "a sks fox face", "a sks owl on a red background", "--num_images_per_prompt", "1",
            "--num_inference_steps", "2", "--output_dir", str(tmp_path / name), "--device", "cpu",
        ]  # fmt: skip
        generate.main(parse_generate(sheet))
    alone = pixels(tmp_path / "fox")["0-a-sks-fox-face-seed0-tuned.png"]
    other = pixels(tmp_path / "owl")["0-a-sks-fox-face-seed0-tuned.png"]
    found = made["00001-a-sks-fox-face-seed0.png"].astype(int)
    assert np.abs(found - alone).max() <= 2  # another batch size rounds otherwise, to one or two of 255 levels
    assert np.abs(found - other).max() > 20


def test_two_processes_make_the_images_and_scores_of_one(weights: Path, prompts: Path, tmp_path: Path) -> None:
    one = make(weights, prompts, tmp_path / "one", "--batch_size", "2")
    clip, references = tiny_clip(tmp_path / "clip"), tmp_path / "one"
    scoring = ["--clip_model", str(clip), "--dino_model", str(tiny_vit(tmp_path / "vit")), "--device", "cpu"]
    scoring += ["--reference", f"fox={references}", f"owl={references}"]
    expected = score.main(parse_score(["--images", str(tmp_path / "one"), *scoring]))
    for script, arguments in (
        ("generate", flags(weights, prompts, tmp_path / "two", "--batch_size", "2")),
        ("score", ["--images", str(tmp_path / "two"), *scoring]),
    ):
        done = on_two_processes(script, arguments, "multi_gpu.yaml")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote ") == 1  # or each took itself for the only one
    two = pixels(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    found = json.loads((tmp_path / "two" / "scores.json").read_text())
    assert found["mean"]["all"].keys() == {"clip_t", "clip_i", "dino", "images"}
    for row, other in zip(found["images"], expected["images"]):
        assert row == pytest.approx(other, abs=1e-5)  # float32 in batches of other sizes


@pytest.mark.usefixtures("one_process")
def test_images_leave_no_process_group(weights: Path, prompts: Path, tmp_path: Path) -> None:
    """Its threads would abort some of the runs at their end, with all written."""
    make(weights, prompts, tmp_path / "many")
    assert not torch.distributed.is_initialized()


def test_a_sheet_is_not_made_by_two_processes_at_once(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "processes", lambda: SimpleNamespace(num_processes=2))  # which the test above starts
    with pytest.raises(PromptsError, match="--prompt makes its images on one process, and here are 2: start"):
        generate.main(parse_generate(sheet_flags(weights, tmp_path / "sheet")))
    assert not list(tmp_path.rglob("*.png"))


def test_images_that_are_there_are_not_made_again(weights: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "many"
    before = make(weights, prompts, output)
    Image.new("RGB", (8, 8)).save(output / "owl.png")
    (output / "00002-a-pig-face-seed5.png").unlink()
    after = make(weights, prompts, output)
    assert after["owl.png"].shape == (8, 8, 3)
    np.testing.assert_array_equal(after["00002-a-pig-face-seed5.png"], before["00002-a-pig-face-seed5.png"])
    again = make(weights, prompts, output, "--overwrite")
    np.testing.assert_array_equal(again["owl.png"], before["owl.png"])
    others = r"made of other prompts, settings or weights: .*owl.png; give --overwrite"
    with pytest.raises(PromptsError, match=others):
        make(weights, prompts, output, "--guidance_scale", "3")
    file = weights / "owl" / "pytorch_coeff_weights.safetensors"
    trained, other = file.read_bytes(), (weights / "fox" / file.name).read_bytes()
    file.write_bytes(other)
    try:
        with pytest.raises(PromptsError, match=others):  # the same path, trained again
            make(weights, prompts, output)
    finally:
        file.write_bytes(trained)


def test_images_of_another_file_in_the_folder_are_others(weights: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    for name, kept in (("fox", "first"), ("owl", "second")):
        for adapter in ("fox", "owl"):
            (folder / adapter).mkdir(parents=True, exist_ok=True)
            shutil.copy(weights / name / "pytorch_coeff_weights.safetensors", folder / adapter / f"{kept}.safetensors")
    output = tmp_path / "many"
    make(folder, prompts, output, "--weight_name", "first.safetensors")
    for _, made_with in read_manifest(output / "manifest.jsonl").values():
        assert made_with["weight_name"] == {"fox": "first.safetensors", "owl": "first.safetensors"}
    with pytest.raises(PromptsError, match="made of other prompts, settings or weights"):
        make(folder, prompts, output, "--weight_name", "second.safetensors")
    (folder / "fox" / "third.safetensors").write_bytes(b"no part of these images")
    make(folder, prompts, output, "--weight_name", "first.safetensors")


def test_weights_are_known_by_the_file_that_is_loaded(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = weights / "fox" / "pytorch_coeff_weights.safetensors"
    kept = {("someone/fox", "fox.safetensors"), ("someone/lora", "pytorch_lora_weights.safetensors")}

    def download(repository: str, filename: str, **_: Any) -> str:
        if (repository, filename) not in kept:
            raise LocalEntryNotFoundError("offline")
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert generate.coeff_files({"fox": "someone/fox"}, "fox.safetensors") == {"fox": file}
    assert generate.lora_digest("someone/lora") == generate.digest([file])
    assert generate.lora_digest("someone/other") is None
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"a LoRA")
    assert generate.lora_digest(str(tmp_path)) == generate.digest([tmp_path / "pytorch_lora_weights.bin"])
    with pytest.raises(PromptsError, match="--coeff_weights: 'someone/owl' is no file or folder here, .*offline"):
        generate.coeff_files({"owl": "someone/owl"}, None)


def test_the_manifest_holds_the_images_of_all_files_of_prompts(weights: Path, prompts: Path, tmp_path: Path) -> None:
    output, second = tmp_path / "many", tmp_path / "second.jsonl"
    second.write_text('{"prompt": "a pig face", "coeff": null, "file_name": "pig.png"}')
    make(weights, prompts, output)
    (output / "owl.png").unlink()  # by the user: it is no longer wanted
    make(weights, second, output)
    names = {"00001-a-sks-fox-face-seed0.png", "00002-a-pig-face-seed5.png", "pig.png"}
    assert read_manifest(output / "manifest.jsonl").keys() == names


def test_a_stopped_overwrite_leaves_no_image_that_seems_made(
    weights: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make(weights, prompts, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(generate, "write_image", stop)
        with pytest.raises(KeyboardInterrupt):
            make(weights, prompts, tmp_path, "--overwrite", "--guidance_scale", "3")
    after = make(weights, prompts, tmp_path, "--guidance_scale", "3")
    assert before.keys() == after.keys()
    assert all(np.abs(before[name].astype(int) - after[name]).max() > 10 for name in before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ("--coeff_weights", "fox=/none/fox", "owl=/none/owl"),
            "--coeff_weights: there is no file or folder /none/fox",
        ),
        (("--weight_name", "none.safetensors"), "--coeff_weights: there is no none.safetensors in .*fox; it holds"),
        (("--lora_weights", "/none/lora"), "--lora_weights: .*'/none/lora'"),
        (("--pretrained_model_name_or_path", "/none/model"), "--pretrained_model_name_or_path: .*/none/model"),
        (("--height", "13", "--width", "13"), "divisible by 8 but are 13"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_an_overwrite_that_cannot_start_changes_nothing(
    changes: tuple[str, ...], said: str, weights: Path, prompts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "many"
    make(weights, prompts, output)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ValueError, match=said) as info:
        make(weights, prompts, output, "--overwrite", *changes)
    assert isinstance(info.value, PromptsError) == said.startswith("--")
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_a_sheet_s_images_are_written_whole_or_not_at_all(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "save", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        generate.main(parse_generate(sheet_flags(weights, tmp_path)))
    assert list(tmp_path.iterdir()) == []


def stop_halfway(_: Image.Image, target: Any, **options: Any) -> None:
    with open(target, "wb") if isinstance(target, Path) else target as file:
        file.write(b"half an image")
    raise KeyboardInterrupt


def stop(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("flag", "value", "least"),
    [
        ("--batch_size", "0", 1),
        ("--num_images_per_prompt", "0", 1),
        ("--num_inference_steps", "-2", 1),
        ("--height", "0", 1),
        ("--width", "-8", 1),
        ("--seed", "-1", 0),
    ],
)
def test_counts_that_are_too_small_are_refused_by_flag(
    flag: str, value: str, least: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_generate(flags(tmp_path, tmp_path / "prompts.txt", tmp_path, flag, value))
    assert f"argument {flag}: must be {least} or more, got {value}" in capsys.readouterr().err


def test_height_without_width_is_refused_for_pipelines_ignore_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_generate(flags(tmp_path, tmp_path / "prompts.txt", tmp_path, "--height", "32"))
    assert "--height and --width: give both" in capsys.readouterr().err


def test_a_sheet_refuses_the_flags_of_many_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = ["--pretrained_model_name_or_path", "none", "--coeff_weights", "none", "--prompt", "a"]
    with pytest.raises(SystemExit):
        parse_generate([*sheet, "--batch_size", "2", "--overwrite"])
    assert "--batch_size, --overwrite: of --prompts_file; --prompt makes all" in capsys.readouterr().err


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        '{"prompt": "a", "coeff": "fox"}',
        "",
        '{"prompt": ""}',
        "{",
        '{"prompt": "a", "seed": "x", "coeff": null}',
        '{"prompt": "a", "coeff": "cat"}',
        '{"prompt": "b"}',
        '{"prompt": "b", "sede": 1}',
        '{"prompt": "b", "coeff": null, "file_name": "../b.png"}',
        '{"prompt": "b", "coeff": null, "seed": -1}',
        '{"prompt": "b", "coeff": null, "file_name": "%s.png"}' % ("b" * 200),
    ]
    path.write_text("\n".join(lines))
    with pytest.raises(PromptsError) as info:
        read_prompts(path, ["fox", "owl"], 0, 1)
    said = str(info.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in said] == [f"line {n}" for n in (3, 4, 5, 6, 7, 8, 9, 10, 11)]
    reasons = [
        '"prompt"',
        "Expecting",
        "seed must be",
        "'cat' is none of fox, owl",
        'which "coeff"',
        "'sede' is none of",
    ]
    for line, words in zip(said, [*reasons, "without folders", "from 0 to", "at most 200 bytes"], strict=True):
        assert words in line


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\n\na dog, running\n")
    images = read_prompts(path, ["default"], seed=7, images_per_prompt=2)
    assert [(p.prompt, p.seed, p.coeff) for p in images] == [
        ("a fox", 7, "default"), ("a fox", 8, "default"), ("a dog, running", 7, "default"),
        ("a dog, running", 8, "default"),
    ]  # fmt: skip
    assert images[2].file_name == "00003-a-dog-running-seed7.png"
    with pytest.raises(PromptsError, match="does not exist"):
        read_prompts(tmp_path / "none.txt", ["default"], 0, 1)


def test_prompts_of_any_script_are_read_and_name_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    prompt = "\u72d0" * 200 + "\u2028x"  # 600 bytes, and what Python alone takes for the end of a line
    path.write_text(f"\ufeffa fox\n{prompt}\n", encoding="utf-8")
    images = read_prompts(path, ["default"], seed=0, images_per_prompt=1)
    assert [image.prompt for image in images] == ["a fox", prompt]
    for image in images:
        Image.new("RGB", (8, 8)).save(tmp_path / image.file_name)  # file systems allow 255 bytes
    path.write_bytes("a f\xf6x".encode("latin-1"))
    with pytest.raises(PromptsError, match=r"prompts.txt must be in UTF-8: .*0xf6"):
        read_prompts(path, ["default"], 0, 1)
