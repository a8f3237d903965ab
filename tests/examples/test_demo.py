"""What the README tells its reader to run, run: the demo and generation, each with few steps."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import demo
import pytest
from PIL import Image
from safetensors.torch import load_file

from coeff_diffusers.commands import generate
from coeff_diffusers.commands.flags import parse_generate
from coeff_diffusers.commands.sheet import sheet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def one_inference_step() -> Iterator[None]:
    """In the place of 25: what is asked here is what is written, not how it looks."""
    with pytest.MonkeyPatch.context() as patch:
        for base in demo.BASES.values():
            patch.setitem(base.sampling, "num_inference_steps", 1)
        yield


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory, one_inference_step) -> Path:
    output = tmp_path_factory.mktemp("demo")
    args = demo.parse_args(["--subject", "panda face", "--max_train_steps", "3", "--output_dir", str(output)])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert demo.main(args) == output / "demo.png"
    (output / "said.txt").write_text(said.getvalue())
    return output


def test_demo_writes_the_image_and_the_file(demo_run) -> None:
    assert Image.open(demo_run / "demo.png").width > 1000
    tensors = load_file(demo_run / "pytorch_coeff_weights.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in tensors.values())
    assert len(list((demo_run / "instance_images").glob("*.png"))) == 5


def test_demo_trains_each_image_with_its_own_background_s_name(demo_run) -> None:
    lines = (demo_run / "instance_images" / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line) for line in lines]
    assert {"file_name": "orange.png", "text": "a sks panda face on an orange background"} in captions
    assert not set(demo.BACKGROUNDS) & set(demo.NEW_BACKGROUNDS)


def test_demo_says_what_it_did_and_how_to_use_it(demo_run) -> None:
    out = (demo_run / "said.txt").read_text()
    assert ": 6,144 parameters, " in out
    assert " KB" in out
    assert f'load_coeff_weights(pipe, "{demo_run}/pytorch_coeff_weights.safetensors")' in out


def test_demo_trains_the_transformer_too(tmp_path, capsys) -> None:
    flags = ["--model", "dit", "--subject", "owl", "--max_train_steps", "2", "--output_dir", str(tmp_path)]
    assert demo.main(demo.parse_args(flags)) == tmp_path / "demo.png"
    tensors = load_file(tmp_path / "pytorch_coeff_weights.safetensors")
    assert len(tensors) == 3
    assert all(tensor.shape == (8, 8) and tensor.abs().sum() > 0 for tensor in tensors.values())
    out = capsys.readouterr().out
    assert 'StableDiffusion3Pipeline.from_pretrained("' in out
    assert 'model_dit", text_encoder_3=None, tokenizer_3=None)' in out
    assert "max_sequence_length=1)" in out
    own = demo.parse_args(["--model", "dit"])
    assert own.max_train_steps == demo.BASES["dit"].max_train_steps


def test_demo_names_the_subjects_it_has(tmp_path) -> None:
    args = demo.parse_args(["--subject", "gryphon", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="must be one of .*'fox face'.*, got 'gryphon'"):
        demo.main(args)


def test_generate_shows_base_and_tuned_for_the_same_prompts_and_seeds(demo_run, tmp_path) -> None:
    flags = [
        "--pretrained_model_name_or_path", str(demo.MODEL), "--coeff_weights", str(demo_run),
        "--prompt", "a sks panda face", "a pig face", "--num_images_per_prompt", "1", "--num_inference_steps", "2",
        "--coeff_scale", "30", "--output_dir", str(tmp_path), "--device", "cpu",
    ]  # fmt: skip
    generate.main(parse_generate(flags))
    names = {
        f"{prompt}-seed0-{kind}.png" for prompt in ("0-a-sks-panda-face", "1-a-pig-face") for kind in ("base", "tuned")
    }
    assert {path.name for path in tmp_path.iterdir()} == names | {"sheet.png"}
    base, tuned = (Image.open(tmp_path / f"1-a-pig-face-seed0-{kind}.png") for kind in ("base", "tuned"))
    assert base.tobytes() != tuned.tobytes()


def test_a_sheet_has_room_for_every_row_and_caption() -> None:
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    plain = sheet([("", [red, blue], [])])
    captioned = sheet([("row", [red, blue], ["one", "two words"]), ("other", [blue], [])], title="title")
    assert captioned.width > plain.width
    assert captioned.height > 2 * plain.height
    colours = {colour for _, colour in captioned.getcolors(100_000)}
    assert {(255, 0, 0), (0, 0, 255), (255, 255, 255)} <= colours
