"""The tab to train a subject: images with their captions, the loss and validation images as they come, the file."""

from __future__ import annotations

import asyncio
import html
import re
import statistics
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image

from ..training import DreamBoothSettings, InputError
from ..training.images.files import open_file, open_images
from .create import GALLERY_BUTTONS, CreateTab
from .inspect_file import used
from .messages import told
from .pipeline import SharedPipeline
from .runs import DONE, FAILED, STOPPED, TRAINS, WAITS, Line, Run
from .settings import AppSettings
from .visitors import Visitor, Visitors

MOST_PIXELS = 50_000_000  # of an image
POINTS = 100  # of the loss curve
SHOWN = 24  # validation images
STEPS = 500  # to begin with
PRECISIONS: dict[str, Any] = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}
PLAIN_NAME = re.compile(r"(img|image|dsc|dscn|dscf|pxl|photo|picture|screenshot|untitled|whatsapp)?[\W\d_]*", re.I)

COLOURS = {
    "white": (255, 255, 255), "black": (0, 0, 0), "gray": (128, 128, 128), "red": (220, 40, 40),
    "orange": (255, 150, 30), "yellow": (255, 226, 60), "green": (44, 160, 70), "blue": (40, 90, 220),
    "purple": (130, 60, 180), "pink": (255, 170, 205), "brown": (130, 80, 40),
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- captions


def suggested(image: Image.Image, name: str, prompt: str, said: str = "") -> str:
    """A caption: the subject's prompt, and what a glance, or a captioner, adds to it.

        suggested(image, "on-grass.jpg", "a sks dog")  ->  "a sks dog on grass"

    Args:
        image: of the subject.
        name: of its file, whose words are taken if it has some.
        prompt: that stands for the subject.
        said: by a captioner, of the whole image.
    """
    if said:
        return f"{prompt}, {said}"
    if colour := border_colour(image):
        return f"{prompt} on a{'n' * (colour[0] in 'aeiou')} {colour} background"
    words = " ".join(re.findall(r"[^\W\d_]+", Path(name).stem)).lower()
    if not words or PLAIN_NAME.fullmatch(Path(name).stem):
        return prompt
    joint = " " if words.split()[0] in ("on", "in", "at", "with", "under", "beside", "near", "by") else ", "
    return f"{prompt}{joint}{words}"


def border_colour(image: Image.Image) -> str | None:
    """The name of the colour that an image has all along its border; `None` if there are several."""
    small = np.asarray(image.convert("RGBA").resize((64, 64)), dtype=float)
    ground = small[..., :3] * (small[..., 3:] / 255) + 255 * (1 - small[..., 3:] / 255)  # as training lays it on white
    border = np.concatenate([ground[0], ground[-1], ground[:, 0], ground[:, -1]])
    if border.std(axis=0).max() > 12:
        return None
    return min(COLOURS, key=lambda name: float(np.square(border.mean(axis=0) - COLOURS[name]).sum()))


def reworded(captions: Mapping[str, str], old: str, new: str) -> dict[str, str]:
    """Captions with the subject's new prompt where they begin with the old one."""
    return {
        path: f"{new}{caption.removeprefix(old)}" if old and caption.startswith(old) else caption
        for path, caption in captions.items()
    }


@cache
def captioner(name: str) -> Any:
    """Describes an image of Pillow. Raises InputError if there is no such model."""
    from transformers import pipeline

    try:
        describe = pipeline("image-text-to-text", model=name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"--captioner {name} cannot be loaded: {error}") from error
    return lambda image: str(describe(image, text="", max_new_tokens=30)[0]["generated_text"]).strip()


# ------------------------------------------------------------------------------------------------- images and settings


def check_images(paths: Sequence[str], most: int) -> None:
    """Raises InputError if there are too many, or some are too large or no images; these are named."""
    if len(paths) > most:
        raise InputError(f"{len(paths)} images were dropped, and a run can have {most}: take the best")
    try:
        open_images([(Path(path).name, "", partial(_open, path)) for path in paths], "images")
    except InputError as error:
        text = str(error).removeprefix("--images: ")
        for path in paths:
            text = text.replace(path, Path(path).name)  # the folder is the server's
        raise InputError(text) from None


def _open(path: str) -> Image.Image:
    image = open_file(Path(path))
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
    return image


def settings_of_run(
    app: AppSettings,
    output_dir: Path,
    prompt: str,
    steps: int,
    seed: int,
    validation_prompt: str,
    validation_steps: int,
) -> DreamBoothSettings:
    """The settings of a visitor's run.

    Raises:
        InputError: if they cannot be used.
    """
    if not prompt.strip():
        raise InputError("say what stands for the subject in a prompt, such as 'a sks dog'")
    if not 1 <= steps <= app.max_train_steps:
        raise InputError(f"the steps must be from 1 to {app.max_train_steps}, got {steps}")
    shown = (validation_prompt.strip(),) if validation_prompt.strip() else ()
    return DreamBoothSettings(
        pretrained_model_name_or_path=app.pretrained_model_name_or_path,
        single_file_config=app.single_file_config,
        quantize=app.quantize,
        gguf_file=app.gguf_file,
        group_offload=app.group_offload,
        instance_prompt=prompt.strip(),
        output_dir=str(output_dir),
        max_train_steps=steps,
        seed=seed,
        mixed_precision=PRECISIONS[app.dtype],
        validation_prompt=shown,
        validation_steps=max(1, validation_steps) if shown else None,
        num_validation_images=4,
        report_to="none",
    )


def new_run(visitor: Visitor, settings: DreamBoothSettings, captions: Mapping[str, str], line: Line) -> Run:
    """Starts a run on images with these captions.

    Raises:
        InputError: if there are no images, or one has no caption.
        ValueError: if the visitor's last run is under way, or too many wait.
    """
    if visitor.run is not None and not visitor.run.ended:
        raise InputError("your run is under way: cancel it first")
    if not captions:
        raise InputError("drop three to six images of the subject first")
    if without := [Path(path).name for path, caption in captions.items() if not caption.strip()]:
        raise InputError(f"these images have no caption: {', '.join(without)}")
    run = Run(settings, [(_open(path), caption.strip()) for path, caption in captions.items()], line)
    run.start()
    visitor.run = run
    return run


def example_images(glyph: Path, folder: Path) -> list[str]:
    """Five images of a glyph on grounds of other colours, as a user would bring them."""
    drawn = Image.open(glyph).convert("RGBA").resize((42, 42), Image.Resampling.LANCZOS)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{colour}.png" for colour in ("white", "green", "purple", "gray", "orange")]
    for path in paths:
        ground = Image.new("RGB", (64, 64), COLOURS[path.stem])
        ground.paste(drawn, (11, 11), drawn)
        ground.save(path)
    return [str(path) for path in paths]


# ---------------------------------------------------------------------------------------------------- what is shown


def status(run: Run) -> str:
    """How far a run is, as HTML."""
    done, share = len(run.losses), len(run.losses) / max(1, run.steps)
    if run.phase == WAITS and run.before:
        text = f"One run trains at a time: {run.before} before yours."
    elif run.phase == TRAINS and done:
        left = run.seconds_left()
        about = "" if left is None else f", about {_time(left)} left"
        text = f"Step {done} of {run.steps}, loss {statistics.fmean(run.losses[-20:]):.4f}{about}"
        text += "" if run.doing == "trains" else f": {run.doing}"
    elif run.phase == DONE:
        text = f"Done: {run.steps} steps."
    elif run.phase == FAILED:
        text = f"It failed: {run.message}"
    elif run.phase == STOPPED:
        more = "; Resume goes on from there." if run.can_resume else "."
        text = f"{run.message[:1].upper()}{run.message[1:]}{more}"
    else:
        text = f"It {run.doing} ..."
    kind = {FAILED: "bad", DONE: "good"}.get(run.phase, "plain")
    bar = f'<div class="bar"><div style="width: {100 * share:.1f}%"></div></div>'
    return f'<div class="panel {kind}">{html.escape(text)}</div>{bar}'


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def loss_curve(losses: Sequence[float]) -> pd.DataFrame:
    """At most `POINTS` points: step, and the mean loss of the steps since the point before."""
    size = max(1, -(-len(losses) // POINTS))
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    steps = [min(len(losses), (n + 1) * size) for n in range(len(parts))]
    return pd.DataFrame({"step": steps, "loss": [statistics.fmean(part) for part in parts]})


def view(run: Run, shown: int) -> tuple[list[Any], int]:
    """What the page shows of a run now, and how many images it has; these are sent if not as many were shown."""
    made = run.validation_images()
    news: Any = gr.skip()
    if len(made) != shown:
        news = gr.Gallery([(str(file), text) for file, text in made[:SHOWN]], visible=bool(made))
    drawn = gr.LinePlot(loss_curve(run.losses) if run.losses else None, visible=len(run.losses) > 1)
    file = None if run.file is None else str(run.file)
    return [
        status(run),
        drawn,
        news,
        gr.Button(interactive=run.ended),
        gr.Button(interactive=not run.ended),
        gr.Button(interactive=run.can_resume),
        gr.DownloadButton(value=file, visible=file is not None),
        gr.Button(visible=file is not None),
    ], len(made)


async def follow(run: Run) -> AsyncIterator[list[Any]]:
    """The page's view of a run until it has ended, whenever there is news."""
    seen, shown = None, -1  # what the page has of an earlier run goes
    while True:
        ended = run.ended  # before the view, so that the last one has all
        now = (run.phase, run.doing, len(run.losses), run.before)
        if now != seen:
            values, shown = view(run, shown)
            yield values
            seen = now
        if ended:
            return
        await asyncio.sleep(0.7)


@dataclass(frozen=True)
class _Subject:
    """What is trained on: the prompt, the images, and a row for each with its caption."""

    prompt: gr.Textbox
    files: gr.File
    example: gr.Dropdown
    hint: gr.Markdown
    rows: list[gr.Row]
    thumbnails: list[gr.Image]
    captions: list[gr.Textbox]
    paths: gr.State
    written: gr.State


@dataclass(frozen=True)
class _Training:
    """How it is trained, and what is seen of it."""

    settings: list[Any]
    start: gr.Button
    cancel: gr.Button
    resume: gr.Button
    use: gr.Button
    shows: list[Any]


def _subject(app: AppSettings, glyphs: Mapping[str, Path]) -> _Subject:
    prompt = gr.Textbox(
        "a sks subject", label="The subject in words", elem_id="instance-prompt",
        info="A rare word and what it is, such as: a sks dog",
    )  # fmt: skip
    files = gr.File(
        label=f"Three to six images of it, {app.max_train_images} at most", file_count="multiple",
        file_types=["image"], height=140, elem_id="images",
    )  # fmt: skip
    example = gr.Dropdown(
        ["", *glyphs], value="", label="Or take an example", visible=bool(glyphs),
        elem_id="example", info="A glyph that the embedded model has never seen.",
    )  # fmt: skip
    hint = gr.Markdown(
        "**Captions** say what else is in the image, which prompts go on deciding. Of all settings they "
        "matter most: correct the suggestions.", visible=False,
    )  # fmt: skip
    rows, thumbnails, captions = [], [], []
    for n in range(app.max_train_images):
        with gr.Row(visible=False, equal_height=True, elem_classes="caption-row") as row:
            thumbnails.append(_thumbnail())
            captions.append(
                gr.Textbox(show_label=False, container=False, scale=5, elem_id=f"caption-{n}", max_lines=2)
            )
        rows.append(row)
    paths = gr.State([])
    written = gr.State("a sks subject")  # the prompt that captions have now
    return _Subject(prompt, files, example, hint, rows, thumbnails, captions, paths, written)


def _training(app: AppSettings, glyphs: Mapping[str, Path]) -> _Training:
    with gr.Row():
        steps = gr.Slider(
            1, app.max_train_steps, value=min(STEPS, app.max_train_steps), step=1, label="Steps", scale=3,
            elem_id="train-steps",
        )  # fmt: skip
        seed = gr.Number(0, label="Seed", precision=0, min_width=80, elem_id="train-seed")
    with gr.Row():
        validation = gr.Textbox(
            "{subject} on a blue background" if glyphs else "{subject}", label="Validation prompt", scale=3,
            elem_id="validation",
        )  # fmt: skip
        every = gr.Number(100, label="Steps apart", precision=0, min_width=80, elem_id="every")
    with gr.Row():
        start = gr.Button("Train", variant="primary", elem_id="train")
        cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="cancel")
        resume = gr.Button("Resume", interactive=False, elem_id="resume")
    state = gr.HTML(padding=False, elem_id="state")
    with gr.Row():
        download = gr.DownloadButton("Download the file", visible=False, elem_id="download")
        use = gr.Button("Use it in Create", variant="primary", visible=False, elem_id="use-trained")
    curve = gr.LinePlot(
        x="step", y="loss", x_title="Step", y_title="Loss", label="Loss", height=220, visible=False,
        elem_id="loss",
    )  # fmt: skip
    images = gr.Gallery(
        format="png", label="Validation images, the newest first", columns=4, height="auto", visible=False,
        object_fit="contain", interactive=False, buttons=GALLERY_BUTTONS, elem_id="validation-images",
        elem_classes="pictures",
    )  # fmt: skip
    shows = [state, curve, images, start, cancel, resume, download, use]
    return _Training([steps, seed, validation, every], start, cancel, resume, use, shows)


def train_tab(shared: SharedPipeline, visitors: Visitors, tabs: gr.Tabs, create: CreateTab) -> None:
    """The tab's controls and what they do."""
    app = shared.settings
    if app.captioner:
        captioner(app.captioner)  # what cannot be loaded is said at once
    line = Line(app.max_train_runs)
    folder = Path(app.pretrained_model_name_or_path).parent / "subjects"  # the embedded models have one beside them
    glyphs = {path.stem.replace("-", " "): path for path in sorted(folder.glob("*.png"))}
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=400):
            subject = _subject(app, glyphs)
        with gr.Column(scale=4, min_width=440):
            training = _training(app, glyphs)

    @told
    def on_files(
        request: gr.Request, files: list[str] | None, prompt: str, known_paths: list[str], *known: str
    ) -> list[Any]:
        files = files or []
        check_images(files, app.max_train_images)
        before = dict(zip(known_paths, known))
        texts = {path: before.get(path) or _suggest(path, prompt.strip(), app) for path in files}
        return [files, gr.Markdown(visible=bool(files)), *shown_rows(texts)]

    def shown_rows(texts: Mapping[str, str]) -> list[Any]:
        empty = app.max_train_images - len(texts)
        return [
            *[gr.Row(visible=True)] * len(texts), *[gr.Row(visible=False)] * empty,
            *texts, *[None] * empty,
            *texts.values(), *[""] * empty,
        ]  # fmt: skip

    @told
    def on_prompt(prompt: str, old: str, paths: list[str], *texts: str) -> list[Any]:
        prompt = prompt.strip()
        now = reworded(dict(zip(paths, texts)), old, prompt)
        return [prompt, *now.values(), *[gr.skip()] * (len(texts) - len(now))]

    @told
    def on_example(request: gr.Request, name: str) -> list[Any]:
        if name not in glyphs:
            return [gr.skip(), gr.skip()]
        folder = visitors.of(request.session_hash).folder / "example" / glyphs[name].stem
        return [f"a sks {name}", example_images(glyphs[name], folder)]

    @told
    async def on_start(
        request: gr.Request, prompt: str, steps: int, seed: int, validation: str, every: int, paths: Any, *texts: str
    ) -> AsyncIterator[list[Any]]:
        visitor = visitors.of(request.session_hash)
        folder = visitor.folder / f"run-{len(list(visitor.folder.glob('run-*')))}"
        shown = validation.replace("{subject}", prompt.strip())
        settings = settings_of_run(app, folder, prompt, int(steps), int(seed or 0), shown, int(every or 1))
        run = await asyncio.to_thread(new_run, visitor, settings, dict(zip(paths, texts)), line)
        async for values in follow(run):
            yield values

    @told
    async def on_resume(request: gr.Request) -> AsyncIterator[list[Any]]:
        run = visitors.of(request.session_hash).run
        if run is None or not run.can_resume:
            raise ValueError("there is no run that could be resumed")
        run.start()
        async for values in follow(run):
            yield values

    @told
    def on_cancel(request: gr.Request) -> None:
        run = visitors.of(request.session_hash).run
        if run is None or run.ended:
            raise ValueError("no run of yours is under way")
        run.cancel()
        gr.Info("It stops after this step, and can be resumed.", duration=5)

    @told
    def on_use(request: gr.Request) -> list[Any]:
        visitor = visitors.of(request.session_hash)
        if visitor.run is None or visitor.run.file is None:
            raise ValueError("nothing has been trained yet")
        return used(visitor, visitor.run.file, visitor.run.file.stem)

    private: dict[str, Any] = {"api_visibility": "private"}
    unlimited: dict[str, Any] = private | {"concurrency_limit": None, "show_progress": "hidden"}
    plain: dict[str, Any] = private | {"show_progress": "hidden"}
    prompt, paths, written, captions = subject.prompt, subject.paths, subject.written, subject.captions
    subject.files.change(
        on_files, [subject.files, prompt, paths, *captions],
        [paths, subject.hint, *subject.rows, *subject.thumbnails, *captions],
        show_progress="minimal", show_progress_on=[subject.files], **private,
    )  # fmt: skip
    gr.on([prompt.blur, prompt.submit], on_prompt, [prompt, written, paths, *captions], [written, *captions], **plain)
    taken = subject.example.change(on_example, subject.example, [prompt, subject.files], **plain)
    taken.then(lambda prompt: prompt, prompt, written, **plain)
    given: list[Any] = [prompt, *training.settings, paths, *captions]
    training.start.click(on_start, given, training.shows, **unlimited)
    training.resume.click(on_resume, None, training.shows, **unlimited)
    training.cancel.click(on_cancel, None, None, queue=False, **private)
    training.use.click(on_use, None, [tabs, create.chosen, create.of_grid], **private)


def _thumbnail() -> gr.Image:
    size: dict[str, Any] = {"height": 64, "width": 64, "min_width": 64, "scale": 0}
    return gr.Image(show_label=False, interactive=False, container=False, buttons=[], **size)


def _suggest(path: str, prompt: str, app: AppSettings) -> str:
    with _open(path) as image:
        said = captioner(app.captioner)(image.convert("RGB")) if app.captioner else ""
        return suggested(image, Path(path).name, prompt, said)
