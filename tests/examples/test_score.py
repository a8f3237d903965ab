"""Scores of images: each measure on cases whose answer is known, what is written, and a run that was stopped."""

from __future__ import annotations

import csv
import json
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoders import tiny_clip, tiny_vit
from transformers import AutoImageProcessor, CLIPModel, CLIPProcessor, ViTModel

from coeff_diffusers.commands import encoders, score
from coeff_diffusers.commands.flags import parse_score
from coeff_diffusers.commands.requests import ImageRequest, PromptsError, write_manifest
from coeff_diffusers.commands.score_files import figure

pytestmark = pytest.mark.slow


def test_reference_images_are_upright_and_on_white(tmp_path: Path) -> None:
    upright = Image.new("RGB", (32, 48), "red")
    upright.paste("blue", (0, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    turned, clear = encoders.open_all([tmp_path / "turned.png", tmp_path / "clear.png"])
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(upright))
    assert clear.getpixel((0, 0)) == (255, 255, 255)


def test_scores_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--images", str(tmp_path), "--clip_model", "none"]
    with pytest.raises(PromptsError, match=r"there is no .*manifest.jsonl, which coeff-diffusers generate"):
        score.main(parse_score(flags))
    with pytest.raises(SystemExit):
        parse_score([*flags, "--reference", "a", "b"])
    assert "--reference: each needs a name of its own (name=path), got default, default" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_score([*flags, "--batch_size", "0"])
    assert "argument --batch_size: must be 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--clip_model", "--dino_model"])
def test_scores_name_the_model_that_cannot_be_loaded(flag: str, tmp_path: Path) -> None:
    write_one_image(tmp_path)
    models = {"--clip_model": str(tiny_clip(tmp_path / "clip")), "--dino_model": str(tiny_vit(tmp_path / "vit"))}
    given = [text for name, path in (models | {flag: str(tmp_path / "none")}).items() for text in (name, path)]
    with pytest.raises(PromptsError, match=f"{flag}: .*none"):
        score.main(parse_score(["--images", str(tmp_path), "--reference", f"x={tmp_path}", *given]))


def test_encoders_of_another_kind_are_refused(tmp_path: Path) -> None:
    clip, vit = str(tiny_clip(tmp_path / "clip")), str(tiny_vit(tmp_path / "vit"))
    with pytest.raises(PromptsError, match="--clip_model: .*vit is no CLIP: it lacks .*openai/clip-vit-base-patch32"):
        encoders.Clip(vit, "cpu")  # with random weights
    with pytest.raises(PromptsError, match="--dino_model: .*clip is a clip, of images and texts; take facebook"):
        encoders.first_token("--dino_model", clip, "cpu")


@pytest.mark.usefixtures("one_process")
def test_scores_leave_no_process_group(tmp_path: Path) -> None:
    write_one_image(tmp_path)
    clip = str(tiny_clip(tmp_path / "clip"))
    score.main(parse_score(["--images", str(tmp_path), "--clip_model", clip, "--device", "cpu"]))
    assert not torch.distributed.is_initialized()


def write_one_image(folder: Path) -> None:
    """As `generate`, with the coefficients x."""
    image = ImageRequest("a.png", prompt="a", seed=0, negative_prompt=None, coeff="x", clip_prompt="a")
    write_manifest({"a.png": (image, {})}, folder / "manifest.jsonl")
    Image.new("RGB", (8, 8)).save(folder / "a.png")


def test_scores_are_cosines_of_the_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (32, 32), colour).save(folder / name)
    entries: list[dict[str, Any]] = [
        {"file_name": name, "prompt": "a", "seed": 0, "negative_prompt": None, "coeff": "x", "clip_prompt": "a fox",
         "made_with": {}} for name in ("a.png", "b.png")
    ]  # fmt: skip
    (folder / "manifest.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (tmp_path / "x").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "x" / "1.png")
    clip = tiny_clip(tmp_path / "clip")
    flags = ["--images", str(folder), "--clip_model", str(clip), "--device", "cpu"]
    rows = score.main(parse_score([*flags, "--reference", f"x={tmp_path / 'x'}"]))["images"]
    assert rows[0]["clip_i"] == pytest.approx(1.0, abs=1e-5)  # the same image
    assert rows[1]["clip_i"] < 0.999
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=["a fox"], images=[Image.open(folder / "b.png")], return_tensors="pt")
    logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    assert rows[1]["clip_t"] == pytest.approx(logits.item(), abs=1e-5)
    with monkeypatch.context() as patched:  # as accelerate 1.4 does with fewer batches than processes
        patched.setattr(score, "gather_object", lambda rows: [*rows, *rows])
        assert score.main(parse_score([*flags, "--reference", f"x={tmp_path / 'x'}"]))["images"] == rows
    (tmp_path / "x" / "2.png").write_bytes(b"no image")
    (tmp_path / "x" / "3.jpg").write_bytes((tmp_path / "x" / "1.png").read_bytes()[:60])
    with pytest.raises(PromptsError, match=r"(?s)cannot be read as images:.*/2.png: .*/3.jpg: "):
        score.main(parse_score([*flags, "--reference", f"x={tmp_path / 'x'}"]))
    (folder / "b.png").unlink()
    surplus = "(?s)b.png is in the manifest.*x has no reference.*--reference y: .* coefficients of that name, only x"
    with pytest.raises(PromptsError, match=surplus):
        score.main(parse_score([*flags, "--reference", f"y={tmp_path / 'x'}"]))


# Measures with a known answer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_clip(tmp_path_factory.mktemp("encoders") / "clip"))


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_vit(tmp_path_factory.mktemp("encoders") / "vit"))


def request(name: str, **changes: Any) -> ImageRequest:
    settings = {"prompt": "a", "seed": 0, "negative_prompt": None, "coeff": "x", "clip_prompt": "a"}
    return ImageRequest(f"{name}.png", **(settings | changes))


def paint(folder: Path, images: dict[ImageRequest, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for image, colour in images.items():
        Image.new("RGB", (32, 32), colour).save(folder / image.file_name)
    write_manifest({image.file_name: (image, {}) for image in images}, folder / "manifest.jsonl")
    return folder


def references(folder: Path, *colours: str) -> str:
    folder.mkdir()
    for colour in colours:
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")
    return str(folder)


def run(folder: Path, *flags: str) -> dict[str, Any]:
    return score.main(parse_score(["--images", str(folder), "--device", "cpu", *flags]))


def cosine(vit: str, one: str, other: str) -> float:
    """Of two colours, by transformers alone."""
    images = [Image.new("RGB", (32, 32), colour) for colour in (one, other)]
    inputs = AutoImageProcessor.from_pretrained(vit)(images=images, return_tensors="pt")
    with torch.no_grad():
        tokens = ViTModel.from_pretrained(vit).eval()(**inputs).last_hidden_state[:, 0]
    return torch.cosine_similarity(tokens[:1], tokens[1:]).item()


def test_dino_is_the_mean_over_all_pairs_with_the_subject_s_references(tmp_path: Path, clip: str, vit: str) -> None:
    images = {request("1"): "red", request("2", seed=1): "yellow", request("3", coeff="y"): "red"}
    folder = paint(tmp_path / "images", images)
    given = [f"x={references(tmp_path / 'x', 'red', 'blue')}", f"y={references(tmp_path / 'y', 'red')}"]
    found = run(folder, "--clip_model", clip, "--dino_model", vit, "--reference", *given)
    pairs = [cosine(vit, image, known) for image in ("red", "yellow") for known in ("red", "blue")]
    assert found["mean"]["x"]["dino"] == pytest.approx(np.mean(pairs), abs=1e-5)  # of float32
    assert found["mean"]["y"]["dino"] == pytest.approx(1.0, abs=1e-5)
    assert found["mean"]["all"]["dino"] == pytest.approx((sum(pairs) / 2 + 1.0) / 3, abs=1e-5)
    error = abs(1.0 - np.mean(pairs)) / 2  # of two numbers: half of what lies between them
    assert found["standard error over subjects"]["dino"] == pytest.approx(error, abs=1e-5)
    assert found["encoders"]["dino"] == vit


def test_drift_is_one_minus_the_cosine_with_the_base_model_s_image(tmp_path: Path, clip: str, vit: str) -> None:
    other = {"prompt": "b", "unrelated": True}
    images = {request("same", **other): "red", request("base", coeff=None, **other): "red",
              request("moved", seed=1, **other): "blue", request("base1", seed=1, coeff=None, **other): "red",
              request("subject"): "green"}  # fmt: skip
    folder = paint(tmp_path / "images", images)
    rows = {row["file_name"]: row for row in run(folder, "--clip_model", clip, "--dinov2_model", vit)["images"]}
    assert rows["same.png"]["drift"] == pytest.approx(0.0, abs=1e-6)
    assert rows["moved.png"]["drift"] == pytest.approx(1.0 - cosine(vit, "red", "blue"), abs=1e-5)
    assert [name for name, row in rows.items() if "clip_t" in row] == ["subject.png"]
    assert [name for name, row in rows.items() if "drift" in row] == ["moved.png", "same.png"]
    folder = paint(tmp_path / "images", {image: "red" for image in images if image.file_name != "base1.png"})
    with pytest.raises(PromptsError, match=r"moved.png is unrelated, and there is no image .* seed 1"):
        run(folder, "--clip_model", clip, "--dinov2_model", vit)


@pytest.mark.parametrize("name", ["all", "base model"])
def test_coefficients_named_as_another_row_of_the_table_are_refused(tmp_path: Path, clip: str, name: str) -> None:
    folder = paint(tmp_path / "images", {request("1", coeff=name): "red"})
    with pytest.raises(
        PromptsError, match=f"coefficients cannot be called '{name}', .* rename them in manifest.jsonl"
    ):
        run(folder, "--clip_model", clip)


def test_diversity_is_the_mean_distance_of_the_images_of_one_prompt(
    tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a distance that can be told by heart in the place of LPIPS, whose network would be downloaded."""

    def lpips(net: str, device: Any) -> encoders.Distance:
        def distance(file: Path, others: list[Path]) -> float:
            values = encoders.pixels([file, *others])
            return float((values[1:] - values[:1]).abs().mean())

        return distance

    monkeypatch.setattr(score, "lpips", lpips)
    images = {request("1"): "black", request("2", seed=1): "white", request("3", seed=2): "black",
              request("4", prompt="b"): "white", request("5", coeff="y"): "white"}  # fmt: skip
    found = run(paint(tmp_path / "images", images), "--clip_model", clip, "--lpips", "alex")
    assert [row.get("lpips") for row in found["images"]] == [0.5, 1.0, 0.5, None, None]
    assert found["mean"]["x"]["lpips"] == pytest.approx(2 / 3)  # two of three pairs differ
    assert found["encoders"]["lpips"] == "alex"


def test_measures_without_what_they_compare_are_refused(tmp_path: Path, clip: str, vit: str, monkeypatch) -> None:
    folder = paint(tmp_path / "images", {request("1"): "red"})
    with pytest.raises(PromptsError, match="--dinov2_model compares with images: give --reference"):
        run(folder, "--clip_model", clip, "--dinov2_model", vit)
    with pytest.raises(PromptsError, match="--lpips compares the images of a prompt: have several made"):
        run(folder, "--clip_model", clip, "--lpips", "alex")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # as where it is not installed
    folder = paint(tmp_path / "images", {request("1"): "red", request("2", seed=1): "red"})
    with pytest.raises(PromptsError, match=r"--lpips: .*torchmetrics.*pip install 'coeff_diffusers\[score\]'"):
        run(folder, "--clip_model", clip, "--lpips", "alex")
    Image.new("RGB", (8, 16)).save(folder / "2.png")
    with pytest.raises(PromptsError, match="compares images of one size, got 1.png 32 x 32, 2.png 8 x 16"):
        encoders.pixels([folder / "1.png", folder / "2.png"])


# What is written


def test_the_files_hold_every_score_and_the_page_every_image(tmp_path: Path, clip: str, vit: str) -> None:
    images = {request("1&amp;'", prompt="a <b> | fox"): "red", request("2", coeff="y#1"): "blue"}
    folder = paint(tmp_path / "images", images)
    given = [f"x={references(tmp_path / 'x', 'red')}", f"y#1={references(tmp_path / 'y#1', 'red')}"]
    (tmp_path / "x" / "folder.png").mkdir()  # which is no image
    found = run(folder, "--clip_model", clip, "--dino_model", vit, "--reference", *given)
    with open(folder / "scores.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["dino"]) for line in lines] == [row["dino"] for row in found["images"]]
    assert lines[0]["prompt"] == "a <b> | fox"
    table = (folder / "scores.md").read_text()
    mean, error = found["mean"]["all"]["dino"], found["standard error over subjects"]["dino"]
    assert f"| all | 2 | {found['mean']['all']['clip_t']:.3f}" in table
    assert f"{mean:.3f} ± {error:.3f} |" in table
    assert f"DINO: {vit}" in table
    page = (folder / "scores.html").read_text()
    written = re.findall("src='(.*?)'", page)
    assert not any("#" in unescape(link) for link in written)  # which would end the address
    links = [unquote(unescape(link)) for link in written]
    assert sorted(Path(link).name for link in links) == ["1&amp;'.png", "2.png", "red.png", "red.png"]
    assert all((folder / link).is_file() for link in links)
    assert "src='a%3Ab.png'" in figure(Path("x", "a:b.png"), "", Path("x"))  # a colon makes an address of it
    assert "a &lt;b&gt; | fox" in page
    assert json.loads((folder / "scores.json").read_text()) == found


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    colours = ("red", "green", "blue")
    images = {request(str(n), seed=n): colour for n, colour in enumerate(colours)}
    whole = run(paint(tmp_path / "whole", images), "--clip_model", clip)
    folder = paint(tmp_path / "images", images)
    original, scored = score.Scorer.rows, []

    def rows(self: Any, batch: list[ImageRequest]) -> Any:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append([image.file_name for image in batch])
        return original(self, batch)

    monkeypatch.setattr(score.Scorer, "rows", rows)
    flags = ["--clip_model", clip, "--batch_size", "1"]
    with pytest.raises(KeyboardInterrupt):
        run(folder, *flags)
    assert not (folder / "scores.json").exists()
    with open(folder / "scores-0.jsonl", "ab") as file:
        file.write(b'["half a li\xff')  # as a machine that lost its power may leave it
    scored.clear()
    found = run(folder, *flags)
    assert scored == [["2.png"]]
    for one, other in zip(found["images"], whole["images"], strict=True):
        assert one == pytest.approx(other, abs=1e-6)  # of batches of other sizes
    Image.new("RGB", (32, 32), "white").save(folder / "1.png")  # another image: its score is another
    scored.clear()
    again = run(folder, *flags)
    assert scored == [["1.png"]]
    assert again["images"][1] != found["images"][1]
    monkeypatch.undo()
    assert run(folder, *flags, "--overwrite")["images"] == again["images"]
    assert len((folder / "scores-0.jsonl").read_text().strip().splitlines()) == 3
