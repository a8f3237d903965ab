"""The embedded model: its scenes, the script that makes it, its measure, and the files that are shipped."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import evaluate
import pretrain
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from scenes import BACKGROUNDS, GLYPHS, PLACES, SUBJECTS, Scene, draw_scene, load_glyphs, render

from coeff_diffusers import add_coeff_adapter, coeff_parameters

EMOJI = Path(pretrain.__file__).parent
SHOWN = {"pig face": "pig", "apple": "apple"}


@pytest.fixture
def package(tmp_path) -> Path:
    """A stand-in for the npm package, with the shipped subjects' images under all names."""
    folder = tmp_path / "package"
    images = folder / "img" / "google" / "64"
    images.mkdir(parents=True)
    files = sorted((EMOJI / "subjects").glob("*.png"))
    entries = []
    for index, name in enumerate([*GLYPHS.values(), *SUBJECTS.values()]):
        shutil.copy(files[index % len(files)], images / f"{index}.png")
        entries.append(
            {"short_name": name, "short_names": [name], "name": name, "image": f"{index}.png", "has_img_google": True}
        )
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def two_glyphs(monkeypatch) -> None:
    monkeypatch.setattr(pretrain, "GLYPHS", SHOWN)
    for name in set(BACKGROUNDS) - {"white", "blue"}:
        monkeypatch.delitem(BACKGROUNDS, name)


@pytest.mark.parametrize(
    ("scene", "caption"),
    [
        (Scene("fox face", "blue"), "a fox face on a blue background"),
        (Scene("fox face", "orange", "small", "on the left"), "a small fox face on a orange background, on the left"),
        (Scene("apple", "red"), "an apple on a red background"),
        (Scene("apple", "red", "large"), "a large apple on a red background"),
        (Scene("unicorn face", "red"), "a unicorn face on a red background"),
    ],
)
def test_captions(scene, caption) -> None:
    assert scene.caption == caption.replace("a orange", "an orange")


def test_subjects_are_held_out(package) -> None:
    assert not set(SUBJECTS) & set(GLYPHS)
    assert not set(SUBJECTS.values()) & set(GLYPHS.values())
    assert set(pretrain.all_glyphs(package)) == set(GLYPHS.values())


def test_a_scene_is_on_its_background_and_the_measure_says_so() -> None:
    glyph = Image.open(EMOJI / "subjects" / "panda-face.png").convert("RGBA")
    for background, colour in BACKGROUNDS.items():
        image = render(Scene("panda face", background, "large"), glyph)
        assert image.size == (64, 64)
        assert image.getpixel((0, 63)) == colour
        assert evaluate.name_background(image) == background


def test_the_nearest_scene_is_that_of_the_glyph_in_the_image() -> None:
    files = sorted((EMOJI / "subjects").glob("*.png"))
    glyphs = {file.stem: Image.open(file).convert("RGBA") for file in files}
    for words, glyph in glyphs.items():
        scene = Scene("another", "blue", "small", "on the left")
        blurred = render(scene, glyph).filter(evaluate.ImageFilter.GaussianBlur(1))
        assert evaluate.nearest_glyph(scene, blurred, glyphs) == words


def test_places_move_the_glyph() -> None:
    glyph = Image.new("RGBA", (64, 64), "red")
    images = {place: render(Scene("x", "white", "small", place), glyph) for place in PLACES}
    assert images["on the left"].getpixel((8, 32)) == (255, 0, 0)
    assert images["on the right"].getpixel((56, 32)) == (255, 0, 0)
    assert images["at the top"].getpixel((32, 8)) == (255, 0, 0)
    assert images[""].getpixel((8, 32)) == (255, 255, 255)


def test_a_folder_that_is_not_the_package_is_named(tmp_path, package) -> None:
    with pytest.raises(FileNotFoundError, match="is not the npm package emoji-datasource-google"):
        load_glyphs(tmp_path, GLYPHS)
    with pytest.raises(KeyError, match="no glyphs named .'gryphon'"):
        load_glyphs(package, {"gryphon": "gryphon"})


def test_sks_is_one_token(package) -> None:
    tokenizer = pretrain.new_tokenizer(package)
    assert tokenizer.tokenize("a sks fox face") == ["a</w>", "sks</w>", "fox</w>", "face</w>"]


@pytest.mark.slow
def test_pretraining_goes_on_after_a_kill_and_exports_a_pipeline(package, two_glyphs, tmp_path) -> None:
    output = tmp_path / "model"
    output.mkdir()
    options = {
        "emoji_package": str(package), "work_dir": str(tmp_path / "work"), "output_dir": str(output),
        "vae_steps": 3, "vae_batch_size": 2, "unet_batch_size": 2, "first_glyphs": 1, "first_steps": 2,
        "checkpointing_steps": 2,
    }  # fmt: skip
    pretrain.main(pretrain.Settings(**options, unet_steps=3, stop_after="unet"))
    (tmp_path / "work" / "unet.tmp").write_bytes(b"what a kill leaves of a checkpoint")
    before = torch.load(tmp_path / "work" / "unet.pt")
    pretrain.main(pretrain.Settings(**options, unet_steps=5))
    after = torch.load(tmp_path / "work" / "unet.pt")
    assert (before["step"], after["step"]) == (3, 5)
    assert after["optimizer"]["state"][0]["step"] == 5
    pipe = StableDiffusionPipeline.from_pretrained(output)
    # the cache's normalisation is built into the exported autoencoder
    torch.manual_seed(0)
    cache = torch.load(tmp_path / "work" / "latents.pt")
    image = pipe.vae.decode(cache["latents"][:1].float()).sample
    vae = pretrain.new_vae()
    pretrain.load_checkpoint(tmp_path / "work" / "vae.pt", vae=vae)
    raw = cache["latents"][:1].float() * cache["std"][:, None, None] + cache["mean"][:, None, None]
    torch.testing.assert_close(image, vae.decode(raw).sample, rtol=0, atol=2e-2)  # weights of 16 bits
    assert pipe("an apple", num_inference_steps=1).images[0].size == (64, 64)


def test_explicit_attention_is_the_fused_one(two_glyphs) -> None:
    torch.manual_seed(0)
    unet = pretrain.new_unet().eval()
    inputs = torch.randn(2, 8, 16, 16), torch.tensor([1, 500]), torch.randn(2, 24, 128)
    with torch.no_grad():
        fused = unet(*inputs).sample
        unet.set_attn_processor(pretrain.ExplicitAttnProcessor())
        torch.testing.assert_close(unet(*inputs).sample, fused, rtol=1e-4, atol=1e-4)  # other float32 sums


def test_timesteps_are_stratified() -> None:
    timesteps = pretrain.stratified_timesteps(10)
    assert ((timesteps / 1000) ** 2 * 10).floor().tolist() == list(range(10))


# -------------------------------------------------------------------------------------------------- the shipped model


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(EMOJI / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_shipped_model_is_at_most_16_mb_and_has_thousands_of_coefficients(pipe) -> None:
    size = sum(file.stat().st_size for file in (EMOJI / "model").rglob("*") if file.is_file())
    assert size <= 16e6
    add_coeff_adapter(copy_of_unet := type(pipe.unet).from_config(pipe.unet.config))
    assert sum(p.numel() for p in coeff_parameters(copy_of_unet)) > 5000


def test_shipped_model_paints_the_background_it_is_asked_for(pipe) -> None:
    prompts = [f"a pig face on a {background} background" for background in ("blue", "yellow", "green", "red")]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    images = pipe(prompts, num_inference_steps=12, guidance_scale=2.5, generator=generators).images
    named = [evaluate.name_background(image) for image in images]
    assert sum(name in prompt for name, prompt in zip(named, prompts)) >= 3


def test_subjects_are_shipped_transparent_and_named() -> None:
    entries = json.loads((EMOJI / "subjects" / "subjects.json").read_text())
    assert [entry["words"] for entry in entries] == list(SUBJECTS)
    for entry in entries:
        image = Image.open(EMOJI / "subjects" / entry["file"])
        assert (image.mode, image.size) == ("RGBA", (64, 64))
        assert image.getpixel((0, 0))[3] == 0


def test_scenes_drawn_by_lot_use_every_size_and_place() -> None:
    drawn = [draw_scene("apple", random.Random(seed)) for seed in range(300)]
    assert {scene.size for scene in drawn} == {"", "small", "large"}
    assert {scene.place for scene in drawn} == set(PLACES)
    assert not any(scene.size == "large" and scene.place for scene in drawn)
