"""The app: what its tabs compute, by plain functions; and the page itself, clicked in a headless Chromium."""

from __future__ import annotations

import io
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from coeff_diffusers import coeff_per_sample, quantization, read_coeff_metadata
from coeff_diffusers.app import messages
from coeff_diffusers.app.create import (
    STRIP,
    Asked,
    a_subject_each,
    options_of,
    over_the_weight,
    side_by_side,
    weights_of,
    where_heads_look,
    with_words,
)
from coeff_diffusers.app.inspect_file import look_into, refused, table, verdict
from coeff_diffusers.app.pipeline import SharedPipeline
from coeff_diffusers.app.run import App
from coeff_diffusers.app.runs import DONE, FAILED, STOPPED, WAITS, Line, Run, name_of
from coeff_diffusers.app.settings import EMBEDDED, AppSettings, filled_in, parse_app
from coeff_diffusers.app.train import (
    border_colour,
    captioner,
    check_images,
    example_images,
    loss_curve,
    new_run,
    reworded,
    settings_of_run,
    status,
    suggested,
)
from coeff_diffusers.app.visitors import Visitor, Visitors, free_name
from coeff_diffusers.checkpoint import KEY_SUFFIX
from coeff_diffusers.commands.generate import base_pipeline
from coeff_diffusers.quantization import Quantization
from coeff_diffusers.serving.requests import Refusal
from coeff_diffusers.serving.settings import check_address
from coeff_diffusers.training import InputError

STEPS = 2
OPTIONS = {"seed": 3, "num_inference_steps": STEPS}
FOX = EMBEDDED / "coefficients" / "fox.safetensors"
PROMPT = "{subject} on a blue background"


def quiet(done: int, of: int) -> None:
    """No progress bar."""


@pytest.fixture(scope="module")
def shared() -> SharedPipeline:
    return SharedPipeline(filled_in(AppSettings()))


@pytest.fixture
def visitor(shared) -> Iterator[Visitor]:
    visitor = Visitor(shared)
    yield visitor
    visitor.leave()


def assert_same(image: Image.Image, other: Image.Image) -> None:
    """But for one step of 255: batches of other sizes round otherwise."""
    difference = np.asarray(image, dtype=int) - np.asarray(other, dtype=int)
    assert np.abs(difference).max() <= 1


def differs(image: Image.Image, other: Image.Image) -> bool:
    return bool(np.abs(np.asarray(image, dtype=int) - np.asarray(other, dtype=int)).max() > 8)


def alone(shared: SharedPipeline, prompt: str, subject: Any, seed: int = 3, steps: int = STEPS) -> Image.Image:
    """An image that is made by the library, of one call."""
    options = {"num_inference_steps": steps, "guidance_scale": 2.5, "guidance_rescale": 0.7}
    with coeff_per_sample(shared.pipe, [subject]) if subject else nullcontext():
        return shared.pipe([prompt], generator=[torch.Generator().manual_seed(seed)], **options).images[0]


# ---------------------------------------------------------------------------------------------------------- settings


def test_a_clone_s_app_has_the_embedded_model_and_a_package_without_it_asks_for_one(monkeypatch) -> None:
    settings = parse_app([])
    assert Path(settings.pretrained_model_name_or_path) == EMBEDDED / "model"
    assert settings.host == "127.0.0.1"
    assert parse_app(["--pretrained_model_name_or_path", "m"]).adapters == ""
    monkeypatch.setattr("coeff_diffusers.app.settings.EMBEDDED", Path("nowhere"))
    with pytest.raises(InputError, match="--pretrained_model_name_or_path must be given"):
        parse_app([])


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}"):
            check_address("127.0.0.1", port)


def test_no_such_model_is_an_input_error(tmp_path) -> None:
    with pytest.raises(InputError, match="--pretrained_model_name_or_path"):
        App(AppSettings(pretrained_model_name_or_path=str(tmp_path), port=free_port()))


def test_a_base_model_that_cannot_be_held_so_is_said_before_it_is_loaded(monkeypatch) -> None:
    monkeypatch.setattr(quantization, "_is_there", lambda package: False)
    monkeypatch.setattr("coeff_diffusers.app.run.SharedPipeline", None)  # which is not called
    with pytest.raises(InputError, match="--quantize: torchao_int8 needs torchao"):
        App(replace(filled_in(AppSettings()), quantize="torchao_int8", port=free_port()))


def test_a_pipeline_that_lacks_parts_is_loaded_without_them() -> None:
    pipe = base_pipeline(str(EMBEDDED / "model_dit"), None, "float32", Quantization(), "cpu")
    assert (pipe.text_encoder_3, pipe.tokenizer_3) == (None, None)


# ---------------------------------------------------------------------------------------------------------- messages


def test_markup_in_an_error_is_text_and_what_nobody_thought_of_is_not_told(caplog) -> None:
    @messages.told
    def fails(error: Exception) -> None:
        raise error

    with pytest.raises(gr.Error) as caught:
        fails(ValueError("<img src=x onerror=alert(1)>\nno such layer"))
    assert caught.value.message == "&lt;img src=x onerror=alert(1)&gt;<br>no such layer"
    with pytest.raises(gr.Error, match="the app failed: KeyError. Its log says more."):
        fails(KeyError("/etc/secret"))
    assert "secret" in caplog.text


# ------------------------------------------------------------------------------------------------------------ create


def test_prompts_have_the_subject_s_words() -> None:
    assert with_words(PROMPT, "a sks fox") == "a sks fox on a blue background"
    assert with_words("a cat", "") == "a cat"
    with pytest.raises(ValueError, match="the prompt is empty"):
        with_words(" ", "a sks fox")
    with pytest.raises(ValueError, match="there are no words for {subject}"):
        with_words(PROMPT, "")


def test_a_subject_that_is_chosen_anew_keeps_the_others_weights() -> None:
    assert weights_of(["fox", "owl"], {"owl": 0.3, "panda": -1.0}) == {"fox": 1.0, "owl": 0.3}


def test_options_are_those_of_the_pipeline_s_call() -> None:
    given = options_of({"guidance_scale": 0, "num_inference_steps": 0}, " ", 5, 20, 2.5, 64)
    assert given == {"seed": 5, "guidance_scale": 2.5, "num_inference_steps": 20}
    with pytest.raises(ValueError, match="seed"):
        options_of({}, "", -1, 20, 2.5, None)


def test_side_by_side_is_the_base_model_and_the_mixture(shared, visitor) -> None:
    told = []
    asked = Asked({"fox": 0.7, "owl": -0.4}, PROMPT, OPTIONS)
    base, adapted = side_by_side(shared, visitor, asked, lambda *step: told.append(step))
    prompt = "a sks fox face on a blue background"
    assert_same(base, alone(shared, prompt, None))
    assert_same(adapted, alone(shared, prompt, {"fox": 0.7, "owl": -0.4}))
    assert told == [(1, 2), (2, 2)]


def test_the_strip_goes_over_the_first_subject_s_weight(shared, visitor) -> None:
    images = over_the_weight(shared, visitor, Asked({"fox": 1.0, "owl": 0.5}, PROMPT, OPTIONS), quiet)
    assert [text for _, text in images] == [f"{weight:g}" for weight in STRIP]
    assert_same(images[-1][0], alone(shared, "a sks fox face on a blue background", {"fox": 2.0, "owl": 0.5}))
    with pytest.raises(ValueError, match="choose a subject"):
        over_the_weight(shared, visitor, Asked({}, "a cat", OPTIONS), quiet)


def test_the_grid_has_a_subject_per_image_in_batches_that_fit(visitor) -> None:
    shared = visitor.shared
    asked = Asked({"panda": 1.0}, PROMPT, OPTIONS)
    images = a_subject_each(shared, visitor, asked, ["fox", "owl", "rocket"], 3, quiet)
    assert [text for _, text in images][:4] == ["fox, seed 3", "owl, seed 3", "rocket, seed 3", "fox, seed 4"]
    assert_same(images[4][0], alone(shared, "a sks owl on a blue background", "owl", seed=4))
    with pytest.raises(ValueError, match="24 images"):
        a_subject_each(shared, visitor, asked, ["fox"] * 9, 3, quiet)


def test_maps_are_of_the_chosen_subjects_also_while_others_call_the_model(shared, visitor) -> None:
    asked = Asked({"fox": 1.0}, PROMPT, OPTIONS)
    request = asked.request(visitor)
    quietly = shared.maps(request, "background", quiet)
    stop = threading.Event()

    def others() -> None:
        while not stop.is_set():
            alone(shared, "an owl", "owl", seed=1)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        meanwhile = shared.maps(request, "background", quiet)
    finally:
        stop.set()
        thread.join()
    layer = quietly.most_changed()[0]
    torch.testing.assert_close(meanwhile.after[layer], quietly.after[layer])
    assert float((quietly.after[layer] - quietly.before[layer]).abs().max()) > 0.05
    sheet = where_heads_look(shared, visitor, asked, "{subject}", 1, quiet)
    assert sheet.width == 150 + 8 * (80 + 12)  # eight heads in a row
    with pytest.raises(Refusal, match="has no 'cat'"):
        where_heads_look(shared, visitor, asked, "cat", 1, quiet)


def test_a_call_shares_the_models_and_nothing_that_it_changes(shared) -> None:
    own = shared._for_one_call().pipe
    assert own.unet is shared.pipe.unet
    assert own.scheduler is not shared.pipe.scheduler
    assert own.tokenizer is not shared.pipe.tokenizer


def test_a_visitor_who_left_ends_what_is_computed_for_them(shared) -> None:
    visitor = Visitor(shared)
    steps = []
    visitor.gone.set()
    with pytest.raises(Refusal, match="went away"):
        side_by_side(shared, visitor, Asked({}, "a cat", OPTIONS), lambda *step: steps.append(step))
    assert steps == [(1, STEPS)]
    visitor.leave()


# ---------------------------------------------------------------------------------------------------------- visitors


def test_a_visitor_s_file_is_a_subject_of_theirs_alone_and_goes_with_them(shared) -> None:
    visitors = Visitors(shared)
    mine, yours = visitors.of("mine"), visitors.of("yours")
    assert mine.take(FOX, "fox") == "fox 2"
    assert mine.subjects() == ["fox 2", "fox", "owl", "panda", "rocket"]
    assert "fox 2" not in yours.subjects()
    with pytest.raises(ValueError, match="there is no subject 'fox 2'"):
        yours.subject("fox 2")
    adapter = mine.subject("fox 2").adapter
    with pytest.raises(ValueError, match="there is no subject"):
        side_by_side(shared, yours, Asked({adapter: 1.0}, "a cat", OPTIONS), quiet)
    _, adapted = side_by_side(shared, mine, Asked({"fox 2": 1.0}, PROMPT, OPTIONS), quiet)
    assert_same(adapted, alone(shared, "a sks fox face on a blue background", "fox"))
    folder = mine.folder
    visitors.leave("mine")
    assert not folder.exists()
    with pytest.raises(ValueError, match=adapter):
        alone(shared, "a cat", adapter)
    visitors.close()


def test_of_too_many_visitors_the_idle_leave(shared) -> None:
    visitors = Visitors(shared, most=2)
    first, second = visitors.of("a"), visitors.of("b")
    assert visitors.of("a") is first
    visitors.of("c")
    assert second.gone.is_set()
    assert not first.gone.is_set()
    visitors.close()
    assert first.gone.is_set()


def test_names_of_files_become_names_of_subjects() -> None:
    assert free_name("my dog.v2", ["my dog-v2"]) == "my dog-v2 2"
    assert free_name("../..", []) == "subject"


# ----------------------------------------------------------------------------------------------------------- inspect


def test_a_file_that_fits_is_described(shared, tmp_path) -> None:
    report = look_into(shared, FOX, tmp_path)
    assert not report.differences
    assert report.facts["Prompt"] == "a sks fox face"
    norms = [row[3] for row in report.layers]
    assert len(norms) == 14
    assert norms == sorted(norms, reverse=True)
    assert len(report.heads) == 12
    with Image.open(report.plot) as plot:
        assert plot.width > 500
    assert "fox.safetensors fits StableDiffusionPipeline" in verdict(
        report, "fox.safetensors", "StableDiffusionPipeline"
    )


def test_a_file_of_another_model_says_what_differs(shared, tmp_path) -> None:
    from safetensors import safe_open

    with safe_open(FOX, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    key = sorted(tensors)[0]
    layer = key.removeprefix("unet.").removesuffix(KEY_SUFFIX)
    heads = len(tensors[key])
    tensors[key] = torch.zeros(3, 3)
    changed = metadata | {
        "coeff_diffusers": metadata["coeff_diffusers"].replace(f'"{layer}": {heads}', f'"{layer}": 3')
    }
    path = tmp_path / "other.safetensors"
    save_file(tensors, path, changed)
    report = look_into(shared, path, tmp_path)
    assert report.differences[key] == f"must have shape ({heads}, {heads}) for {heads} heads, got (3, 3)"
    assert f"3 heads in the file&#x27;s model, {heads} heads here" in verdict(report, path.name, "it")


def test_hostile_files_are_messages_without_markup_and_folders(shared, tmp_path) -> None:
    path = tmp_path / "a&b.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{'nope'}")
    with pytest.raises(ValueError, match="no readable .safetensors file") as caught:
        look_into(shared, path, tmp_path)
    said = refused(path.name, caught.value, tmp_path)
    assert str(tmp_path) not in said
    assert "a&amp;b.safetensors cannot be used" in said
    assert (
        table({"<i>": "<script>"}) == '<table class="facts"><tr><th>&lt;i&gt;</th><td>&lt;script&gt;</td></tr></table>'
    )


# ------------------------------------------------------------------------------------------------------------- train


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("koala")
    return example_images(EMBEDDED / "subjects" / "koala-face.png", folder)


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("on-the_grass.jpg", "a sks dog on the grass"),
        ("Garden 2.jpg", "a sks dog, garden"),
        ("IMG_2041.jpg", "a sks dog"),
        ("3.png", "a sks dog"),
    ],
)
def test_captions_are_suggested_by_the_name_of_a_file(name, caption) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    assert suggested(noise, name, "a sks dog") == caption


def test_captions_are_suggested_by_a_ground_of_one_colour_or_by_a_captioner(images) -> None:
    captions = [suggested(Image.open(path), "1.png", "a sks koala") for path in images]
    assert captions[0] == "a sks koala on a white background"
    assert captions[-1] == "a sks koala on an orange background"
    assert border_colour(Image.new("RGBA", (8, 8), (9, 9, 9, 0))) == "white"
    assert suggested(Image.new("RGB", (8, 8)), "1.png", "a sks koala", "eating") == "a sks koala, eating"


def test_a_captioner_of_transformers_describes_images(shared, tmp_path) -> None:
    tokenizer = shared.pipe.tokenizer
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = {"eos_token_id": tokenizer.eos_token_id, "sep_token_id": tokenizer.eos_token_id}
    text = small | end | {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
    text |= {"encoder_hidden_size": 16, "pad_token_id": tokenizer.pad_token_id}
    config = BlipConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8})
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(tmp_path)
    assert len(captioner(str(tmp_path))(Image.new("RGB", (40, 30))).split()) > 1
    with pytest.raises(InputError, match="--captioner ./nowhere cannot be loaded"):
        captioner("./nowhere")


def test_captions_follow_the_subject_s_prompt() -> None:
    captions = {"a": "a sks dog on grass", "b": "something else"}
    assert reworded(captions, "a sks dog", "a sks cat") == {"a": "a sks cat on grass", "b": "something else"}


def test_images_that_are_none_too_many_or_too_large_are_named(images, tmp_path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no more")
    large = tmp_path / "large.png"
    Image.new("1", (9000, 9000)).save(large)
    with pytest.raises(
        InputError, match=r"(?s)broken.png: UnidentifiedImageError.*large.png: .*9000 x 9000"
    ) as caught:
        check_images([*images, str(broken), str(large)], 12)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(InputError, match="5 images were dropped, and a run can have 4"):
        check_images(images, 4)


def run_settings(folder: Path, steps: int = 4, **others: Any) -> Any:
    app = filled_in(AppSettings())
    settings = settings_of_run(app, folder, "a sks koala", steps, 1, "", 100)
    return replace(settings, skip_final_inference=True, train_batch_size=1, **others)


def given(images: list[str]) -> list[tuple[Image.Image, str]]:
    return [(Image.open(path), f"a sks koala on a {Path(path).stem} background") for path in images]


def test_settings_of_a_run_are_checked(tmp_path) -> None:
    app = filled_in(AppSettings())
    with pytest.raises(InputError, match="in a prompt"):
        settings_of_run(app, tmp_path, " ", 10, 0, "", 100)
    with pytest.raises(InputError, match="from 1 to 2000, got 5000"):
        settings_of_run(app, tmp_path, "a sks dog", 5000, 0, "", 100)
    made = settings_of_run(app, tmp_path, "a sks dog", 10, 0, "a sks dog in snow", 5)
    assert (made.validation_prompt, made.validation_steps, made.mixed_precision) == (("a sks dog in snow",), 5, "no")
    held = replace(app, quantize="torchao_int8", gguf_file="dog.gguf", dtype="bfloat16")
    made = settings_of_run(held, tmp_path, "a sks dog", 10, 0, "", 5)
    assert (made.quantize, made.gguf_file, made.mixed_precision) == ("torchao_int8", "dog.gguf", "bf16")


def test_a_run_holds_the_base_model_as_the_page_does(tmp_path) -> None:
    held = {"quantize": "bnb_nf4", "gguf_file": "flux.gguf", "group_offload": True}
    made = settings_of_run(replace(filled_in(AppSettings()), **held), tmp_path, "a sks dog", 10, 0, "", 100)
    assert {name: getattr(made, name) for name in held} == held


def test_runs_train_one_at_a_time_and_one_that_waits_can_be_cancelled(images, tmp_path, visitor) -> None:
    line = Line(most=2)
    first, second, third = (Run(run_settings(tmp_path / name), given(images), line) for name in "abc")
    first.start()
    second.start()
    third.start()
    with pytest.raises(ValueError, match="2 training runs wait already"):
        Run(run_settings(tmp_path / "d"), given(images), line).start()
    if second.phase == WAITS:
        assert "1 before yours" in status(second)
    second.cancel()
    second.wait()
    assert (second.phase, second.losses) == (STOPPED, [])
    assert not second.can_resume
    for run in (first, third):
        run.wait()
        assert run.phase == DONE, run.message
        assert len(run.losses) == 4
    assert read_coeff_metadata(first.file)["instance_prompt"] == "a sks koala"
    assert visitor.take(first.file, first.file.stem) == "koala"  # it fits


def test_a_run_that_is_cancelled_goes_on_where_it_was(images, tmp_path) -> None:
    run = Run(run_settings(tmp_path, 6), given(images), Line(1))
    run.start()
    while not run.losses:
        time.sleep(0.01)
    run.cancel()
    run.wait()
    assert run.phase == STOPPED
    assert run.can_resume
    assert "Resume goes on from there" in status(run)
    before = run.losses
    run.start()
    run.wait()
    assert run.phase == DONE, run.message
    assert run.losses[: len(before)] == before
    assert len(run.losses) == 6


def test_a_run_that_fails_says_why_without_the_server_s_folders(images, tmp_path) -> None:
    settings = run_settings(tmp_path / "run", pretrained_vae_model_name_or_path=str(tmp_path / "run" / "no-vae"))
    run = Run(settings, given(images), Line(1))
    run.start()
    run.wait()
    assert run.phase == FAILED
    assert "there is no VAE at 'no-vae'" in run.message
    assert str(tmp_path) not in status(run)


def test_a_visitor_who_leaves_stops_their_run(images, shared) -> None:
    visitor = Visitor(shared)
    captions = dict.fromkeys(images, "a sks koala")
    with pytest.raises(InputError, match="drop three to six images"):
        new_run(visitor, run_settings(visitor.folder / "run"), {}, Line(1))
    with pytest.raises(InputError, match="no caption: white.png"):
        new_run(visitor, run_settings(visitor.folder / "run"), {images[0]: " "}, Line(1))
    run = new_run(visitor, run_settings(visitor.folder / "run", steps=1000), captions, Line(1))
    with pytest.raises(InputError, match="your run is under way"):
        new_run(visitor, run_settings(visitor.folder / "run"), captions, Line(1))
    visitor.leave()
    assert run.phase == STOPPED
    assert not visitor.folder.exists()


def test_a_trained_file_is_called_as_its_subject() -> None:
    assert name_of("a sks koala face") == "koala face"
    assert name_of("../a <b>sks</b>/") == "b b"
    assert name_of("a sks") == "subject"


def test_the_loss_curve_has_a_hundred_points_at_most() -> None:
    curve = loss_curve([float(n) for n in range(1, 1001)])
    assert len(curve) == 100
    assert (curve.step.iloc[-1], curve.loss.iloc[-1]) == (1000, 995.5)
    assert list(loss_curve([3.0, 1.0]).loss) == [3.0, 1.0]


# -------------------------------------------------------------------------------------------------------- in a browser


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    app = App(filled_in(AppSettings(port=free_port())))
    app.start()
    yield app.address
    app.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright.sync_playwright() as started:
        try:
            where = {"executable_path": found} if found else {"channel": "chrome"}
            browser = started.chromium.launch(args=flags, **where)
        except playwright.Error as error:
            pytest.skip(f"there is no Chromium or Chrome here (make browser installs one): {error.message[:200]}")
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address) -> Iterator[Callable[[], Any]]:
    """Opens the app as another visitor. What the page asks of other hosts, and its errors, fail the test."""
    contexts, problems = [], []

    def open_page() -> Any:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        contexts.append(context)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else problems.append(r.url))
        page.goto(address)
        page.locator("#make").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def image_of(page: Any, selector: str, before: str | None = None) -> tuple[Image.Image, str]:
    """The image in a place of the page, once it is another than before; and its address."""
    place = page.locator(f"{selector} img").first
    place.wait_for()
    deadline = time.monotonic() + 60
    while (address := place.get_attribute("src")) == before and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert address != before
    return Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB"), address


def set_slider(page: Any, selector: str, value: float) -> None:
    field = page.locator(f"{selector} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


def test_a_visitor_creates_images_and_moves_a_weight(open_page, shared) -> None:
    page = open_page()
    set_slider(page, "#steps", STEPS)
    page.locator("#seed input").fill("3")
    page.click("#make")
    adapted, first = image_of(page, "#adapted")
    base, _ = image_of(page, "#base")
    prompt = "a sks fox face on a blue background"
    assert_same(base, alone(shared, prompt, None))
    assert_same(adapted, alone(shared, prompt, "fox"))
    set_slider(page, "#weight-0", -0.5)
    page.click("#make")
    assert_same(image_of(page, "#adapted", first)[0], alone(shared, prompt, ("fox", -0.5)))
    page.locator("#prompt textarea").fill("")
    page.click("#make")
    page.get_by_text("the prompt is empty").wait_for()
    for tab, button, place in (
        ("Over the weight", "#make-strip", "#strip"),
        ("A subject each", "#make-grid", "#grid"),
        ("Attention maps", "#make-maps", "#maps"),
    ):
        page.locator("#prompt textarea").fill(PROMPT)
        page.get_by_role("tab", name=tab).click()
        page.click(button)
        image_of(page, place)
    assert page.locator("#strip img").count() == len(STRIP)
    assert page.locator("#grid img").count() == 8


def test_a_visitor_drops_files_and_uses_the_one_that_fits(open_page, tmp_path) -> None:
    page = open_page()
    page.get_by_role("tab", name="Inspect").click()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 100)
    page.locator("#file input[type=file]").set_input_files(broken)
    page.get_by_text("broken.safetensors cannot be used").wait_for()
    page.get_by_label("Clear").or_(page.get_by_label("Remove")).first.click()
    mine = tmp_path / "mine.safetensors"
    shutil.copy(FOX, mine)
    page.locator("#file input[type=file]").set_input_files(mine)
    page.get_by_text("mine.safetensors fits StableDiffusionPipeline").wait_for()
    image_of(page, "#heatmaps")
    page.click("#use")
    page.locator("#make").wait_for()
    page.locator("#chosen").get_by_text("mine").wait_for()


def test_a_visitor_trains_cancels_resumes_and_uses_what_was_trained(open_page, images, tmp_path) -> None:
    page = open_page()
    page.get_by_role("tab", name="Train").click()
    page.locator("#instance-prompt textarea, #instance-prompt input").fill("a sks koala")
    page.locator("#images input[type=file]").set_input_files(images)
    caption = page.locator("#caption-0 textarea, #caption-0 input")
    caption.wait_for()
    assert caption.input_value() == "a sks koala on a white background"
    caption.fill("a sks koala, alone")
    set_slider(page, "#train-steps", 6)
    page.locator("#every input").fill("3")
    page.click("#train")
    page.locator("#state").get_by_text("Step").wait_for()
    page.click("#cancel")
    page.locator("#state").get_by_text("Stopped after step").wait_for()
    page.click("#resume")
    page.locator("#state").get_by_text("Done: 6 steps").wait_for()
    image_of(page, "#validation-images")
    with page.expect_download() as download:
        page.click("#download")
    saved = tmp_path / "koala.safetensors"
    download.value.save_as(saved)
    assert read_coeff_metadata(saved)["instance_prompt"] == "a sks koala"
    page.click("#use-trained")
    page.locator("#chosen").get_by_text("koala").wait_for()


def test_two_visitors_at_once_have_each_their_own_subject(open_page, shared, tmp_path) -> None:
    pages = [open_page(), open_page()]
    for page, name in zip(pages, ("owl", "rocket")):
        file = tmp_path / f"my {name}.safetensors"
        shutil.copy(EMBEDDED / "coefficients" / f"{name}.safetensors", file)
        page.get_by_role("tab", name="Inspect").click()
        page.locator("#file input[type=file]").set_input_files(file)
    for page in pages:
        page.click("#use")
        page.locator("#make").wait_for()
        set_slider(page, "#steps", 8)
    for page in pages:
        page.click("#make")
    for page, name in zip(pages, ("owl", "rocket")):
        adapted, _ = image_of(page, "#adapted")
        assert_same(adapted, alone(shared, f"a sks {name} on a blue background", name, seed=0, steps=8))
        page.locator("#chosen input").click()
        shown = page.locator("#chosen").get_by_role("option").all_inner_texts()
        assert [text.strip("\n ✓") for text in shown if "my" in text] == [f"my {name}"]
